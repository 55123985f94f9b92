import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from tests.compiled import compiled
from tokjax.ops import plans

plans = compiled(plans)

B, N, K = 50, 7, 4


def merge(seed, n=N, k=K):
  """Random merges; about one token in five is dropped."""
  random = np.random.default_rng(seed)
  slot = random.integers(0, k + 1, (B, n)).astype(np.int32)
  weight = random.normal(size=(B, n)).astype(np.float32)
  return plans.Merge(jnp.asarray(slot), jnp.asarray(weight))


def transform(seed, n=N, k=K):
  random = np.random.default_rng(seed)
  weight = random.normal(size=(B, k, n)).astype(np.float32)
  share = random.random((B, k, n)).astype(np.float32)
  share /= share.sum(axis=1, keepdims=True)
  gone = random.random((B, 1, n)) < 0.2
  weight, share = (np.where(gone, 0, x) for x in (weight, share))
  return plans.Transform(jnp.asarray(weight), jnp.asarray(share))


def stream(seed, n=N, dim=3):
  x = np.random.default_rng(seed).normal(size=(B, n, dim))
  return jnp.asarray(x, jnp.float32)


def matrices(plan, num_outputs):
  """W and R of every example by loops over tokens and outputs."""
  if isinstance(plan, plans.Transform):
    return np.asarray(plan.weight), np.asarray(plan.share)
  plan = jax.device_get(plan)
  batch, n = plan.slot.shape
  weight = np.zeros((batch, num_outputs, n))
  share = np.zeros((batch, num_outputs, n))
  for b in range(batch):
    for j in range(n):
      if plan.slot[b, j] < num_outputs:
        weight[b, plan.slot[b, j], j] = plan.weight[b, j]
        share[b, plan.slot[b, j], j] = 1
  return weight, share


PLANS = {"merge": merge, "transform": transform}


@pytest.mark.parametrize("kind", PLANS)
def test_plans_are_matrices(kind):
  plan, x, y = PLANS[kind](0), stream(1), stream(2, n=K)
  size = jnp.asarray(np.random.default_rng(3).integers(1, 9, (B, N)), "float32")
  weight, share = matrices(plan, K)
  np.testing.assert_allclose(
    plans.apply_plan(plan, x, K), weight @ np.asarray(x), atol=1e-5
  )
  np.testing.assert_allclose(
    plans.merge_sizes(plan, size, K),
    np.einsum("bkn,bn->bk", share, size),
    rtol=1e-5,
  )
  np.testing.assert_allclose(
    plans.restore_plan(plan, y),
    np.swapaxes(share, 1, 2) @ np.asarray(y),
    atol=1e-5,
  )
  same = plans.to_transform(plan, K)
  np.testing.assert_array_equal(same.weight, weight.astype(np.float32))
  np.testing.assert_array_equal(same.share, share.astype(np.float32))


@pytest.mark.parametrize("first", PLANS)
@pytest.mark.parametrize("second", PLANS)
def test_composing_is_doing_one_after_the_other(first, second):
  one, two = PLANS[first](0), PLANS[second](1, n=K, k=2)
  x, y, size = stream(2), stream(3, n=2), jnp.ones((B, N))
  both = plans.compose_plans(two, one, 2)
  assert isinstance(both, plans.Merge) == (first == second == "merge")
  np.testing.assert_allclose(
    plans.apply_plan(both, x, 2),
    plans.apply_plan(two, plans.apply_plan(one, x, K), 2),
    atol=1e-5,
  )
  np.testing.assert_allclose(
    plans.merge_sizes(both, size, 2),
    plans.merge_sizes(two, plans.merge_sizes(one, size, K), 2),
    rtol=1e-5,
  )
  np.testing.assert_allclose(
    plans.restore_plan(both, y),
    plans.restore_plan(one, plans.restore_plan(two, y)),
    atol=1e-5,
  )


def test_sizes_are_conserved():
  slot = jnp.array([[2, 0, 2, 1]])
  plan = plans.Merge(slot, jnp.ones((1, 4)))
  size = jnp.array([[1.0, 2.0, 3.0, 4.0]])
  assert plans.merge_sizes(plan, size, 3).tolist() == [[2.0, 4.0, 4.0]]


@pytest.mark.parametrize("kind", PLANS)
def test_dropped_tokens_may_hold_anything(kind):
  plan, x = PLANS[kind](4), stream(5)
  gone = ~np.asarray(matrices(plan, K)[1]).any(axis=1)
  assert gone.any()
  poisoned = jnp.where(gone[..., None], jnp.nan, x)
  np.testing.assert_array_equal(
    plans.apply_plan(plan, poisoned, K), plans.apply_plan(plan, x, K)
  )

  def total(weight, x):
    return jnp.sum(
      jnp.sin(plans.apply_plan(plan._replace(weight=weight), x, K))
    )

  for gradient in jax.grad(total, (0, 1))(plan.weight, poisoned):
    assert np.isfinite(gradient).all()
  assert not np.any(np.asarray(jax.grad(total, 1)(plan.weight, x))[gone])


@pytest.mark.parametrize("kind", PLANS)
def test_gradients(kind):
  plan, x = PLANS[kind](6), stream(7)
  whole = matrices(plan, K)[1].any(axis=1).all(axis=1)  # nothing dropped
  b = int(np.argmax(whole))
  assert whole[b]
  plan, x = jax.tree.map(lambda leaf: leaf[b], (plan, x))

  def apply(weight, x):
    weight, x = jnp.asarray(weight), jnp.asarray(x)
    return plans.apply_plan(plan._replace(weight=weight), x, K)

  check_grads(apply, (plan.weight, x), order=1, modes=["rev"], atol=1e-2)


def test_bfloat16_streams_are_summed_in_float32():
  plan = plans.Merge(jnp.zeros((1, 300), jnp.int32), jnp.ones((1, 300)))
  x = jnp.ones((1, 300, 1), jnp.bfloat16)
  out = plans.apply_plan(plan, x, 1)
  assert out.dtype == jnp.bfloat16 and float(out[0, 0, 0]) == 300
  matrix = plans.to_transform(plan, 1)
  out = plans.apply_plan(matrix, x, 1)
  assert out.dtype == jnp.bfloat16 and float(out[0, 0, 0]) == 300


@pytest.mark.unchecked
def test_errors():
  plan, x = merge(0), stream(0)
  with pytest.raises(ValueError, match="plan_tokens=7, x_tokens=6"):
    plans.apply_plan(plan, x[:, :6], K)
  matrix = transform(0)
  with pytest.raises(ValueError, match="num_outputs=3, weight=4"):
    plans.apply_plan(matrix, x, 3)
  with pytest.raises(ValueError, match="plan_outputs=4, y=5"):
    plans.restore_plan(matrix, x[:, :5])
  with pytest.raises(ValueError, match="first_outputs=4, second_tokens=7"):
    plans.compose_plans(transform(1), matrix, K)

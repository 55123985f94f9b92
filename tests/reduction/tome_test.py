import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import compiled
from tests.ops import merging_test
from tokjax.ops import plans
from tokjax.reduction import tome

plans = compiled(plans)
tome = compiled(tome)

merge = jax.jit(
  tome.tome,
  static_argnames=("num_keep", "class_token", "every", "order", "positions"),
)


def arrays(seed=0, batch=3, n=12, dim=5):
  random = np.random.default_rng(seed)
  x, metric = random.normal(size=(2, batch, n, dim))
  return jnp.asarray(x, jnp.float32), jnp.asarray(metric, jnp.float32)


X = jnp.array(
  [[[1, 0], [1, 0.1], [0, 1], [0.1, 1], [-1, 0], [0, -1]]], jnp.float32
)


def test_worked_example():
  size = jnp.array([[3.0, 1, 1, 1, 1, 1]])
  out = merge(X, X, size=size, num_keep=5)
  want = [[0, 1], [-1, 0], [1, 0.025], [0.1, 1], [0, -1]]
  np.testing.assert_allclose(out.tokens[0], want, atol=1e-6)
  assert out.size[0].tolist() == [1, 1, 4, 1, 1]
  assert out.index[0].tolist() == [2, 4, 1, 3, 5]
  assert out.position_ids[0].tolist() == [2, 4, 1, 3, 5]
  with_class = merge(X, X, num_keep=5, class_token=True)
  assert with_class.index[0].tolist() == [0, 4, 1, 3, 5]  # now 2 goes into 3
  raster = merge(X, X, num_keep=5, order="raster", positions="renumber")
  assert raster.index[0].tolist() == [1, 2, 3, 4, 5]
  assert raster.position_ids[0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("num_keep", [5, 7, merging_test.N])
def test_equals_a_loop(num_keep, class_token):
  metric, mask, size, _, x = merging_test.cases(num_keep, count=200)
  poisoned = [np.where(mask[..., None], a, np.nan) for a in (x, metric)]
  out = jax.device_get(
    merge(*poisoned, mask, size, num_keep=num_keep, class_token=class_token)
  )
  checked = 0
  for i in range(len(x)):
    try:
      outputs, groups = merging_test.oracle_match(
        metric[i],
        mask[i],
        merging_test.N - num_keep,
        class_token=class_token,
        distill_token=False,
        every=2,
        order="ascending" if class_token else "similarity",
      )
    except merging_test.NearTie:
      continue
    checked += 1
    assert out.index[i, : len(outputs)].tolist() == outputs
    assert out.mask[i].sum() == len(outputs)
    for k, group in enumerate(groups):
      want = np.average(x[i, group], axis=0, weights=size[i, group])
      np.testing.assert_allclose(out.tokens[i, k], want, atol=1e-5)
      assert out.size[i, k] == size[i, group].sum()
  assert checked > 190


def test_every_third_keeps_a_third():
  x, metric = arrays()
  out = merge(x, metric, num_keep=4, every=3)
  assert (out.index == jnp.array([2, 5, 8, 11])[None]).all()
  assert (out.size.sum(axis=1) == 12).all()


def test_tokens_are_means_of_their_sources_after_several_blocks():
  x, metric = arrays(n=20)
  slot = jnp.broadcast_to(jnp.arange(20), (3, 20))
  tokens, size, keep = x, None, 20
  for num_keep in (16, 11, 7):
    out = merge(
      tokens, metric[:, :keep], size=size, num_keep=num_keep, class_token=True
    )
    slot = tome.track_sources(slot, out.plan, num_keep)
    tokens, size, keep = out.tokens, out.size, num_keep
  for b in range(3):
    for k in range(7):
      members = np.flatnonzero(np.asarray(slot[b]) == k)
      assert len(members) == out.size[b, k]
      np.testing.assert_allclose(
        tokens[b, k], np.asarray(x)[b, members].mean(axis=0), atol=1e-5
      )
    assert slot[b, 0] == 0 and size[b, 0] == 1  # the class token
    np.testing.assert_array_equal(tokens[b, 0], x[b, 0])


def test_equal_pairs_come_back():
  x, _ = arrays(n=6)
  doubled = jnp.repeat(x, 2, axis=1)
  out = merge(doubled, doubled, num_keep=6)
  np.testing.assert_allclose(out.tokens, x, atol=1e-6)
  np.testing.assert_allclose(out.restore(out.tokens, 12), doubled, atol=1e-6)


def test_no_merge_is_the_identity():
  x, metric = arrays()
  for out in (
    merge(x, metric, num_keep=12),
    tome.tome_random(jax.random.key(0), x, metric, num_keep=12),
  ):
    np.testing.assert_array_equal(out.tokens, x)
    assert (out.index == jnp.arange(12)[None]).all()


def test_size_bias_counts_equal_keys():
  random = np.random.default_rng(0)
  q, k, v = random.normal(size=(3, 4, 8))
  k[3], v[3] = k[2], v[2]  # the last two are one token

  def attend(q, k, v, bias):
    weights = jax.nn.softmax(q @ k.T + bias, axis=-1)
    return weights @ v

  q, k, v = (jnp.asarray(a, jnp.float32) for a in (q, k, v))
  want = attend(q, k, v, jnp.zeros((1, 4)))
  bias = tome.size_bias(jnp.array([[1.0, 1, 2]]))
  np.testing.assert_allclose(attend(q, k[:3], v[:3], bias), want, atol=1e-6)
  mask = jnp.array([[True, False, True]])
  bias = tome.size_bias(jnp.array([[1.0, 1, 2]]), mask)
  np.testing.assert_allclose(bias, [[0, -np.inf, np.log(2)]], atol=1e-6)
  gradient = jax.grad(lambda s: jnp.sum(jnp.exp(tome.size_bias(s))))
  assert np.isfinite(gradient(jnp.array([0.0, 2.0]))).all()


def test_merge_schedule():
  assert tome.merge_schedule(197, 12, 16, protected=1) == (
    *range(181, 5, -16),
    11,  # half of the 20 that are left beside the class token
  )
  assert tome.merge_schedule(100, 5, 8, inflection=-1) == (84, 72, 64, 60, 60)
  assert tome.merge_schedule(100, 5, 8, inflection=1) == (100, 96, 88, 76, 60)
  assert tome.merge_schedule(100, 4, (5, 3)) == (95, 92, 92, 92)
  assert tome.merge_schedule(9, 3, 0) == (9, 9, 9)


def test_random_merges_what_was_drawn_into_the_nearest():
  x, metric = arrays()
  out = tome.tome_random(jax.random.key(3), x, metric, num_keep=5)
  unit = np.asarray(metric) / np.linalg.norm(metric, axis=-1, keepdims=True)
  for b in range(3):
    stay = np.asarray(out.index[b])
    goes = np.setdiff1d(np.arange(12), stay)
    near = (unit[b, goes] @ unit[b, stay].T).argmax(axis=1)
    for k in range(5):
      members = [stay[k], *goes[near == k]]
      want = np.asarray(x)[b, members].mean(axis=0)
      np.testing.assert_allclose(out.tokens[b, k], want, atol=1e-5)
      assert out.size[b, k] == len(members)


def test_gradient_is_shared_as_the_mean_is():
  x, metric = arrays(batch=1)
  out = merge(x, metric, num_keep=7)
  to_x, to_metric = jax.grad(
    lambda x, metric: jnp.sum(merge(x, metric, num_keep=7).tokens), (0, 1)
  )(x, metric)
  np.testing.assert_allclose(
    to_x[0], np.repeat(out.plan.weight[0][:, None], 5, axis=1), atol=1e-6
  )
  assert not np.any(to_metric)


def test_track_sources_follows_dropped_tokens():
  plan = plans.Merge(jnp.array([[1, 2, 0]]), jnp.ones((1, 3)))
  slot = tome.track_sources(jnp.array([[2, 3, 1, 0]]), plan, 2)
  assert slot.tolist() == [[0, 2, 2, 1]]


@pytest.mark.unchecked
def test_errors():
  x, metric = arrays()
  with pytest.raises(ValueError, match="num_keep must lie in 1..12, got 13"):
    tome.tome(x, metric, num_keep=13)
  with pytest.raises(ValueError, match="num_merged must lie in 0..6, got 7"):
    tome.tome(x, metric, num_keep=5)
  with pytest.raises(ValueError, match="features=12, metric=11"):
    tome.tome(x, metric[:, 1:], num_keep=8)
  with pytest.raises(ValueError, match="features=12, metric=12, mask=12, si"):
    tome.tome_random(
      jax.random.key(0), x, metric, size=jnp.ones((3, 4)), num_keep=8
    )
  with pytest.raises(ValueError, match="inflection must be 0 beside"):
    tome.merge_schedule(9, 2, (1, 1), inflection=0.5)
  with pytest.raises(ValueError, match="num_merged_layers must lie in 1..2"):
    tome.merge_schedule(9, 2, (1, 1, 1))

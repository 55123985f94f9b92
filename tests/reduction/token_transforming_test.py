import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import compiled
from tokjax.ops import packing, plans
from tokjax.reduction import token_transforming as tt

packing = compiled(packing)
plans = compiled(plans)
tt = compiled(tt)

N = 10


transform = jax.jit(
  tt.token_transforming,
  static_argnames=("num_keep", "num_protected", "num_sources"),
)


def arrays(seed=0, batch=30, ties=False):
  random = np.random.default_rng(seed)
  x, metric = random.normal(size=(2, batch, N, 4))
  score = random.random((batch, N))
  if ties:
    score = np.ceil(score * 4) / 4
  mask = random.random((batch, N)) < 0.8
  mask[:, 0] = mask[:3] = True
  mask[3:4, 2:] = False
  size = random.integers(1, 6, (batch, N))
  cast = (jnp.asarray(a, jnp.float32) for a in (x, metric, score))
  return *cast, jnp.asarray(mask), jnp.asarray(size, jnp.float32)


X = jnp.array([[[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-0.6, 0.8]]])
SCORE = jnp.array([[0.25, 0.325, 0.3, 0.125]])


def test_worked_example():
  out = transform(X, X, SCORE, num_keep=2)
  assert out.index.tolist() == [[1, 2]]
  np.testing.assert_allclose(
    out.plan.weight[0, 0], [0.117306, 0.866779, 0.015876, 0.000039], atol=1e-6
  )
  np.testing.assert_allclose(out.tokens[0, 0], [0.810706, 0.535975], atol=1e-6)
  np.testing.assert_allclose(out.size[0], [2, 2], atol=1e-5)
  back = out.restore(out.tokens, 4)
  np.testing.assert_allclose(back[0, 3], [-0.057352, 0.970004], atol=1e-6)


def oracle(
  x, metric, score, mask, size, num_keep, temperature, protected, sources
):
  """Anchors, W and R of one example by loops."""
  metric = np.asarray(metric, np.float64)
  valid = [n for n in range(N) if mask[n]]
  fixed = [n for n in valid if n < protected]
  free = sorted((n for n in valid if n not in fixed), key=lambda n: -score[n])
  anchors = sorted(fixed + free[: num_keep - len(fixed)])
  unit = metric / np.linalg.norm(metric, axis=1, keepdims=True)
  weight, share = np.zeros((num_keep, N)), np.zeros((num_keep, N))
  for k, a in enumerate(anchors):
    if a in fixed:
      weight[k, a] = share[k, a] = 1
      continue
    near = sorted(free, key=lambda j: -(unit[a] @ unit[j]))
    for j in near[: sources or N]:
      weight[k, j] = size[j] * np.exp(unit[a] @ unit[j] / temperature)
    for j in free:
      share[k, j] = np.exp(unit[a] @ unit[j] / temperature)
  weight /= np.maximum(weight.sum(axis=1, keepdims=True), 1e-300)
  free_total = share.sum(axis=0, keepdims=True)
  share = np.divide(share, free_total, where=free_total > 0, out=share)
  return anchors, weight, share


@pytest.mark.parametrize(
  "num_keep, protected, sources",
  [
    (4, 0, None),
    (4, 2, None),
    (1, 0, 3),
    (5, 1, 2),
    (N, 0, None),
    (2, 2, None),
  ],
)
def test_equals_a_loop(num_keep, protected, sources):
  x, metric, score, mask, size = (
    jnp.concatenate(pair)
    for pair in zip(
      arrays(batch=85), arrays(1, batch=85, ties=True), strict=True
    )
  )
  poisoned = [jnp.where(mask[..., None], a, jnp.nan) for a in (x, metric)]
  out = jax.jit(
    lambda *a: transform(
      *a,
      num_keep=num_keep,
      temperature=0.5,
      num_protected=protected,
      num_sources=sources,
    )
  )(*poisoned, jnp.where(mask, score, jnp.nan), mask, size)
  out = jax.device_get(out)
  x, metric, score, mask, size = jax.device_get((x, metric, score, mask, size))
  for i in range(len(x)):
    anchors, weight, share = oracle(
      *(a[i] for a in (x, metric, score, mask, size)),
      num_keep,
      0.5,
      protected,
      sources,
    )
    assert out.index[i, : len(anchors)].tolist() == anchors
    assert out.mask[i].sum() == len(anchors)
    np.testing.assert_allclose(out.plan.weight[i], weight, atol=1e-5)
    np.testing.assert_allclose(out.plan.share[i], share, atol=1e-5)
    want = weight @ np.where(mask[i][:, None], x[i], 0)
    np.testing.assert_allclose(out.tokens[i], want, atol=1e-5)
    if num_keep > protected:  # else nobody takes what is not protected
      total = size[i][mask[i]].sum()
      np.testing.assert_allclose(out.size[i].sum(), total, rtol=1e-5)


def test_limits_of_the_temperature():
  x, metric, score, *_ = arrays()

  def tokens(temperature, num_keep=4):
    return transform(
      x, metric, score, num_keep=num_keep, temperature=temperature
    )

  cold = tokens(1e-4)
  kept = jnp.take_along_axis(x, cold.index[..., None], axis=1)
  np.testing.assert_allclose(cold.tokens, kept, atol=1e-5)
  np.testing.assert_allclose(tokens(1e-4, N).tokens, x, atol=1e-5)
  mean = jnp.broadcast_to(x.mean(axis=1, keepdims=True), kept.shape)
  np.testing.assert_allclose(tokens(1e6).tokens, mean, atol=1e-5)


def test_permuting_the_tokens_permutes_the_columns():
  x, metric, score, mask, size = arrays()
  order = np.random.default_rng(1).permutation(N)
  want = transform(x, metric, score, mask, size, num_keep=4)
  got = transform(
    *(a[:, order] for a in (x, metric, score, mask, size)), num_keep=4
  )
  for i in range(len(x)):
    k = int(want.mask[i].sum())
    rows = np.argsort(order[np.asarray(got.index[i, :k])])
    np.testing.assert_allclose(
      np.asarray(got.tokens[i, :k])[rows], want.tokens[i, :k], atol=1e-5
    )


def test_gradients_reach_features_and_metric():
  x, metric, score, mask, size = arrays(batch=5)
  poisoned = [jnp.where(mask[..., None], a, jnp.nan) for a in (x, metric)]

  def total(x, metric, score, temperature):
    out = transform(
      x, metric, score, mask, size, num_keep=4, temperature=temperature
    )
    return jnp.sum(jnp.sin(out.tokens)) + jnp.sum(jnp.sin(out.size))

  gradients = jax.grad(total, (0, 1, 2, 3))(*poisoned, score, 0.3)
  for gradient in gradients:
    assert np.isfinite(gradient).all()
  outside = ~np.asarray(mask)
  for gradient in gradients[:2]:
    assert np.any(gradient) and not np.any(np.asarray(gradient)[outside])
  assert not np.any(gradients[2]) and gradients[3] != 0
  step = 1e-3
  slope = (
    total(*poisoned, score, 0.3 + step) - total(*poisoned, score, 0.3 - step)
  ) / (2 * step)
  np.testing.assert_allclose(gradients[3], slope, rtol=0.02)


def test_pruning_is_the_selection():
  x, _, score, mask, _ = arrays()
  kept = packing.keep_top_k(score, 4, mask)
  plan = tt.pruning_transform(kept, N)
  got = plans.apply_plan(plan, jnp.where(mask[..., None], x, jnp.nan), 4)
  want = jnp.take_along_axis(x, kept.index[..., None], axis=1)
  np.testing.assert_array_equal(got, jnp.where(kept.mask[..., None], want, 0))
  weight = jnp.where(mask, score, 0)
  plan = tt.pruning_transform(kept, N, weight)
  got = plans.apply_plan(plan, x, 5)
  for i in range(len(x)):
    taken = np.asarray(kept.index[i])[np.asarray(kept.mask[i])]
    rest = np.setdiff1d(np.arange(N), taken)
    fused = np.asarray(weight[i])[rest] @ np.asarray(x[i])[rest]
    np.testing.assert_allclose(got[i, 4], fused, atol=1e-5)
  np.testing.assert_array_equal(plan.share.sum(axis=1), mask)


def test_merging_is_the_mean():
  x, _, _, _, size = arrays()
  slot = jnp.asarray(np.random.default_rng(1).integers(0, 4, (30, N)))
  plan = tt.merging_transform(slot, 3, size)
  got = plans.apply_plan(plan, x, 3)
  for i in range(30):
    for k in range(3):
      members = np.flatnonzero(np.asarray(slot[i]) == k)
      want = np.zeros(4)
      if len(members):
        want = np.average(x[i, members], axis=0, weights=size[i, members])
      np.testing.assert_allclose(got[i, k], want, atol=1e-5)


def test_pooling_is_the_mean_of_windows():
  x = np.random.default_rng(0).normal(size=(4, 6, 3))
  plan = tt.pooling_transform((4, 6), (2, 3))
  got = plans.apply_plan(plan, jnp.asarray(x, jnp.float32).reshape(24, 3), 4)
  want = x.reshape(2, 2, 2, 3, 3).mean(axis=(1, 3)).reshape(4, 3)
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_recycling_worked_example():
  x = jnp.array([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [4.0, 0.0], [7.0, 7.0]])
  importance = jnp.array([0.1, 0.3, 0.2, 0.4, 0.9])
  kept = packing.keep_top_k(importance, 1)
  cell = jnp.array([0, 0, 0, 0, 1])
  plan = tt.recycling_transform(kept, cell, importance, 3)
  got = plans.apply_plan(plan, x, 4)
  want = [[7, 7], [2.1, 0.7], [0, 0], [0, 0]]
  np.testing.assert_allclose(got, want, atol=1e-6)
  assert plan.share.sum(axis=0).tolist() == [1] * 5


def test_reductions_compose():
  x, metric, score, *_ = arrays()
  one = transform(x, metric, score, num_keep=6)
  two = transform(
    one.tokens, one.tokens, score[:, :6], size=one.size, num_keep=3
  )
  both = plans.compose_plans(two.plan, one.plan, 3)
  np.testing.assert_allclose(
    plans.apply_plan(both, x, 3), two.tokens, atol=1e-5
  )
  np.testing.assert_allclose(
    plans.restore_plan(both, two.tokens),
    one.restore(two.restore(two.tokens, 6), N),
    atol=1e-5,
  )
  np.testing.assert_allclose(two.size.sum(axis=1), N, rtol=1e-5)


@pytest.mark.unchecked
def test_errors():
  x, metric, score, mask, size = arrays(batch=2)
  with pytest.raises(ValueError, match="num_keep must lie in 1..10, got 11"):
    tt.token_transforming(x, metric, score, num_keep=11)
  with pytest.raises(ValueError, match="num_protected must lie in 0..3"):
    tt.token_transforming(x, metric, score, num_keep=3, num_protected=4)
  with pytest.raises(ValueError, match="num_sources must lie in 1..10"):
    tt.token_transforming(x, metric, score, num_keep=3, num_sources=0)
  with pytest.raises(ValueError, match="metric=10, score=9"):
    tt.token_transforming(x, metric, score[:, 1:], mask, size, num_keep=3)
  with pytest.raises(ValueError, match="grid_columns must be a multiple of 4"):
    tt.pooling_transform((4, 6), (2, 4))
  kept = packing.keep_top_k(score, 2)
  with pytest.raises(ValueError, match="num_tokens=10, weight=9"):
    tt.pruning_transform(kept, 10, score[:, 1:])
  with pytest.raises(ValueError, match="cell=10, importance=9"):
    tt.recycling_transform(kept, jnp.zeros((2, 10), jnp.int32), score[:, 1:], 3)

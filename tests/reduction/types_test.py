import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.ops import plans
from tokjax.reduction import types


def features(batch=2, n=6, dim=3):
  x = np.random.default_rng(0).normal(size=(batch, n, dim))
  return jnp.asarray(x, jnp.float32)


PICKS = jnp.array([[4, 1, 3], [5, 0, 2]])
COUNTS = jnp.array([[True, False, True], [True, True, True]])


def test_selected_sorts_and_masks():
  x = features()
  out = types.selected(x, PICKS, COUNTS)
  assert out.index.tolist() == [[3, 4, 5], [0, 2, 5]]
  assert out.mask.tolist() == [[True, True, False], [True, True, True]]
  assert out.size.tolist() == [[1, 1, 0], [1, 1, 1]]
  assert out.plan is None and out.index.dtype == jnp.int32
  np.testing.assert_array_equal(out.tokens[0, :2], x[0, jnp.array([3, 4])])
  np.testing.assert_array_equal(out.tokens[1], x[1, jnp.array([0, 2, 5])])
  assert not np.any(out.tokens[0, 2])


@pytest.mark.parametrize("num_keep", [1, 4, 6])
def test_highest_equals_a_sort(num_keep):
  random = np.random.default_rng(0)
  x, scores = features(300), random.integers(0, 4, (300, 6)) / 4
  mask = random.random((300, 6)) < 0.7
  mask[0] = False
  out = jax.device_get(
    types.highest(
      jnp.where(mask[..., None], x, jnp.nan),
      jnp.asarray(np.where(mask, scores, np.nan), jnp.float32),
      jnp.asarray(mask),
      num_keep=num_keep,
      positions="renumber",
    )
  )
  for b in range(300):
    order = sorted(np.flatnonzero(mask[b]), key=lambda n: (-scores[b, n], n))
    want = sorted(order[:num_keep])
    assert out.index[b][out.mask[b]].tolist() == want
    np.testing.assert_array_equal(out.tokens[b, : len(want)], x[b, want])
    assert not out.tokens[b, len(want) :].any()
  np.testing.assert_array_equal(out.position_ids[1], np.arange(num_keep))
  unmasked = types.highest(x, jnp.ones((300, 6)), num_keep=num_keep)
  np.testing.assert_array_equal(unmasked.index[0], np.arange(num_keep))


def test_positions():
  out = types.selected(features(), PICKS, positions="renumber")
  assert out.position_ids.tolist() == [[0, 1, 2], [0, 1, 2]]
  out = types.selected(features(), PICKS)
  assert out.position_ids.tolist() == out.index.tolist()
  assert types.positions(jnp.array([7, 9]), "keep").tolist() == [7, 9]


def test_a_selection_passes_gradient_to_what_is_kept():
  def total(x):
    return jnp.sum(types.selected(x, PICKS, COUNTS).tokens)

  gradient = jax.grad(total)(features())
  want = np.zeros((2, 6))
  want[0, [3, 4]] = want[1, [0, 2, 5]] = 1
  np.testing.assert_array_equal(
    gradient, np.broadcast_to(want[..., None], gradient.shape)
  )


def test_nan_in_what_is_not_kept_stays_outside():
  x = features().at[0, 5].set(jnp.nan)  # where masked rows point to
  out = types.selected(x, PICKS, COUNTS)
  assert np.isfinite(out.tokens).all()
  gradient = jax.grad(
    lambda x: jnp.sum(types.selected(x, PICKS, COUNTS).tokens ** 2)
  )(x)
  assert np.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool"])
@pytest.mark.parametrize("width", [(), (2,), (2, 3)])
def test_a_selection_applies_to_any_stream(dtype, width):
  out = types.selected(features(), PICKS, COUNTS)
  stream = np.random.default_rng(1).integers(0, 2, (2, 6, *width))
  stream = jnp.asarray(stream, dtype)
  got = out.apply(stream)
  assert got.dtype == stream.dtype and got.shape == (2, 3, *width)
  for b in range(2):
    for k in range(3):
      want = stream[b, out.index[b, k]] if out.mask[b, k] else 0
      np.testing.assert_array_equal(np.asarray(got[b, k]), np.asarray(want))


def test_restore_puts_rows_back():
  out = types.selected(features(), PICKS, COUNTS)
  rows = jnp.arange(12.0).reshape(2, 3, 2) + 1
  back = out.restore(rows, 6)
  want = np.zeros((2, 6, 2))
  want[0, [3, 4]] = rows[0, :2]
  want[1, [0, 2, 5]] = rows[1]
  np.testing.assert_array_equal(back, want)


PLAN = plans.Merge(
  jnp.array([[0, 0, 1, 3, 1, 3], [2, 1, 0, 1, 2, 2]]),
  jnp.array([[0.25, 0.75, 1, 9, 2, 9], [1, 1, 1, 1, 1, 1]]),
)
ANCHOR = jnp.array([[1, 2, 5], [2, 1, 0]])
EXISTS = jnp.array([[True, True, False], [True, True, True]])


@pytest.mark.parametrize("matrix", [False, True])
def test_fused_follows_the_plan(matrix):
  plan = plans.to_transform(PLAN, 3) if matrix else PLAN
  x, size = features(), jnp.arange(12.0).reshape(2, 6)
  out = types.fused(x, plan, ANCHOR, EXISTS, size=size)
  want = [
    [0.25 * x[0, 0] + 0.75 * x[0, 1], x[0, 2] + 2 * x[0, 4], 0 * x[0, 0]],
    [x[1, 2], x[1, 1] + x[1, 3], x[1, 0] + x[1, 4] + x[1, 5]],
  ]
  np.testing.assert_allclose(out.tokens, want, atol=1e-6)
  assert out.size.tolist() == [[1, 6, 0], [8, 16, 27]]
  assert out.index.tolist() == ANCHOR.tolist()
  assert out.position_ids.tolist() == ANCHOR.tolist()
  ones = types.fused(x, plan, ANCHOR, EXISTS, positions="renumber")
  assert ones.size.tolist() == [[2, 2, 0], [1, 2, 3]]
  assert ones.position_ids.tolist() == [[0, 1, 2], [0, 1, 2]]
  np.testing.assert_allclose(out.apply(x), out.tokens, atol=1e-6)
  rows = jnp.arange(6.0).reshape(2, 3, 1) + 1
  back = out.restore(rows, 6)[..., 0]
  assert back.tolist() == [[1, 1, 2, 0, 2, 0], [6, 5, 4, 5, 6, 6]]


def test_fused_without_mask_has_all_outputs():
  out = types.fused(features(), PLAN, ANCHOR)
  assert out.mask.all()


def test_masked_rows_do_not_come_back():
  out = types.fused(features(), PLAN, ANCHOR, EXISTS)
  rows = jnp.ones((2, 3, 1)).at[0, 2].set(jnp.nan)
  assert np.isfinite(out.restore(rows, 6)).all()
  kept = types.selected(features(), PICKS, COUNTS)
  assert np.isfinite(kept.restore(rows, 6)).all()


def test_the_result_is_a_pytree_under_vmap():
  x = features()
  want = types.selected(x, PICKS, COUNTS)
  got = jax.vmap(types.selected)(x, PICKS, COUNTS)
  jax.tree.map(np.testing.assert_array_equal, got, want)
  want = types.fused(x, PLAN, ANCHOR, EXISTS)
  got = jax.vmap(types.fused)(x, PLAN, ANCHOR, EXISTS)
  jax.tree.map(np.testing.assert_allclose, got, want)


@pytest.mark.unchecked
def test_errors():
  with pytest.raises(ValueError, match="positions must be one of 'keep'"):
    types.selected(features(), PICKS, positions="compact")
  x, scores = features(), jnp.ones((2, 6))
  with pytest.raises(ValueError, match="features_tokens=6, scores_tokens=5"):
    types.highest(x, scores[:, 1:], num_keep=2)
  with pytest.raises(ValueError, match="features_tokens=6, mask_tokens=5"):
    types.highest(x, scores, scores[:, 1:] > 0, num_keep=2)
  with pytest.raises(ValueError, match="num_keep must lie in 1..6, got 7"):
    types.highest(x, scores, num_keep=7)

"""The controls: random, uniform, pooled, down-sampled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import compiled
from tokjax.reduction import controls

controls = compiled(controls)


def case(seed, batch=200, tokens=12, width=3):
  rng = np.random.default_rng(seed)
  features = rng.normal(size=(batch, tokens, width)).astype(np.float32)
  mask = rng.random((batch, tokens)) < 0.7
  mask[0], mask[1] = False, True
  return np.where(mask[..., None], features, np.float32(np.nan)), mask


@pytest.mark.parametrize("num_keep", [1, 5, 12])
def test_random_tokens_are_valid_ascending_and_enough(num_keep):
  features, mask = case(0)
  got = controls.random_keep(
    jax.random.key(0),
    jnp.asarray(features),
    jnp.asarray(mask),
    num_keep=num_keep,
  )
  for b, (row, valid) in enumerate(zip(features, mask, strict=True)):
    count = min(num_keep, valid.sum())
    np.testing.assert_array_equal(got.mask[b], np.arange(num_keep) < count)
    index = np.asarray(got.index[b, :count])
    assert (np.diff(index) > 0).all() and valid[index].all()
    np.testing.assert_array_equal(got.tokens[b, :count], row[index])


def test_random_is_fair_and_follows_the_key():
  features = jnp.ones((4000, 6, 1))
  keep = jax.jit(
    lambda key: controls.random_keep(key, features, num_keep=2).index
  )
  first = keep(jax.random.key(1))
  pairs, counts = np.unique(np.asarray(first), axis=0, return_counts=True)
  assert len(pairs) == 15
  # 4,000 draws of 15 pairs: chi-square with 14 degrees of freedom, 36 is
  # exceeded once in a thousand.
  assert ((counts - 4000 / 15) ** 2 / (4000 / 15)).sum() < 36
  np.testing.assert_array_equal(first, keep(jax.random.key(1)))
  assert (np.asarray(first) != np.asarray(keep(jax.random.key(2)))).any()


@pytest.mark.parametrize("num_keep", [1, 4, 7, 12])
def test_uniform_equals_a_loop(num_keep):
  features, mask = case(1)
  got = controls.uniform_keep(
    jnp.asarray(features), jnp.asarray(mask), num_keep=num_keep
  )
  for b, valid in enumerate(mask):
    places = np.flatnonzero(valid)
    n = len(places)
    want = list(places)
    if n >= num_keep:
      middles = [(i + 0.5) * n / num_keep for i in range(num_keep)]
      want = [places[int(np.floor(m + 1e-9))] for m in middles]
    np.testing.assert_array_equal(got.index[b, : len(want)], want)
    np.testing.assert_array_equal(got.mask[b], np.arange(num_keep) < len(want))
    np.testing.assert_array_equal(got.tokens[b, : len(want)], features[b, want])


def test_uniform_by_hand():
  x = jnp.arange(12.0).reshape(1, 12, 1)
  assert controls.uniform_keep(x, num_keep=4).index.tolist() == [[1, 4, 7, 10]]
  assert controls.uniform_keep(x, num_keep=1).index.tolist() == [[6]]
  whole = controls.uniform_keep(x, num_keep=12)
  np.testing.assert_array_equal(whole.tokens, x)


@pytest.mark.parametrize(
  "num_keep, cells", [(1, (1, 1)), (6, (2, 3)), (4, (2, 2)), (20, (4, 5))]
)
def test_pooling_equals_a_loop(num_keep, cells):
  grid = (4, 5)
  features, mask = case(2, batch=50, tokens=20)
  got = controls.pool_keep(
    jnp.asarray(features), jnp.asarray(mask), num_keep=num_keep, grid=grid
  )
  assert controls.pooled_grid(num_keep, grid) == cells
  for b, k in np.ndindex(50, num_keep):
    members = [
      j
      for j in range(20)
      if mask[b, j]
      and (j // 5 * cells[0] // 4) * cells[1] + j % 5 * cells[1] // 5 == k
    ]
    assert bool(got.mask[b, k]) == bool(members)
    assert float(got.size[b, k]) == pytest.approx(len(members), abs=1e-5)
    if members:
      np.testing.assert_allclose(
        got.tokens[b, k], features[b, members].mean(axis=0), atol=1e-6
      )
      assert int(got.index[b, k]) == members[0]
    else:
      np.testing.assert_array_equal(got.tokens[b, k], 0)


def test_pooled_tokens_spread_back():
  x = jnp.arange(16.0).reshape(1, 16, 1)
  pooled = controls.pool_keep(x, num_keep=4, grid=(4, 4))
  assert pooled.tokens[0, :, 0].tolist() == [2.5, 4.5, 10.5, 12.5]
  back = pooled.restore(pooled.tokens, 16)[0, :, 0].reshape(4, 4)
  np.testing.assert_array_equal(back[:2, 2:], 4.5)
  np.testing.assert_array_equal(back[2:, :2], 10.5)


def test_gradients_reach_kept_tokens():
  features, mask = map(jnp.asarray, case(3, batch=8))
  features = jnp.nan_to_num(features)

  def total(features, keep, **settings):
    return jnp.sum(keep(features, mask, **settings).tokens)

  kept = jnp.minimum(mask.sum(axis=1), 4)
  gradient = jax.grad(total)(features, controls.uniform_keep, num_keep=4)
  np.testing.assert_array_equal(gradient.sum(axis=(1, 2)), 3 * kept)
  gradient = jax.grad(total)(
    features, controls.pool_keep, num_keep=4, grid=(3, 4)
  )
  np.testing.assert_array_equal(gradient[0], jnp.zeros_like(gradient[0]))
  np.testing.assert_allclose(gradient[1].sum(), 3 * 4, rtol=1e-5)


@pytest.mark.parametrize(
  "num_keep, grid, cells",
  [
    (64, (24, 24), (8, 8)),
    (192, (24, 24), (12, 16)),
    (128, (24, 24), (8, 16)),
    (12, (4, 12), (2, 6)),
    (7, (24, 24), (1, 7)),
  ],
)
def test_pooled_grid_is_closest_in_shape(num_keep, grid, cells):
  assert controls.pooled_grid(num_keep, grid) == cells


def test_no_grid_has_so_many_cells():
  with pytest.raises(ValueError, match="num_keep=29 cells must form a grid"):
    controls.pooled_grid(29, (24, 24))


def test_downsample_averages_pixels():
  rng = np.random.default_rng(0)
  image = jnp.asarray(rng.random((2, 48, 48, 3)), jnp.float32)
  small = controls.downsample(image, num_keep=4, patch_size=12)
  assert small.shape == (2, 24, 24, 3) and small.dtype == image.dtype
  # A triangle over four pixels: weights 1, 3, 3, 1 eighths, both ways.
  weights = np.array([1, 3, 3, 1]) / 8
  patch = np.asarray(image)[0, 9:13, 19:23]
  want = np.einsum("i,j,ijc->c", weights, weights, patch)
  np.testing.assert_allclose(small[0, 5, 10], want, rtol=1e-5)
  flat = controls.downsample(jnp.ones((1, 48, 48, 1)), num_keep=9, patch_size=8)
  np.testing.assert_allclose(flat, jnp.ones((1, 24, 24, 1)), rtol=1e-5)
  same = controls.downsample(image, num_keep=16, patch_size=12)
  np.testing.assert_array_equal(same, image)


@pytest.mark.unchecked
def test_errors_name_the_argument():
  features, mask = map(jnp.asarray, case(0, batch=2))
  message = "features_tokens=12, mask_tokens=11"
  with pytest.raises(ValueError, match=message):
    controls.uniform_keep(features, mask[:, 1:], num_keep=3)
  with pytest.raises(ValueError, match=message):
    controls.random_keep(jax.random.key(0), features, mask[:, 1:], num_keep=3)
  with pytest.raises(ValueError, match="num_keep must lie in 1..12, got 13"):
    controls.uniform_keep(features, num_keep=13)
  with pytest.raises(ValueError, match="features_tokens=12, grid_cells=9"):
    controls.pool_keep(features, num_keep=3, grid=(3, 3))
  with pytest.raises(ValueError, match="image_rows must be a multiple of 14"):
    controls.downsample(jnp.ones((1, 30, 28, 3)), num_keep=1, patch_size=14)

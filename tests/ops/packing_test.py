import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import compiled
from tokjax.ops import packing

packing = compiled(packing)


def cases(seed, count=1000, n=9):
  """Scores with ties and odd values, masks from empty to full."""
  random = np.random.default_rng(seed)
  scores = random.integers(-2, 3, (count, n)).astype(np.float32)
  odd = random.random((count, n))
  scores[odd < 0.05] = np.inf
  scores[(0.05 <= odd) & (odd < 0.1)] = -np.inf
  scores[(0.1 <= odd) & (odd < 0.15)] = np.nan
  scores[(0.15 <= odd) & (odd < 0.2)] = -0.0
  mask = random.random((count, n)) < random.random((count, 1))
  mask[0], mask[1] = False, True
  return scores, mask


def key(score):
  """Higher is better; NaN and -inf are equally bad."""
  return -1e30 if np.isnan(score) or score == -np.inf else score


def oracle(scores, mask, num_keep):
  valid = [n for n in range(len(scores)) if mask[n]]
  best = sorted(valid, key=lambda n: (-key(scores[n]), n))[:num_keep]
  rows = sorted(best) + [len(scores) - 1] * (num_keep - len(best))
  return rows, len(best), max(len(valid) - num_keep, 0)


@pytest.mark.parametrize("num_keep", [1, 4, 9])
def test_keep_top_k_equals_a_loop(num_keep):
  scores, mask = cases(0)
  got = jax.jit(packing.keep_top_k, static_argnums=1)(scores, num_keep, mask)
  got = jax.device_get(got)
  for i in range(len(scores)):
    index, count, overflow = oracle(scores[i], mask[i], num_keep)
    np.testing.assert_array_equal(got.index[i], index)
    np.testing.assert_array_equal(got.mask[i], np.arange(num_keep) < count)
    assert got.overflow[i] == overflow


@pytest.mark.parametrize("capacity", [1, 4, 9])
def test_pack_without_scores_keeps_the_first(capacity):
  _, keep = cases(1)
  got = jax.jit(packing.pack, static_argnums=1)(keep, capacity)
  got = jax.device_get(got)
  for i in range(len(keep)):
    index, count, overflow = oracle(np.zeros(9), keep[i], capacity)
    np.testing.assert_array_equal(got.index[i], index)
    np.testing.assert_array_equal(got.mask[i], np.arange(capacity) < count)
    assert got.overflow[i] == overflow


def test_pack_drops_the_lowest_scores():
  keep = jnp.array([True, True, False, True, True])
  scores = jnp.array([0.4, 0.1, 0.9, 0.3, 0.1])
  kept = packing.pack(keep, 3, scores)
  assert kept.index.tolist() == [0, 1, 3]  # of the two 0.1 the last one goes
  assert int(kept.overflow) == 1
  assert packing.pack(keep, 3).index.tolist() == [0, 1, 3]
  assert packing.pack(keep, 2).index.tolist() == [0, 1]


def test_masked_scores_have_no_influence():
  scores, mask = cases(2, count=50)
  poisoned = jnp.asarray(np.where(mask, scores, np.nan))
  scores, mask = jnp.asarray(scores), jnp.asarray(mask)
  for want, got in zip(
    packing.keep_top_k(scores, 4, mask),
    packing.keep_top_k(poisoned, 4, mask),
    strict=True,
  ):
    np.testing.assert_array_equal(got, want)


def test_axes_and_dtypes():
  scores = jnp.arange(24, dtype=jnp.bfloat16).reshape(2, 3, 4)
  kept = packing.keep_top_k(scores, 2)
  assert kept.index.shape == kept.mask.shape == (2, 3, 2)
  assert kept.overflow.shape == (2, 3)
  assert kept.index.dtype == kept.overflow.dtype == jnp.int32
  assert (kept.index == jnp.array([2, 3])[None, None]).all()
  one = packing.keep_top_k(scores[0, 0], 4)
  assert one.index.tolist() == [0, 1, 2, 3] and int(one.overflow) == 0


def test_no_gradient_flows_into_scores():
  x, scores = jnp.arange(4.0), jnp.array([0.3, 0.1, 0.2, 0.0])
  gradient = jax.grad(
    lambda s: jnp.sum(x[packing.keep_top_k(s, 2).index] * s.shape[0])
  )(scores)
  assert not np.any(gradient)


@pytest.mark.unchecked
def test_errors():
  scores = jnp.ones((2, 5))
  with pytest.raises(ValueError, match="num_keep must lie in 1..5, got 6"):
    packing.keep_top_k(scores, 6)
  with pytest.raises(ValueError, match="scores=5, mask=4"):
    packing.keep_top_k(scores, 2, jnp.ones((2, 4), bool))
  with pytest.raises(ValueError, match="capacity must lie in 1..5, got 0"):
    packing.pack(scores > 0, 0)
  with pytest.raises(ValueError, match="keep=5, scores=3"):
    packing.pack(scores > 0, 2, jnp.ones((2, 3)))

import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import run
from tokjax.ops import distances


def tokens(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_equals_a_loop(metric):
  x = tokens(0, 3, 9, 5)
  got = np.asarray(run(distances.pairwise_distances, x, metric=metric))
  for b, rows in enumerate(x.astype(np.float64)):
    for i, p in enumerate(rows):
      for j, q in enumerate(rows):
        if metric == "euclidean":
          want = np.linalg.norm(p - q)
        else:
          want = 1 - p @ q / np.linalg.norm(p) / np.linalg.norm(q)
        assert abs(got[b, i, j] - want) < 1e-5
  np.testing.assert_array_equal(got, got.swapaxes(1, 2))
  assert not np.diagonal(got, axis1=1, axis2=2).any()


def test_whole_numbers_are_exact_and_far_ones_keep_their_digits():
  x = np.random.default_rng(0).integers(-9, 9, (20, 1)).astype(np.float32)
  got = run(distances.pairwise_distances, jnp.asarray(x))
  np.testing.assert_array_equal(got, np.abs(x - x.T))
  far = run(distances.pairwise_distances, jnp.asarray(x + 100_000))
  np.testing.assert_array_equal(far, got)


def test_masked_tokens_have_no_influence():
  x, mask = tokens(1, 7, 3), np.arange(7) % 3 > 0  # the first one is masked
  poisoned = np.where(mask[:, None], x, np.nan)
  got = np.asarray(
    run(distances.pairwise_distances, poisoned, jnp.asarray(mask))
  )
  want = np.asarray(run(distances.pairwise_distances, x[mask]))
  np.testing.assert_allclose(got[mask][:, mask], want, atol=1e-6)
  assert np.isfinite(got).all()


@pytest.mark.unchecked
def test_errors():
  x = jnp.ones((4, 2))
  with pytest.raises(ValueError, match="x_tokens=4, mask_tokens=3"):
    distances.pairwise_distances(x, jnp.ones(3, bool))
  with pytest.raises(ValueError, match="metric must be one of"):
    distances.pairwise_distances(x, metric="manhattan")

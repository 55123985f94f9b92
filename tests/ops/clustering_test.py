import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from tests.compiled import compiled
from tokjax.ops import clustering

clustering = compiled(clustering)


def points(seed=0, n=50, dim=5):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=(n, dim)), jnp.float32)


@pytest.mark.parametrize("metric", ["euclidean", "inner"])
@pytest.mark.parametrize("block_size", [1, 7, 64])
def test_assign_equals_a_loop(metric, block_size):
  x, centroids = points(0), points(1, n=9)
  got = clustering.assign(x, centroids, metric=metric, block_size=block_size)
  for i, p in enumerate(np.asarray(x)):
    if metric == "inner":
      want = np.argmax([p @ c for c in np.asarray(centroids)])
    else:
      want = np.argmin([np.sum((p - c) ** 2) for c in np.asarray(centroids)])
    assert int(got[i]) == want


def test_assign_over_many_blocks_of_centroids():
  x, centroids = points(0, n=20, dim=3), points(1, n=9000, dim=3)
  distance = np.square(np.asarray(x)[:, None] - np.asarray(centroids)).sum(-1)
  got = clustering.assign(x, centroids)
  np.testing.assert_array_equal(got, distance.argmin(axis=1))
  # The same centroid in a later block loses the tie.
  got = clustering.assign(x, jnp.concatenate([centroids, centroids]))
  np.testing.assert_array_equal(got, distance.argmin(axis=1))


def lloyd(x, start, num_iterations):
  centroids = np.array(start)
  for _ in range(num_iterations):
    nearest = [np.argmin(((p - centroids) ** 2).sum(axis=1)) for p in x]
    for k in range(len(centroids)):
      members = [p for p, n in zip(x, nearest, strict=True) if n == k]
      if members:
        centroids[k] = np.mean(members, axis=0)
  return centroids


def test_kmeans_with_every_point_a_centroid_finds_the_points():
  x = points(n=12)
  found = clustering.kmeans(jax.random.key(0), x, num_clusters=12)
  np.testing.assert_allclose(
    np.sort(found.centroids, axis=0), np.sort(x, axis=0), atol=1e-6
  )
  np.testing.assert_array_equal(found.counts, np.ones(12))


def test_kmeans_steps_are_lloyds():
  x = points(n=60, dim=3)
  once, more = (
    clustering.kmeans(
      jax.random.key(3), x, num_clusters=7, num_iterations=steps
    )
    for steps in (1, 5)
  )
  want = lloyd(np.asarray(x), np.asarray(once.centroids), 4)
  np.testing.assert_allclose(more.centroids, want, atol=1e-5)
  assert int(more.counts.sum()) == 60


def test_kmeans_ignores_masked_points():
  x = points(n=40)
  mask = jnp.arange(40) % 3 > 0
  poisoned = jnp.where(mask[:, None], x, jnp.nan)
  want, got = (
    clustering.kmeans(jax.random.key(0), p, num_clusters=4, mask=mask)
    for p in (x, poisoned)
  )
  np.testing.assert_array_equal(got.centroids, want.centroids)
  assert int(got.counts.sum()) == int(mask.sum())


def test_kmeans_with_few_valid_points():
  x = points(n=10)
  mask = jnp.arange(10) < 3
  found = clustering.kmeans(jax.random.key(0), x, num_clusters=6, mask=mask)
  assert int((found.counts > 0).sum()) == 3
  np.testing.assert_allclose(
    np.sort(found.centroids[:3], axis=0), np.sort(x[:3], axis=0), atol=1e-6
  )
  none = clustering.kmeans(
    jax.random.key(0), x, num_clusters=6, mask=jnp.zeros(10, bool)
  )
  assert not np.any(none.counts) and np.isfinite(none.centroids).all()


def test_spherical_kmeans_has_unit_centroids():
  found = clustering.kmeans(
    jax.random.key(0), points(), num_clusters=6, spherical=True
  )
  length = np.linalg.norm(found.centroids, axis=1)
  np.testing.assert_allclose(length, 1, atol=1e-6)


X = jnp.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-0.6, 0.8]])


def test_masked_kmeans_worked_example():
  found = clustering.masked_kmeans(
    X[None], jnp.ones((1, 4), bool), num_clusters=2
  )
  want = [[0.9, 0.3], [-0.3, 0.9]]
  np.testing.assert_allclose(found.means[0], want, atol=1e-6)
  np.testing.assert_array_equal(found.assignment[0], [0, 0, 1, 1])
  np.testing.assert_array_equal(found.counts[0], [2, 2])


def test_masked_kmeans_gradient_is_one_over_count():
  mask = jnp.array([[True, True, True, False]])

  def means(x):
    return clustering.masked_kmeans(x[None], mask, num_clusters=2).means[0]

  x = X.at[3].set(jnp.nan)
  jacobian = jax.jacobian(means)(x)  # [K, D, N, D]
  assignment = clustering.masked_kmeans(x[None], mask, num_clusters=2)
  for k in range(2):
    for n in range(4):
      member = int(assignment.assignment[0, n]) == k
      want = np.eye(2) * member / int(assignment.counts[0, k])
      np.testing.assert_allclose(jacobian[k, :, n], want, atol=1e-6)
  check_grads(jax.jit(means), (X,), order=1, modes=["rev"], eps=1e-3)


def test_masked_kmeans_short_sequences_stay():
  x = jnp.stack([X, jnp.repeat(X[:1], 4, axis=0)])  # the second: equal tokens
  found = clustering.masked_kmeans(x, jnp.ones((2, 4), bool), num_clusters=4)
  np.testing.assert_array_equal(found.means, x)
  np.testing.assert_array_equal(found.counts, np.ones((2, 4)))


def test_masked_kmeans_limit_mask_and_batch():
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(4, 10, 3)), jnp.float32)
  mask = jnp.asarray(rng.random((4, 10)) < 0.8).at[3].set(False)
  limit = jnp.array([1, 3, 2, 2])
  found = clustering.masked_kmeans(x, mask, limit, num_clusters=5)
  np.testing.assert_array_equal(found.mask.sum(axis=1), [1, 3, 2, 0])
  np.testing.assert_array_equal(found.counts.sum(axis=1), mask.sum(axis=1))
  np.testing.assert_array_equal(found.assignment == -1, ~mask)
  assert not np.any(np.asarray(found.means)[~np.asarray(found.mask)])
  np.testing.assert_allclose(
    found.means[0, 0], np.asarray(x[0])[np.asarray(mask[0])].mean(0), atol=1e-6
  )
  poisoned = jnp.where(mask[..., None], x, jnp.nan)
  again = clustering.masked_kmeans(poisoned, mask, limit, num_clusters=5)
  np.testing.assert_array_equal(again.means, found.means)
  for i in range(4):
    one = clustering.masked_kmeans(
      x[i : i + 1], mask[i : i + 1], limit[i : i + 1], num_clusters=5
    )
    np.testing.assert_allclose(one.means[0], found.means[i], atol=1e-6)


def test_masked_kmeans_random_start_is_a_fixed_point():
  x = points(n=30, dim=2)[None]
  mask = jnp.ones((1, 30), bool)
  found = clustering.masked_kmeans(
    x, mask, num_clusters=4, num_iterations=30, key=jax.random.key(0)
  )
  nearest = clustering.assign(x[0], found.means[0])
  np.testing.assert_array_equal(nearest, found.assignment[0])


@pytest.mark.unchecked
def test_errors():
  x = points()
  with pytest.raises(
    ValueError, match="num_clusters must lie in 1..50, got 51"
  ):
    clustering.kmeans(jax.random.key(0), x, num_clusters=51)
  with pytest.raises(ValueError, match="points=50, mask=4"):
    clustering.kmeans(
      jax.random.key(0), x, num_clusters=5, mask=jnp.ones(4, bool)
    )
  with pytest.raises(ValueError, match="points_width=5, centroids_width=4"):
    clustering.assign(x, x[:, :4])
  with pytest.raises(ValueError, match="metric must be one of"):
    clustering.assign(x, x, metric="cosine")
  with pytest.raises(ValueError, match="features_tokens=50, mask_tokens=49"):
    clustering.masked_kmeans(x[None], jnp.ones((1, 49), bool), num_clusters=2)

"""Rotated product codes: what training promises, and distances to codes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import compiled
from tokjax.ops import product_codes, quantize
from tokjax.ops.product_codes import OPQ

product_codes, quantize = compiled(product_codes), compiled(quantize)

D, GROUP, V = 6, 2, 4


def points(seed=0, n=60):
  """Correlated, so that a rotation helps."""
  random = np.random.default_rng(seed)
  mix = np.linalg.qr(random.normal(size=(D, D)))[0] * 3.0 ** -np.arange(D)
  return (random.normal(size=(n, D)) @ mix.T).astype(np.float32)


def trained(x, rotation=None):
  return product_codes.opq_train(
    jax.random.key(0), x, rotation, group_size=GROUP, num_centroids=V,
    num_iterations=8,
  )  # fmt: skip


@pytest.mark.parametrize("balanced", [False, True])
def test_training_never_gets_worse_and_beats_plain_product_codes(balanced):
  x = points()
  start = None
  if balanced:
    start = product_codes.balanced_rotation(x, num_groups=D // GROUP)
    np.testing.assert_allclose(start @ start.T, np.eye(D), atol=1e-5)
  opq = trained(x, start)
  np.testing.assert_allclose(
    opq.rotation @ opq.rotation.T, np.eye(D), atol=1e-5
  )
  assert np.all(np.diff(opq.distortion) <= 1e-6 * opq.distortion[0])
  assert opq.distortion[-1] < opq.distortion[0]
  codes = product_codes.opq_encode(opq, x)
  error = np.sum((product_codes.opq_decode(opq, codes) - x) ** 2, 1).mean()
  assert error <= opq.distortion[-1] * (1 + 1e-5)
  key = jax.random.key(0)
  book = quantize.pq_train(key, x, group_size=GROUP, num_centroids=V)
  decoded = quantize.pq_decode(book, quantize.pq_encode(book, x))
  assert error < 0.9 * np.sum((decoded - x) ** 2, 1).mean()


def test_an_iteration_equals_a_loop():
  x = points()
  one = product_codes.opq_train(
    jax.random.key(0), x, group_size=GROUP, num_centroids=V, num_iterations=1
  )
  book = np.array(
    quantize.pq_train(jax.random.key(0), x, group_size=GROUP, num_centroids=V)
  )
  codes, decoded = np.asarray(quantize.pq_encode(book, x)), np.zeros((60, D))
  for g in range(D // GROUP):
    part = x[:, GROUP * g : GROUP * (g + 1)].astype(float)
    for v in range(V):
      if np.any(codes[:, g] == v):
        book[g, v] = part[codes[:, g] == v].mean(0)
    decoded[:, GROUP * g : GROUP * (g + 1)] = book[g, codes[:, g]]
  u, _, vt = np.linalg.svd(decoded.T @ x.astype(float))
  np.testing.assert_allclose(one.codebook, book, atol=1e-5)
  np.testing.assert_allclose(one.rotation, u @ vt, atol=1e-4)
  left = x @ (u @ vt).T - decoded
  np.testing.assert_allclose(one.distortion, [np.sum(left**2, 1).mean()], 1e-4)


def test_variances_are_balanced():
  """Products of 16, 9, 4 and 1 in two groups: 16 * 1 and 9 * 4."""
  scale = np.sqrt([1.0, 4.0, 9.0, 16.0])
  x = np.concatenate([np.diag(scale), -np.diag(scale)]).astype(np.float32)
  got = product_codes.balanced_rotation(x, num_groups=2)
  np.testing.assert_allclose(
    np.abs(got), np.eye(4)[[3, 0, 2, 1]], atol=1e-5
  )  # the widest first, then by room


def test_product_codes_are_the_nearest_of_all_pairs():
  x = points()
  opq = trained(x)
  rotated = np.asarray(product_codes.opq_rotate(opq, x), float)
  np.testing.assert_allclose(rotated, x @ np.asarray(opq.rotation).T, atol=1e-5)
  paths = np.array(list(itertools.product(range(V), repeat=D // GROUP)))
  cartesian = np.concatenate(
    [np.asarray(opq.codebook)[g, paths[:, g]] for g in range(D // GROUP)], 1
  )
  distance = np.sum((rotated[:, None] - cartesian[None]) ** 2, -1)
  want = paths[distance.argmin(1)]
  np.testing.assert_array_equal(product_codes.opq_encode(opq, x), want)
  decoded = product_codes.opq_decode(opq, want.astype(np.uint8))
  back = cartesian[distance.argmin(1)] @ np.asarray(opq.rotation)
  np.testing.assert_allclose(decoded, back, atol=1e-5)


@pytest.mark.parametrize("num_queries", [3, 20])
def test_distances_and_scores_are_those_of_decoded_vectors(num_queries):
  x, queries = points(), points(1, num_queries)
  opq = trained(x)
  codes = product_codes.opq_encode(opq, x)
  decoded = np.asarray(product_codes.opq_decode(opq, codes), float)
  turned = product_codes.opq_rotate(opq, queries)
  got = product_codes.pq_distances(opq.codebook, codes, turned, block_size=32)
  want = np.sum((queries[:, None] - decoded[None]) ** 2, -1)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  got = quantize.pq_scores(opq.codebook, codes, turned)
  np.testing.assert_allclose(got, queries @ decoded.T, rtol=1e-5, atol=1e-5)


@pytest.mark.unchecked
def test_errors():
  opq = OPQ(jnp.eye(D), jnp.zeros((3, V, GROUP)), jnp.zeros(1))
  x = jnp.ones((8, D))
  with pytest.raises(ValueError, match="x_width=5, rotation_rows=6"):
    product_codes.opq_rotate(opq, x[:, :5])
  with pytest.raises(ValueError, match="rotation_rows=5"):
    product_codes.opq_train(jax.random.key(0), x, jnp.eye(5), group_size=2)
  with pytest.raises(ValueError, match="points_width must be a multiple of 4"):
    product_codes.balanced_rotation(x, num_groups=4)
  codes = jnp.zeros((2, 3), jnp.uint8)
  with pytest.raises(ValueError, match="queries_width=5, codebook_width=6"):
    product_codes.pq_distances(opq.codebook, codes, x[:, :5])

"""Sums of codes: decoding, norms, the cross term, search."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import compiled
from tokjax.ops import additive_codes, product_codes, quantize

additive_codes = compiled(additive_codes)
quantize, product_codes = compiled(quantize), compiled(product_codes)

M, K, D = 3, 5, 4


def books(seed=0):
  random = np.random.default_rng(seed)
  return random.normal(size=(M, K, D)).astype(np.float32)


def codes(seed=1, n=50, low=-1):
  random = np.random.default_rng(seed)
  found = random.integers(low, K, (n, M)).astype(np.int32)
  found[0] = low
  return found


def parts(books, codes):
  """float64 [N, M, D], zeros for -1."""
  chosen = books.astype(float)[np.arange(M)[None], codes]
  return np.where((codes >= 0)[..., None], chosen, 0)


def test_sums_norms_and_cross_terms_equal_a_loop():
  e, k = books(), codes()
  each = parts(e, k)
  want = each.sum(1)
  got = additive_codes.aq_decode(e, k.reshape(5, 10, M))
  np.testing.assert_allclose(got, want.reshape(5, 10, D), atol=1e-6)
  norms = additive_codes.aq_squared_norms(e, k)
  np.testing.assert_allclose(norms, np.sum(want**2, 1), rtol=1e-5, atol=1e-6)
  cross = np.zeros(len(k))
  for m in range(M):
    for n in range(M):
      if m != n:
        cross += np.sum(each[:, m] * each[:, n], axis=1)
  cross = cross[np.any(k >= 0, axis=1)]  # not that of row 0
  got = additive_codes.aq_cross_term(e, k)
  np.testing.assert_allclose(got.mean, cross.mean(), rtol=1e-5)
  np.testing.assert_allclose(got.spread, cross.std(), rtol=1e-5)
  short = additive_codes.aq_squared_norms(e, k, np.float32(cross.mean()))
  wrong = np.asarray(short - norms)[np.any(k >= 0, axis=1)]
  np.testing.assert_allclose(wrong, cross.mean() - cross, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_queries", [3, 20])
@pytest.mark.parametrize("block_size", [7, 1000])
def test_search_is_among_the_decoded_vectors(num_queries, block_size):
  e, k = books(), codes()
  random = np.random.default_rng(2)
  queries = random.normal(size=(num_queries, D)).astype(np.float32)
  decoded = parts(e, k).sum(1)
  got = additive_codes.aq_scores(e, k, queries, block_size=block_size)
  np.testing.assert_allclose(got, queries @ decoded.T, rtol=1e-5, atol=1e-5)
  norms = additive_codes.aq_squared_norms(e, k)
  got = additive_codes.aq_distances(e, k, norms, queries, block_size=block_size)
  want = np.sum((queries[:, None] - decoded[None]) ** 2, -1)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_product_books_have_no_cross_term_and_the_same_meaning():
  random = np.random.default_rng(3)
  book = random.normal(size=(M, K, 2)).astype(np.float32)
  rotation = np.linalg.qr(random.normal(size=(6, 6)))[0].astype(np.float32)
  k = codes(low=0)
  wide = additive_codes.aq_from_pq(book, rotation)
  assert wide.shape == (M, K, 6)
  opq = product_codes.OPQ(rotation, book, np.zeros(1, np.float32))
  want = product_codes.opq_decode(opq, k.astype(np.uint8))
  np.testing.assert_allclose(additive_codes.aq_decode(wide, k), want, atol=1e-5)
  plain = additive_codes.aq_from_pq(book)
  want = quantize.pq_decode(book, k.astype(np.uint8))
  np.testing.assert_array_equal(additive_codes.aq_decode(plain, k), want)
  cross = additive_codes.aq_cross_term(plain, k)
  np.testing.assert_allclose([cross.mean, cross.spread], 0, atol=1e-5)


def test_nothing_counts_as_zero():
  cross = additive_codes.aq_cross_term(books(), np.full((4, M), -1))
  assert cross.mean == 0 and cross.spread == 0


@pytest.mark.unchecked
def test_errors():
  e, k = books(), codes()
  with pytest.raises(ValueError, match="codes_books=2, codebooks=3"):
    additive_codes.aq_decode(e, k[:, :2])
  with pytest.raises(ValueError, match="queries_width=3, codebooks_width=4"):
    additive_codes.aq_scores(e, k, jnp.ones((2, 3)))
  with pytest.raises(ValueError, match="codes=50, squared_norms=49"):
    additive_codes.aq_distances(e, k, jnp.ones(49), jnp.ones((2, D)))
  with pytest.raises(ValueError, match="rotation_rows=5, codebook_width=12"):
    additive_codes.aq_from_pq(e, jnp.eye(5))

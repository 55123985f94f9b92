"""Several depths of XTR from one retrieval equal a search for each."""

import jax
import numpy as np

from tokjax.benchmarks import trained_retrieval
from tokjax.retrieval import token_index, xtr


def test_rankings_of_several_depths_equal_a_search_for_each():
  random = np.random.default_rng(0)
  offsets = np.cumsum([0, *random.integers(1, 6, 12)])
  tokens = random.normal(size=(offsets[-1], 4)).astype(np.float32)
  index = token_index.build(tokens, offsets)
  queries = random.normal(size=(3, 5, 4)).astype(np.float32)
  mask = np.arange(5) < np.array([[5], [3], [1]])
  found = trained_retrieval._rankings(
    index, queries, mask, k=6, k_primes=(2, 7)
  )
  for ranking, k_prime in zip(found, (2, 7), strict=True):
    want = jax.jit(xtr.search, static_argnames=("k", "k_prime"))(
      index, queries, mask, k=6, k_prime=k_prime
    )
    np.testing.assert_array_equal(ranking.index, want.index)
    np.testing.assert_allclose(ranking.scores, want.scores, rtol=1e-6)

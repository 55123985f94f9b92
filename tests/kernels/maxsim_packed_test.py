"""Documents back to back give what padded documents give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.arrays import takes_numpy
from tokjax.kernels import maxsim as kernel
from tokjax.kernels.maxsim import EMPTY_SCORE

maxsim = takes_numpy(kernel.maxsim)
maxsim_packed = takes_numpy(kernel.maxsim_packed)

LENGTHS = (3, 1, 0, 9, 4, 0, 2)
BUDGETS = [1, 700, 2_000, 1 << 20]


def packed_and_padded(seed, padding=5):
  random = np.random.default_rng(seed)
  queries = random.standard_normal((3, 5, 6), dtype=np.float32)
  query_mask = random.random((3, 5)) < 0.7
  mask = np.arange(max(LENGTHS))[None, :] < np.array(LENGTHS)[:, None]
  documents = random.standard_normal((*mask.shape, 6), dtype=np.float32)
  documents[~mask] = np.nan
  tokens = np.concatenate(
    [documents[mask], np.full((padding, 6), np.nan, np.float32)]
  )
  ids = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
  past = len(LENGTHS) + np.arange(padding)
  ids = np.concatenate([ids, past]).astype(np.int32)
  return (queries, tokens, ids, query_mask), (documents, mask)


def score(*arrays, **settings):
  return maxsim_packed(*arrays, num_documents=len(LENGTHS), **settings)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("mean", [False, True])
def test_equals_padded(budget, mean):
  packed, (documents, mask) = packed_and_padded(0)
  got = score(*packed, mean=mean, memory_budget_bytes=budget)
  want = maxsim(
    packed[0],
    documents,
    packed[3],
    mask,
    mean=mean,
    implementation="reference",
  )
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(got[:, 2], EMPTY_SCORE)


@pytest.mark.parametrize("budget", BUDGETS)
def test_gradient_equals_padded(budget):
  packed, (documents, mask) = packed_and_padded(1)
  queries, tokens, ids, query_mask = map(jnp.asarray, packed)
  g = jnp.asarray(np.random.default_rng(2).standard_normal((3, len(LENGTHS))))
  _, pull = jax.vjp(
    lambda q, t: score(q, t, ids, query_mask, memory_budget_bytes=budget),
    queries,
    tokens,
  )
  got = pull(g)
  _, pull = jax.vjp(
    lambda q, d: maxsim(
      q, d, query_mask, jnp.asarray(mask), implementation="reference"
    ),
    queries,
    jnp.asarray(documents),
  )
  d_queries, d_documents = pull(g)
  np.testing.assert_allclose(got[0], d_queries, rtol=1e-5, atol=1e-5)
  num_tokens = sum(LENGTHS)
  np.testing.assert_allclose(
    got[1][:num_tokens], d_documents[mask], rtol=1e-5, atol=1e-5
  )
  np.testing.assert_array_equal(got[1][num_tokens:], 0)


@pytest.mark.parametrize("budget", [1, 200, 1 << 20])
def test_a_tie_sends_everything_to_the_lowest_token(budget):
  query = jnp.array([[[1.0, 0.0]]])
  tokens = jnp.array([[9.0, 0], [0, 1], [0.5, 2], [0.5, -2], [0.5, 2]])
  ids = jnp.array([0, 1, 1, 1, 1])
  gradient = jax.grad(
    lambda t: maxsim_packed(
      query, t, ids, num_documents=2, memory_budget_bytes=budget
    )[0, 1]
  )(tokens)
  want = np.zeros((5, 2))
  want[2, 0] = 1
  np.testing.assert_array_equal(gradient, want)


def test_documents_longer_than_a_block_are_joined():
  random = np.random.default_rng(3)
  tokens = random.standard_normal((500, 6), dtype=np.float32)
  queries = random.standard_normal((1, 5, 6), dtype=np.float32)
  ids = np.repeat(np.arange(2, dtype=np.int32), [437, 63])
  got = maxsim_packed(
    queries, tokens, ids, num_documents=2, memory_budget_bytes=1_000
  )
  met = tokens @ queries[0].T
  want = [met[:437].max(0).sum(), met[437:].max(0).sum()]
  np.testing.assert_allclose(got[0], want, rtol=1e-5)


def test_no_token_at_all():
  packed, _ = packed_and_padded(4)
  nowhere = np.full_like(packed[2], len(LENGTHS))
  got = score(packed[0], packed[1], nowhere)
  np.testing.assert_array_equal(got, EMPTY_SCORE)


@pytest.mark.unchecked
def test_errors_name_the_argument():
  (queries, tokens, ids, query_mask), _ = packed_and_padded(5)
  with pytest.raises(ValueError, match="queries_dim=6, tokens_dim=5"):
    score(queries, tokens[:, :5], ids)
  with pytest.raises(ValueError, match="tokens=23, document_ids=24"):
    score(queries, tokens[1:], ids)
  with pytest.raises(ValueError, match="query_mask must have shape"):
    score(queries, tokens, ids, query_mask[:, 1:])
  with pytest.raises(ValueError, match="num_documents must lie in 1"):
    maxsim_packed(queries, tokens, ids, num_documents=0)
  mesh = jax.make_mesh((2,), ("data",))
  with jax.set_mesh(mesh):
    shards = jax.device_put((tokens[:4], ids[:4]), jax.P("data"))
    with pytest.raises(ValueError, match="tokens and their ids must be whole"):
      score(queries, *shards)

"""MaxSim scores: worked numbers, a loop, masks, empties, properties, errors."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from tests.kernels.arrays import takes_numpy
from tokjax.kernels import maxsim as kernel
from tokjax.kernels.maxsim import EMPTY_SCORE, api

maxsim = takes_numpy(kernel.maxsim)
maxsim_alignment = takes_numpy(kernel.maxsim_alignment)
maxsim_pairs = takes_numpy(kernel.maxsim_pairs)

PLAIN = ["reference", "xla", None]
QUERY = np.array([[[1.0, 0.0], [0.6, 0.8], [0.0, -1.0]]], np.float32)
DOCUMENT = np.array([[[0.8, 0.6], [-0.6, -0.8], [0.0, 1.0]]], np.float32)


def loop_maxsim(queries, documents, query_mask, document_mask, mean=False):
  """One inner product at a time, in double precision."""
  num_queries, num_documents = len(queries), len(documents)
  scores = np.full((num_queries, num_documents), EMPTY_SCORE)
  for i in range(num_queries):
    for j in range(num_documents):
      if not document_mask[j].any():
        continue
      total = 0.0
      for a in np.flatnonzero(query_mask[i]):
        total += max(
          np.dot(queries[i, a].astype(float), documents[j, b].astype(float))
          for b in np.flatnonzero(document_mask[j])
        )
      scores[i, j] = total / max(1, query_mask[i].sum()) if mean else total
  return scores


def random_sets(seed, num_queries=3, num_documents=7, dtype=np.float32):
  random = np.random.default_rng(seed)
  queries = random.standard_normal((num_queries, 5, 6)).astype(dtype)
  documents = random.standard_normal((num_documents, 9, 6)).astype(dtype)
  query_mask = random.random((num_queries, 5)) < 0.7
  document_mask = random.random((num_documents, 9)) < 0.6
  return queries, documents, query_mask, document_mask


def poison(x, mask):
  return np.where(mask[..., None], x, np.nan)


@pytest.mark.parametrize("implementation", PLAIN)
def test_worked_example(implementation):
  score = maxsim(QUERY, DOCUMENT, implementation=implementation)
  np.testing.assert_allclose(score, [[0.8 + 0.96 + 0.8]], rtol=1e-6)


@pytest.mark.parametrize("implementation", PLAIN)
def test_worked_example_masked_before_the_maximum(implementation):
  # The third query token now only meets -0.6; times 0 it would have met 0.
  mask = np.array([[True, False, True]])
  score = maxsim(
    QUERY, DOCUMENT, document_mask=mask, implementation=implementation
  )
  np.testing.assert_allclose(score, [[0.8 + 0.96 - 0.6]], rtol=1e-6)


def test_worked_example_mean_divides_by_valid_query_tokens():
  mask = np.array([[True, True, False]])
  score = maxsim(QUERY, DOCUMENT, mask, mean=True)
  np.testing.assert_allclose(score, [[(0.8 + 0.96) / 2]], rtol=1e-6)


@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize("mean", [False, True])
def test_equals_the_loop(implementation, mean):
  queries, documents, query_mask, document_mask = random_sets(0)
  got = maxsim(
    poison(queries, query_mask),
    poison(documents, document_mask),
    query_mask,
    document_mask,
    mean=mean,
    implementation=implementation,
  )
  want = loop_maxsim(queries, documents, query_mask, document_mask, mean)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("budget", [1, 500, 1_000, 5_000, 1 << 20])
@pytest.mark.parametrize("masked", [False, True])
def test_every_block_size_gives_the_same(budget, masked):
  queries, documents, query_mask, document_mask = random_sets(1)
  masks = (query_mask, document_mask) if masked else (None, None)
  got = maxsim(queries, documents, *masks, memory_budget_bytes=budget)
  want = maxsim(queries, documents, *masks, implementation="reference")
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize("mean", [False, True])
def test_empty_document_and_empty_query(implementation, mean):
  queries, documents, query_mask, document_mask = random_sets(2)
  document_mask[4] = False
  query_mask[1] = False
  scores = maxsim(
    poison(queries, query_mask),
    poison(documents, document_mask),
    query_mask,
    document_mask,
    mean=mean,
    implementation=implementation,
  )
  np.testing.assert_array_equal(scores[:, 4], EMPTY_SCORE)
  np.testing.assert_array_equal(np.delete(scores[1], 4), 0)


@pytest.mark.parametrize("implementation", PLAIN)
def test_bfloat16_is_summed_in_float32(implementation):
  # 128 maxima of 1 and one of 2**-8: bfloat16 sums would lose the last one.
  query = jnp.ones((1, 129, 1), jnp.bfloat16).at[0, 128, 0].set(2**-8)
  document = jnp.ones((1, 1, 1), jnp.bfloat16)
  score = maxsim(query, document, implementation=implementation)
  assert score.dtype == jnp.float32
  assert float(score[0, 0]) == 128 + 2**-8


def test_pairs_equal_one_by_one():
  queries, documents, query_mask, document_mask = random_sets(3, 4, 12)
  own = documents.reshape(4, 3, 9, 6)
  own_mask = document_mask.reshape(4, 3, 9)
  got = maxsim_pairs(queries, own, query_mask, own_mask, mean=True)
  for i in range(4):
    want = maxsim(
      queries[i : i + 1], own[i], query_mask[i : i + 1], own_mask[i], mean=True
    )
    np.testing.assert_allclose(got[i], want[0], rtol=1e-6)


def test_alignment_of_the_worked_example():
  found = maxsim_alignment(QUERY, DOCUMENT)
  np.testing.assert_array_equal(found.index, [[[0, 0, 1]]])
  np.testing.assert_allclose(found.similarity, [[[0.8, 0.96, 0.8]]], rtol=1e-6)
  np.testing.assert_allclose(found.scores, [[2.56]], rtol=1e-6)


@pytest.mark.parametrize("mean", [False, True])
def test_alignment_adds_up_and_is_zero_where_it_means_nothing(mean):
  queries, documents, query_mask, document_mask = random_sets(4)
  document_mask[2] = False
  found = maxsim_alignment(
    poison(queries, query_mask),
    poison(documents, document_mask),
    query_mask,
    document_mask,
    mean=mean,
  )
  want = loop_maxsim(queries, documents, query_mask, document_mask, mean)
  np.testing.assert_allclose(found.scores, want, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(found.index[:, 2], 0)
  np.testing.assert_array_equal(found.similarity[:, 2], 0)
  masked = np.broadcast_to(~query_mask[:, None, :], found.index.shape)
  np.testing.assert_array_equal(np.asarray(found.similarity)[masked], 0)
  for i, j, a in np.ndindex(found.index.shape):
    if query_mask[i, a] and document_mask[j].any():
      met = documents[j] @ queries[i, a]
      want = np.argmax(np.where(document_mask[j], met, -np.inf))
      assert found.index[i, j, a] == want


def test_alignment_tie_goes_to_the_lowest_index():
  documents = np.stack([DOCUMENT[0, [1, 0, 0, 2]]])
  assert maxsim_alignment(QUERY[:, :1], documents).index.item() == 1


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**32 - 1))
def test_order_of_tokens_is_of_no_account(seed):
  queries, documents, query_mask, document_mask = random_sets(seed)
  random = np.random.default_rng(seed)
  a, b = random.permutation(5), random.permutation(9)
  got = maxsim(
    queries[:, a], documents[:, b], query_mask[:, a], document_mask[:, b]
  )
  want = maxsim(queries, documents, query_mask, document_mask)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**32 - 1))
def test_appended_masked_tokens_change_nothing(seed):
  queries, documents, query_mask, document_mask = random_sets(seed)

  def longer(x, fill):
    width = [(0, 0), (0, 2)] + [(0, 0)] * (x.ndim - 2)
    return np.pad(x, width, constant_values=fill)

  got = maxsim(
    longer(queries, np.nan),
    longer(documents, np.nan),
    longer(query_mask, False),
    longer(document_mask, False),
  )
  want = maxsim(queries, documents, query_mask, document_mask)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.unchecked
def test_errors_name_the_argument():
  queries, documents, query_mask, document_mask = random_sets(5)
  with pytest.raises(ValueError, match="queries_dim=6, documents_dim=5"):
    jax.eval_shape(maxsim, queries, documents[..., :5])
  with pytest.raises(ValueError, match=r"document_mask must have .*\(7, 8\)"):
    jax.eval_shape(maxsim, queries, documents, None, document_mask[:, :8])
  with pytest.raises(ValueError, match="queries must have 3 axes"):
    jax.eval_shape(maxsim, queries[0], documents)
  with pytest.raises(ValueError, match="one dtype, got float32 and bfloat16"):
    maxsim(jnp.asarray(queries), jnp.asarray(documents, jnp.bfloat16))
  with pytest.raises(ValueError, match="implementation must be one of"):
    maxsim(queries, documents, implementation="triton")
  with pytest.raises(ValueError, match="document_tokens must lie in 1"):
    maxsim(queries, documents[:, :0])
  with pytest.raises(ValueError, match="queries_rows=3, documents_rows=2"):
    maxsim_pairs(queries, documents[None, :6].reshape(2, 3, 9, 6))


@pytest.mark.unchecked
def test_sharding_of_an_inner_axis_is_refused():
  mesh = jax.make_mesh((3,), ("data",))
  queries, documents, _, _ = random_sets(6)
  with jax.set_mesh(mesh):
    documents = jax.device_put(documents, jax.P(None, "data"))
    with pytest.raises(ValueError, match="documents must be sharded over"):
      maxsim(queries, documents)


def test_named_kernel_runs_or_says_why_not():
  queries, documents, _, _ = random_sets(7, dtype=np.float64)
  with jax.enable_x64(True):
    arrays = jnp.asarray(queries), jnp.asarray(documents)
    for name in ("pallas_tpu", "pallas_gpu"):
      with pytest.raises(NotImplementedError, match=f"{name}: .*float64"):
        jax.eval_shape(
          lambda q, d, n=name: maxsim(q, d, implementation=n), *arrays
        )


def test_mean_over_query_divides_by_valid_tokens_and_spares_empties():
  scores = jnp.array([[6.0, EMPTY_SCORE]])
  found = jnp.array([True, False])
  queries = jnp.zeros((1, 4, 2))
  mask = jnp.array([[True, True, True, False]])
  want = [[2.0, EMPTY_SCORE]]
  got = api.mean_over_query(scores, queries, mask, found)
  np.testing.assert_array_equal(got, want)
  got = api.mean_over_query(scores, queries, None, None)
  np.testing.assert_array_equal(got, [[1.5, EMPTY_SCORE / 4]])

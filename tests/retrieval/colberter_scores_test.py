"""Both scores and their mix, in batches and in lists; where gradients go."""

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from tests.compiled import compiled
from tests.kernels.arrays import takes_numpy
from tokjax.kernels.maxsim import EMPTY_SCORE
from tokjax.retrieval import colberter_scores

colberter_scores = compiled(colberter_scores)

score = takes_numpy(colberter_scores.score)
score_pairs = takes_numpy(colberter_scores.score_pairs)
NUM_QUERIES, NUM_DOCUMENTS, Q, W, D, C = 4, 7, 5, 6, 3, 2
FUSION = np.array(0.3, np.float32)
ZERO = np.array(0, np.float32)


def bags(seed, shape, size, dim=D, empty=None):
  """cls, words, mask and ids; padding holds NaN words and random ids."""
  random = np.random.default_rng(seed)
  cls = random.standard_normal((*shape, C), dtype=np.float32)
  words = random.standard_normal((*shape, size, dim), dtype=np.float32)
  mask = random.random((*shape, size)) < 0.7
  if empty is not None:
    mask[empty] = False
  words[~mask] = np.nan
  ids = np.empty((*shape, size), np.uint32)
  for row in np.ndindex(shape):  # unique within a text, and large
    ids[row] = np.uint32(2**32 - 9) + random.permutation(8)[:size]
  return cls, words, mask, ids


def batch(seed=0, dim=D):
  query = bags(seed, (NUM_QUERIES,), Q, dim, empty=1)
  document = bags(seed + 100, (NUM_DOCUMENTS,), W, dim, empty=2)
  return query, document


def arguments(query, document, *, exact):
  ids = (query[3], document[3]) if exact else ()
  return *query[:3], *document[:3], FUSION, *ids


def exact_oracle(query, document):
  """One query and one document by the published code's order of steps."""
  _, query_words, query_mask, query_ids = query
  _, words, mask, ids = document
  total = 0.0
  for a in range(len(query_words)):
    row = []
    for b in range(len(words)):
      value = 0.0
      if query_ids[a] == ids[b]:
        value = float(np.dot(query_words[a], words[b]))
      if not mask[b]:
        value = -1000.0
      row.append(value)
    best = max(row)
    if not query_mask[a]:
      best = 0.0
    total += best
  return total


def maxsim_oracle(query, document):
  _, query_words, query_mask, _ = query
  _, words, mask, _ = document
  if not mask.any():
    return EMPTY_SCORE
  return sum(
    max(float(np.dot(q, w)) for w in words[mask])
    for q in query_words[query_mask]
  )


def row(side, i):
  return tuple(x[i] for x in side)


@pytest.mark.parametrize("budget", [1, 2_000, 1 << 20])
@pytest.mark.parametrize("exact", [True, False])
def test_scores_equal_the_loops(exact, budget):
  query, document = batch()
  got = score(
    *arguments(query, document, exact=exact), memory_budget_bytes=budget
  )
  oracle = exact_oracle if exact else maxsim_oracle
  weight = 1 / (1 + np.exp(-FUSION))
  for i, j in np.ndindex(NUM_QUERIES, NUM_DOCUMENTS):
    token = oracle(row(query, i), row(document, j))
    cls = float(np.dot(query[0][i], document[0][j]))
    np.testing.assert_allclose(got.token_scores[i, j], token, 1e-5, 1e-5)
    np.testing.assert_allclose(got.cls_scores[i, j], cls, 1e-5, 1e-5)
    np.testing.assert_allclose(
      got.scores[i, j], weight * cls + (1 - weight) * token, 1e-5, 1e-5
    )
  assert {x.dtype for x in got} == {jnp.dtype("float32")}


@pytest.mark.parametrize("exact", [True, False])
def test_pairs_equal_the_batch_row_by_row(exact):
  query = bags(0, (NUM_QUERIES,), Q, empty=1)
  document = bags(1, (NUM_QUERIES, 3), W, empty=(2, 1))
  got = score_pairs(*arguments(query, document, exact=exact))
  for i in range(NUM_QUERIES):
    one = tuple(x[i : i + 1] for x in query)
    want = score(*arguments(one, row(document, i), exact=exact))
    for x, y in zip(got, want, strict=True):
      np.testing.assert_allclose(x[i], y[0], rtol=1e-5, atol=1e-5)


def one_document(words, mask, ids):
  """Query words 2 (id 7) and -3 (id 8) against a document of numbers."""
  mask_of_query = np.ones((1, 2), bool)
  return score(
    np.zeros((1, 1), np.float32), np.float32([[[2], [-3]]]), mask_of_query,
    np.zeros((1, 1), np.float32), np.float32(words)[None, :, None],
    np.array([mask]), ZERO, np.uint32([[7, 8]]), np.uint32([ids]),
  ).token_scores.item()  # fmt: skip


def test_exact_match_worked_example():
  true = [True, True, True]
  # 2 * 5 = 10; -3 * 4 = -12 is lifted to 0 by the words that differ.
  assert one_document([5, 4, 9], true, [7, 8, 6]) == 10
  # Without any other word there is nothing to lift it.
  assert one_document([4], [True], [8]) == 0 - 12
  # A query word that the document lacks gives 0.
  assert one_document([5, 9, 9], true, [7, 5, 6]) == 10
  # Padding gives -1000 even where its id is equal: no match, no other word.
  assert one_document([5, 4], [True, False], [7, 8]) == 10 + 0
  assert one_document([5, 4], [False, True], [7, 8]) == 0 - 12
  assert one_document([5, 4], [False, False], [7, 8]) == -2000


def test_exact_match_of_one_number_is_a_sparse_dot_product():
  random = np.random.default_rng(0)
  vocabulary = 12
  query = np.abs(random.standard_normal((3, vocabulary))).astype(np.float32)
  document = np.abs(random.standard_normal((5, vocabulary))).astype(np.float32)
  present = [random.random((n, vocabulary)) < 0.5 for n in (3, 5)]
  present[1][:, 0], present[0][:, 0] = True, False  # a word without a match
  ids = np.arange(1, vocabulary + 1, dtype=np.uint32)
  got = score(
    np.zeros((3, 1), np.float32), query[..., None], present[0],
    np.zeros((5, 1), np.float32), document[..., None], present[1],
    ZERO, np.tile(ids, (3, 1)), np.tile(ids, (5, 1)),
  )  # fmt: skip
  want = np.where(present[0], query, 0) @ np.where(present[1], document, 0).T
  np.testing.assert_allclose(got.token_scores, want, rtol=1e-5)


@pytest.mark.parametrize("exact", [True, False])
def test_no_gradient_to_padding_and_to_empty_documents(exact):
  query, document = batch()

  def total(query_cls, query_words, document_cls, document_words, fusion):
    sides = (
      (query_cls, query_words, *query[2:]),
      (document_cls, document_words, *document[2:]),
    )
    arrays = list(arguments(*sides, exact=exact))
    arrays[6] = fusion
    return jnp.sum(jnp.sin(score(*arrays).scores))

  got = jax.jit(jax.grad(total, argnums=range(5)))(
    *query[:2], *document[:2], FUSION
  )
  for gradient in got:
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0
  np.testing.assert_array_equal(got[1][~query[2]], 0)
  np.testing.assert_array_equal(got[3][~document[2]], 0)
  np.testing.assert_array_equal(got[2][2], 0)  # the document without words
  assert abs(float(got[4])) < 100  # not moved by the -1e9 of that document


@pytest.mark.parametrize("budget", [1, 2_000, 1 << 20])
def test_exact_gradient_equals_finite_differences_in_any_blocks(budget):
  query, document = batch(1)
  clean = [
    np.where(side[2][..., None], side[1], 0) for side in (query, document)
  ]

  def tokens(query_words, document_words):
    return score(
      query[0], query_words, query[2], document[0], document_words,
      document[2], FUSION, query[3], document[3], memory_budget_bytes=budget,
    ).scores  # fmt: skip

  found = np.ones(NUM_DOCUMENTS, bool)
  found[2] = False

  def valid(*words):
    return tokens(*words)[:, found] * 0.1

  jax.test_util.check_grads(
    jax.jit(valid), clean, order=1, modes=["rev"], rtol=2e-2, atol=2e-2
  )


def tie_gradient(ids):
  """Gradient of the matched document word; the product of the match is 0."""

  def total(document_words):
    mask = jnp.ones((1, 2), bool)
    zero = jnp.zeros((1, 1))
    return colberter_scores.score(
      zero, jnp.array([[[0.0, 1.0]]]), mask[:, :1], zero, document_words, mask,
      jnp.zeros(()), jnp.array([[7]], jnp.uint32),
      jnp.array([ids], jnp.uint32),
    ).token_scores.sum()  # fmt: skip

  words = jnp.array([[[3.0, 0.0], [3.0, 0.0]]])
  return jax.grad(total)(words)[0, :, 1].tolist()


def test_ties_send_the_gradient_to_the_lowest_index():
  assert tie_gradient([7, 9]) == [1, 0]  # the match comes first
  assert tie_gradient([9, 7]) == [0, 0]  # the 0 of another word comes first


def temporary_bytes(function, *arrays):
  compiled = jax.jit(function).lower(*arrays).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def test_exact_match_stays_below_the_budget():
  queries, documents, size, dim = 32, 2_000, 128, 8

  def abstract(rows, size):
    return (
      jax.ShapeDtypeStruct((rows, 16), jnp.float32),
      jax.ShapeDtypeStruct((rows, size, dim), jnp.float32),
      jax.ShapeDtypeStruct((rows, size), bool),
    )

  arrays = (
    *abstract(queries, 32),
    *abstract(documents, size),
    jax.ShapeDtypeStruct((), jnp.float32),
    jax.ShapeDtypeStruct((queries, 32), jnp.uint32),
    jax.ShapeDtypeStruct((documents, size), jnp.uint32),
  )
  budget = 8 << 20

  def forward(*arrays):
    return colberter_scores.score(*arrays, memory_budget_bytes=budget).scores

  def backward(*arrays):
    return jax.grad(lambda *a: forward(*a).sum(), argnums=(1, 4))(*arrays)

  inputs = documents * size * (4 * dim + 5)
  everything = 4 * queries * 32 * documents * size
  assert everything > 10 * (budget + 4 * inputs)
  assert temporary_bytes(forward, *arrays) < budget + 2 * inputs
  assert temporary_bytes(backward, *arrays) < budget + 4 * inputs


@pytest.mark.unchecked
def test_errors_name_the_argument():
  query, document = batch()
  good = arguments(query, document, exact=True)

  def changed(index, value):
    return [value if i == index else x for i, x in enumerate(good)]

  with pytest.raises(ValueError, match="query_cls must have shape .4, 2."):
    score(*changed(0, query[0][:3]))
  with pytest.raises(ValueError, match="document_mask must have shape .7, 6."):
    score(*changed(5, document[2][:, :5]))
  with pytest.raises(ValueError, match="query_words_width=2, document_words"):
    score(*changed(1, query[1][..., :2]))
  with pytest.raises(ValueError, match="of both sides or of neither"):
    score(*good[:8])
  with pytest.raises(TypeError, match="query_word_ids must be uint32, got int"):
    score(*changed(7, query[3].astype(np.int32)))
  with pytest.raises(NotImplementedError, match="'xla' has no exact match"):
    score(*good, implementation="xla")
  with pytest.raises(ValueError, match="query_rows=4, document_rows=2"):
    score_pairs(*arguments(query, bags(0, (2, 3), W), exact=False))

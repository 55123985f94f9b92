"""XTR's inference: retrieved tokens, imputed similarities, whole searches."""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from hypothesis import strategies as st
from tokenizers import processors

from tests.compiled import run
from tokjax.retrieval import (
  codecs,
  colbert,
  search,
  token_index,
  token_retrieval,
  xtr,
)

DIM, NUM_DOCUMENTS, NUM_QUERIES = 16, 30, 4
nearest_tokens = functools.partial(run, token_retrieval.nearest_tokens)
aggregate = jax.jit(xtr.aggregate, static_argnames=("k", "num_documents"))
find = jax.jit(xtr.search, static_argnames=("k", "k_prime", "block_size"))


def ranking(documents, scores, query_mask, k):
  """One query's entries [Q, K] to the k best documents, in float64 loops."""
  best, missing, count = {}, [], max(1, int(np.sum(query_mask)))
  for a in np.flatnonzero(query_mask):
    entries = [
      (int(d), float(s))
      for d, s in zip(documents[a], scores[a], strict=True)
      if d >= 0 and s > -np.inf
    ]
    missing.append(min((s for _, s in entries), default=0.0))
    for d, s in entries:
      mine = best.setdefault(d, {})
      mine[a] = max(s, mine.get(a, -np.inf))
  tokens = np.flatnonzero(query_mask)
  found = sorted(
    (
      -sum(mine.get(a, m) for a, m in zip(tokens, missing, strict=True))
      / count,
      d,
    )
    for d, mine in best.items()
  )[:k]
  index = [d for _, d in found] + [-1] * (k - len(found))
  values = [-s for s, _ in found] + [-np.inf] * (k - len(found))
  return np.array(index), np.array(values)


def rankings(documents, scores, query_mask, k):
  arrays = map(np.asarray, (documents, scores, query_mask))
  rows = [ranking(*row, k) for row in zip(*arrays, strict=True)]
  return tuple(np.stack(x) for x in zip(*rows, strict=True))


def check(found, want):
  np.testing.assert_array_equal(found.index, want[0])
  np.testing.assert_allclose(found.scores, want[1], rtol=1e-5, atol=1e-6)


HAND_IDS = [[0, 1, 0], [1, 2, 2]]
HAND_SCORES = [[0.9, 0.7, 0.5], [0.8, 0.6, 0.4]]


@pytest.mark.parametrize("num_documents", [3, 10, None])
def test_worked_example(num_documents):
  """a .65, b .75, c .55: imputed by .5 and .4."""
  found = aggregate(
    np.array([HAND_IDS]),
    np.float32([HAND_SCORES]),
    k=3,
    num_documents=num_documents,
  )
  check(found, ([[1, 0, 2]], [[0.75, 0.65, 0.55]]))


@pytest.mark.parametrize("num_documents", [3, None])
def test_what_was_not_found_is_dropped(num_documents):
  """-1, NaN and -inf entries are neither document 0 nor the last score."""
  ids = np.array([[[-1, *HAND_IDS[0], 2, -1], [*HAND_IDS[1], -7, 0, -1]]])
  scores = np.float32(
    [[[9, *HAND_SCORES[0], np.nan, 0.1], [*HAND_SCORES[1], 0, -np.inf, 1]]]
  )
  found = aggregate(ids, scores, k=3, num_documents=num_documents)
  check(found, ([[1, 0, 2]], [[0.75, 0.65, 0.55]]))


def entries(seed, num_documents=7, shape=(3, 4, 6), quarters=False):
  random = np.random.default_rng(seed)
  ids = random.integers(-1, num_documents, shape)
  scores = random.standard_normal(shape)
  if quarters:  # exact sums, and ties
    scores = np.round(scores * 2) / 4
  scores = -np.sort(-scores, axis=2)
  scores[random.random(shape) < 0.1] = np.nan
  query_mask = random.random(shape[:2]) < 0.7
  query_mask[0] = False
  return ids.astype(np.int32), scores.astype(np.float32), query_mask


@pytest.mark.parametrize("num_documents", [7, 50, None])
@pytest.mark.parametrize("k", [1, 5, 7])
def test_aggregate_equals_the_loop(k, num_documents):
  arrays = entries(0)
  found = aggregate(*arrays, k=k, num_documents=num_documents)
  check(found, rankings(*arrays, k))
  # The first query has no valid token, so no candidate.
  assert (np.asarray(found.index[0]) == -1).all()


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
  seed=st.integers(0, 2**32 - 1), num_documents=st.sampled_from([7, None])
)
def test_ties_go_to_the_lower_document(seed, num_documents):
  """With two query tokens, sums of quarters are exact in any order."""
  ids, scores, query_mask = entries(seed, shape=(2, 2, 6), quarters=True)
  query_mask = np.ones_like(query_mask)
  found = aggregate(ids, scores, query_mask, k=7, num_documents=num_documents)
  check(found, rankings(ids, scores, query_mask, 7))


@pytest.mark.parametrize("num_documents", [7, None])
def test_order_of_the_entries_does_not_matter(num_documents):
  ids, scores, query_mask = entries(1, quarters=True)
  call = functools.partial(aggregate, k=5, num_documents=num_documents)
  order = np.random.default_rng(0).permutation(6)
  want = call(ids, scores, query_mask)
  got = call(ids[..., order], scores[..., order], query_mask)
  check(got, want)


def test_more_results_than_entries():
  found = aggregate(np.array([[[5, 5]]]), np.float32([[[0.5, 0.2]]]), k=4)
  check(found, ([[5, -1, -1, -1]], [[0.5] + 3 * [-np.inf]]))


def test_ids_beyond_the_table_are_dropped():
  """Nor is their score the last one: document 1 is imputed by .5, not .2."""
  ids = np.array([[[0, 9], [1, 9]]])
  scores = np.float32([[[0.5, 0.2], [0.4, 0.1]]])
  found = aggregate(ids, scores, k=3, num_documents=3)
  check(found, ([[0, 1, -1]], [[0.45, 0.45, -np.inf]]))


def test_a_query_token_that_found_nothing_counts_as_zero():
  ids = np.array([[[0, 1], [-1, -1]]])
  scores = np.float32([[[0.8, 0.6], [0.5, 0.5]]])
  for num_documents in (2, None):
    found = aggregate(ids, scores, k=2, num_documents=num_documents)
    check(found, ([[0, 1]], [[0.4, 0.3]]))


def corpus(seed=0, longest=40):
  random = np.random.default_rng(seed)
  lengths = random.integers(1, longest, NUM_DOCUMENTS)
  lengths[[0, 3, NUM_DOCUMENTS - 1]] = 0  # first, inner and last are empty
  lengths[5] = 1
  offsets = np.concatenate([[0], np.cumsum(lengths)])
  tokens = random.standard_normal((offsets[-1], DIM)).astype(np.float32)
  return tokens / np.linalg.norm(tokens, axis=1, keepdims=True), offsets


def questions(seed=1, num_tokens=5):
  random = np.random.default_rng(seed)
  shape = (NUM_QUERIES, num_tokens, DIM)
  mask = random.random(shape[:2]) < 0.7
  mask[0], mask[1] = True, False
  queries = random.standard_normal(shape).astype(np.float32)
  return queries, mask


def brute_force(tokens, offsets, queries, k_prime, live=None):
  """Documents and scores of the best tokens: all of them, sorted."""
  document = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
  if live is not None:
    tokens, document = tokens[live[document]], document[live[document]]
  scores = np.asarray(queries, np.float64) @ tokens.T.astype(np.float64)
  order = np.argsort(-scores, axis=2, kind="stable")[..., :k_prime]
  return document[order], np.take_along_axis(scores, order, axis=2)


@pytest.mark.parametrize("page_size, block_size", [(1, 7), (4, 64), (16, 1000)])
@pytest.mark.parametrize("k_prime", [1, 20, 100_000])
def test_search_equals_the_loop(k_prime, page_size, block_size):
  tokens, offsets = corpus()
  index = token_index.build(tokens, offsets, page_size=page_size)
  queries, mask = questions()
  found = find(
    index, queries, mask, k=8, k_prime=k_prime, block_size=block_size
  )
  entries = brute_force(tokens, offsets, queries, k_prime)
  check(found, rankings(*entries, mask, 8))


def test_few_retrieved_tokens_are_sorted_instead_of_tabled():
  """30 documents are more than one token for each of five."""
  tokens, offsets = corpus()
  queries, mask = questions()
  found = find(
    token_index.build(tokens, offsets), queries, mask, k=10, k_prime=1
  )
  entries = brute_force(tokens, offsets, queries, 1)
  check(found, rankings(*entries, mask, 10))


@pytest.mark.parametrize("name", ["float16", "int8", "residual2", "pq8"])
def test_stored_codes_are_what_is_scored(name):
  tokens, offsets = corpus()
  codec = codecs.train(name, jax.random.key(0), tokens, num_centroids=32)
  index = token_index.build(tokens, offsets, codec, page_size=8)
  decoded = jax.jit(lambda codec, x: codec.decode(codec.encode(x)))(
    codec, tokens
  )
  decoded = np.asarray(decoded)
  queries, mask = questions()
  found = find(index, queries, mask, k=8, k_prime=25)
  entries = brute_force(decoded, offsets, queries, 25)
  check(found, rankings(*entries, mask, 8))


def test_all_tokens_give_the_mean_of_maxsim():
  tokens, offsets = corpus()
  index = token_index.build(tokens, offsets)
  queries, mask = questions()
  k = 27  # the documents that have tokens
  found = find(index, queries, mask, k=k, k_prime=len(tokens))
  want = jax.device_get(run(search.search, index, queries, mask, k=k))
  found = jax.device_get(found)
  with_tokens = np.asarray(mask).any(axis=1)
  assert with_tokens.sum() == 3
  np.testing.assert_array_equal(
    found.index[with_tokens], want.index[with_tokens]
  )
  count = np.asarray(mask).sum(axis=1)[with_tokens, None]
  np.testing.assert_allclose(
    found.scores[with_tokens], want.scores[with_tokens] / count, rtol=1e-5
  )


@pytest.mark.parametrize("k_prime", [1, 10, 50])
def test_scores_are_at_least_the_mean_of_maxsim(k_prime):
  tokens, offsets = corpus()
  index = token_index.build(tokens, offsets)
  queries, mask = questions()
  found = find(index, queries, mask, k=NUM_DOCUMENTS, k_prime=k_prime)
  everything = brute_force(tokens, offsets, queries, len(tokens))
  for i in range(NUM_QUERIES):
    want = ranking(*(x[i] for x in everything), mask[i], NUM_DOCUMENTS)
    true = dict(zip(want[0].tolist(), want[1].tolist(), strict=True))
    pairs = zip(found.index[i].tolist(), found.scores[i].tolist(), strict=True)
    gaps = [score - true[d] for d, score in pairs if d >= 0]
    assert all(gap > -1e-5 for gap in gaps)
    if gaps and k_prime == 1:
      assert max(gaps) > 0.01  # where something was imputed


def test_rows_that_fill_a_page_take_no_place():
  """One token each: the second best is another document's, not a copy."""
  tokens = np.array([[1, 0], [0.8, 0.6], [0, 1]], np.float32)
  index = token_index.build(tokens, np.array([0, 1, 2, 3]), page_size=16)
  documents, scores = nearest_tokens(index, np.float32([[1, 0]]), 4)
  assert documents.tolist() == [[0, 1, 2, -1]]
  np.testing.assert_allclose(scores, [[1, 0.8, 0, -np.inf]], rtol=1e-6)


@pytest.mark.parametrize("page_size", [1, 2, 4, 16])
def test_twins_of_the_first_token_are_tokens(page_size):
  """At the end of a document too, where copies of it fill the page."""
  a, b = [1, 0], [0.6, 0.8]
  tokens = np.array([a, a, b, a, b, a, a], np.float32)
  offsets = np.array([0, 5, 7])
  index = token_index.build(tokens, offsets, page_size=page_size)
  assert index.num_tokens.tolist() == [5, 2]
  documents, scores = nearest_tokens(index, np.float32([[1, 0]]), 7)
  assert documents.tolist() == [[0, 0, 0, 1, 1, 0, 0]]
  scores = np.asarray(scores)
  np.testing.assert_allclose(scores[0], 5 * [1] + 2 * [0.6], rtol=1e-6)


@pytest.mark.parametrize("k_prime", [3, 100_000])
def test_deleted_documents_are_never_retrieved(k_prime):
  tokens, offsets = corpus()
  live = np.arange(NUM_DOCUMENTS) % 3 > 0
  index = token_index.build(tokens, offsets, page_size=4)
  index = dataclasses.replace(index, live=jnp.asarray(live))
  queries, mask = questions()
  found = find(index, queries, mask, k=25, k_prime=k_prime)
  entries = brute_force(tokens, offsets, queries, k_prime, live)
  check(found, rankings(*entries, mask, 25))


def test_a_shard_padded_to_others_finds_the_same():
  tokens, offsets = corpus()
  parts = [
    token_index.build(
      tokens[offsets[first] : offsets[last]],
      offsets[first : last + 1] - offsets[first],
      page_size=4,
    )
    for first, last in ((0, 7), (7, 30))
  ]
  stacked = token_index.stack_shards(parts)
  shard = jax.tree.map(lambda x: jnp.asarray(x[0]), stacked)
  queries, mask = questions()
  want = find(parts[0], queries, mask, k=5, k_prime=20)
  check(find(shard, queries, mask, k=5, k_prime=20), want)
  assert (np.asarray(want.index[0]) >= 0).all()


def test_an_index_without_tokens_finds_nothing():
  index = token_index.build(np.zeros((0, DIM), np.float32), np.zeros(4, int))
  queries, mask = questions()
  found = find(index, queries, mask, k=2, k_prime=5)
  assert (np.asarray(found.index) == -1).all()
  assert np.isneginf(found.scores).all()


def test_masked_query_tokens_have_no_influence():
  index = token_index.build(*corpus())
  queries, mask = questions()
  poisoned = np.where(mask[..., None], queries, np.nan)
  want = find(index, queries, mask, k=5, k_prime=20)
  got = find(index, poisoned, mask, k=5, k_prime=20)
  jax.tree.map(np.testing.assert_array_equal, got, want)
  none = find(index, queries[:1], k=5, k_prime=20)
  np.testing.assert_array_equal(none.index, np.asarray(want.index)[:1])


def test_scratch_does_not_grow_with_the_index():
  """100,000 tokens against 128: 49 MiB of similarities at once."""
  tokens = np.zeros((100_000, DIM), np.float32)
  index = token_index.build(tokens, np.arange(0, 100_001, 100))
  shape = jax.ShapeDtypeStruct((4, 32, DIM), jnp.float32)
  call = functools.partial(find, k=10, k_prime=500, block_size=4096)
  compiled = jax.jit(call).lower(index, shape).compile()
  held = compiled.memory_analysis().temp_size_in_bytes
  assert held < 16 << 20 < (4 * 128 * 100_000) / 3


def test_texts_are_found_by_their_own_words():
  """`text_config` through the encoder: every token is scored, with specials."""
  words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "!", "a", "b", "c"]
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]")
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
  )

  def encoder(ids, attention_mask):
    del attention_mask
    return jax.nn.one_hot(ids, len(words))

  config = xtr.text_config()
  texts = colbert.encode_documents(
    ["a a", "b ! c", "c"], tokenizer, encoder, None, config, progress=False
  )
  assert np.diff(texts.offsets).tolist() == [4, 5, 3]
  asked = colbert.encode_queries(["c !"], tokenizer, encoder, None, config)
  assert asked.mask.sum() == 4
  index = token_index.build(texts.tokens, texts.offsets)
  found = find(index, asked.tokens, asked.mask, k=3, k_prime=3)
  # [CLS] and [SEP] are in all; "c" in 1 and 2; "!" in 1 only.
  assert found.index.tolist() == [[1, 2, 0]]
  np.testing.assert_allclose(found.scores, [[1, 0.75, 0.5]], rtol=1e-6)


@pytest.mark.unchecked
def test_errors_name_the_argument():
  index = token_index.build(*corpus())
  queries, mask = questions()
  with pytest.raises(ValueError, match="k must lie in 1..30, got 31"):
    find(index, queries, mask, k=31)
  with pytest.raises(ValueError, match="k_prime must lie in"):
    find(index, queries, mask, k=3, k_prime=0)
  with pytest.raises(ValueError, match="block_size must lie in"):
    find(index, queries, mask, k=3, block_size=0)
  with pytest.raises(ValueError, match="queries_width=15, index_dim=16"):
    find(index, queries[..., :-1], mask)
  with pytest.raises(ValueError, match="query_tokens_width=15, index_dim=16"):
    nearest_tokens(index, queries[0, :, :-1], 3)
  ids, scores, query_mask = entries(0)
  with pytest.raises(ValueError, match="must have one shape"):
    aggregate(ids[..., :2], scores, query_mask, k=1)
  with pytest.raises(ValueError, match="query_mask must have shape"):
    aggregate(ids, scores, query_mask[:, :2], k=1)
  with pytest.raises(ValueError, match="k must lie in 1..7, got 8"):
    aggregate(ids, scores, query_mask, k=8, num_documents=7)

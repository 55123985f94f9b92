"""Search where only equal words match, against a float64 loop."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.retrieval import (
  codecs,
  colberter,
  colberter_texts,
  index_files,
  search,
  token_index,
  xtr,
)

NUM_DOCUMENTS, NUM_QUERIES, Q, C = 26, 6, 5, 2
VOCABULARY = np.uint32(2**32 - 13) + np.arange(12, dtype=np.uint32)
UNKNOWN = np.array([3, 5, 7, 11, 13], np.uint32)  # in no document

searching = jax.jit(
  colberter_texts.search_fused, static_argnames=("k", "num_candidates")
)


def halves(random, *shape):
  """Numbers whose products and sums are exact, and often the same."""
  return (random.integers(-3, 4, shape) / 2).astype(np.float32)


@functools.cache
def documents(dim):
  """Packed words, offsets, text vectors, word ids."""
  random = np.random.default_rng(0)
  lengths = random.integers(1, 10, NUM_DOCUMENTS)
  lengths[[0, 3, -1]] = 0  # first, inner and last have no words
  lengths[[5, 9, 14]] = 1
  offsets = np.concatenate([[0], np.cumsum(lengths)])
  ids = [random.permutation(VOCABULARY)[:length] for length in lengths]
  words = [halves(random, length, dim) for length in lengths]
  cls = halves(random, NUM_DOCUMENTS, C)
  ids[14], words[14], cls[14] = ids[9], words[9], cls[9]  # one text twice
  return np.concatenate(words), offsets, cls, np.concatenate(ids)


@functools.cache
def questions(dim):
  """Words, mask, text vectors, word ids; padding holds NaN and real ids."""
  random = np.random.default_rng(1)
  mask = random.random((NUM_QUERIES, Q)) < 0.7
  mask[0], mask[1] = True, False  # a full query, and one without words
  words = halves(random, NUM_QUERIES, Q, dim)
  words[~mask] = np.nan
  ids = np.stack([random.permutation(VOCABULARY)[:Q] for _ in mask])
  ids[2] = UNKNOWN
  return words, mask, halves(random, NUM_QUERIES, C), ids


def oracle(dim, fusion):
  """Text scores and mixed scores [Nq, Nd], one product at a time."""
  words, offsets, cls, ids = documents(dim)
  query_words, mask, query_cls, query_ids = questions(dim)
  weight = 1 / (1 + np.exp(-np.float64(fusion)))
  first = query_cls.astype(np.float64) @ cls.astype(np.float64).T
  mixed = np.zeros_like(first)
  for i, d in np.ndindex(mixed.shape):
    rows, total = range(offsets[d], offsets[d + 1]), 0.0
    for a in np.flatnonzero(mask[i]):
      best = -np.inf if rows else -1000.0
      for b in rows:
        product = 0.0
        if query_ids[i, a] == ids[b]:
          product = np.dot(query_words[i, a].astype(np.float64), words[b])
        best = max(best, product)
      total += best
    mixed[i, d] = weight * first[i, d] + (1 - weight) * total
  return first, mixed


def wanted(dim, fusion, *, k, num_candidates, live=None):
  first, mixed = oracle(dim, fusion)
  live = np.ones(NUM_DOCUMENTS, bool) if live is None else live
  first = np.where(live, first, -np.inf)
  order = np.argsort(-first, axis=1, kind="stable")
  allowed = np.full_like(mixed, -np.inf)
  chosen = order[:, :num_candidates]
  values = np.take_along_axis(mixed, chosen, axis=1)
  np.put_along_axis(allowed, chosen, values, axis=1)
  allowed = np.where(live, allowed, -np.inf)
  index = np.argsort(-allowed, axis=1, kind="stable")[:, :k]
  scores = np.take_along_axis(allowed, index, axis=1)
  return np.where(scores > -np.inf, index, -1), scores


def build(dim, page_size=4):
  words, offsets, cls, ids = documents(dim)
  return token_index.build(
    words, offsets, page_size=page_size, word_ids=ids,
    candidates={"cls": token_index.store_vectors(cls)},
  )  # fmt: skip


def find(index, dim, fusion=0.0, *, k=10, num_candidates=99):
  words, mask, cls, ids = map(jnp.asarray, questions(dim))
  return searching(
    index, words, mask, cls, jnp.float32(fusion), ids,
    k=k, num_candidates=num_candidates,
  )  # fmt: skip


def check(found, want, exactly=True):
  np.testing.assert_array_equal(found.index, want[0])
  tolerance = 0 if exactly else 1e-6
  np.testing.assert_allclose(
    found.scores, want[1], rtol=tolerance, atol=tolerance
  )


@pytest.mark.parametrize(("dim", "page_size"), [(1, 1), (1, 16), (3, 4)])
@pytest.mark.parametrize("num_candidates", [7, 99])
@pytest.mark.parametrize("fusion", [0.0, 0.3])
def test_search_equals_the_loop(dim, page_size, num_candidates, fusion):
  k = 7 if num_candidates == 7 else NUM_DOCUMENTS
  settings = {"k": k, "num_candidates": num_candidates}
  found = find(build(dim, page_size), dim, fusion, **settings)
  want = wanted(dim, fusion, **settings)
  check(found, want, exactly=fusion == 0)
  if num_candidates == 99 and fusion == 0:  # there are ties, in each query
    assert all(len(set(row)) < NUM_DOCUMENTS for row in want[1].tolist())


def test_the_loop_meets_every_case():
  first, mixed = oracle(1, 0.0)
  mask = questions(1)[1]
  tokens = 2 * mixed - first
  assert (tokens[1] == 0).all()  # no words asked for
  empty = [0, 3, NUM_DOCUMENTS - 1]
  for d in empty:
    np.testing.assert_array_equal(tokens[:, d], -1000 * mask.sum(axis=1))
  assert (np.delete(tokens[2], empty) == 0).all()  # words that nobody has
  assert (tokens > 0).any()
  # The one word of a document keeps its sign; beside another it is lifted.
  assert ((tokens < 0) & (tokens > -100)).any()


def test_scores_are_those_of_the_model():
  words, offsets, cls, ids = documents(3)
  query_words, mask, query_cls, query_ids = questions(3)
  packed = colberter_texts.colbert.Documents(words, offsets, cls)
  chosen = colberter_texts.select_documents(
    colberter_texts.EncodedDocuments(packed, ids),
    np.arange(NUM_DOCUMENTS)[None],
  )
  fusion = jnp.float32(0.3)
  want = colberter.score(
    *map(jnp.asarray, (query_cls, query_words, mask)),
    *map(jnp.asarray, (chosen.cls[0], chosen.words[0], chosen.mask[0])),
    fusion, jnp.asarray(query_ids), jnp.asarray(chosen.word_ids[0]),
  ).scores  # fmt: skip
  found = find(build(3), 3, 0.3, k=NUM_DOCUMENTS)
  np.testing.assert_allclose(
    found.scores, np.take_along_axis(want, found.index, axis=1), rtol=1e-6
  )


@pytest.mark.parametrize("num_candidates", [7, 99])
def test_deleted_documents_are_never_found(num_candidates):
  live = np.arange(NUM_DOCUMENTS) % 3 > 0
  index = dataclasses.replace(build(1), live=jnp.asarray(live))
  settings = {"k": 7, "num_candidates": num_candidates}
  want = wanted(1, 0.0, live=live, **settings)
  check(find(index, 1, **settings), want)
  settings = {"k": NUM_DOCUMENTS, "num_candidates": 99}
  want = wanted(1, 0.0, live=live, **settings)
  check(find(index, 1, **settings), want)
  assert (want[0] == -1).any()


def test_an_index_from_disk_finds_the_same(tmp_path):
  words, offsets, cls, ids = documents(1)
  codec = codecs.FloatCodec(dim=1)
  names = [f"d{i}" for i in range(NUM_DOCUMENTS)]
  index_files.create(tmp_path, codec)
  cut = 11
  for part in (slice(0, cut), slice(cut, NUM_DOCUMENTS)):
    local = offsets[part.start : part.stop + 1]
    rows = slice(local[0], local[-1])
    index_files.add(
      tmp_path, names[part], {"values": words[rows]}, local - local[0],
      vectors={"cls": cls[part]}, word_ids=ids[rows],
    )  # fmt: skip
  live = np.ones(NUM_DOCUMENTS, bool)
  live[[2, 9, 20]] = False
  index_files.delete(tmp_path, [names[i] for i in np.flatnonzero(~live)])
  want = wanted(1, 0.0, k=10, num_candidates=99, live=live)
  for stored in (
    index_files.open_index(tmp_path),
    index_files.compact(tmp_path),
  ):
    stored.verify()
    read = stored.load()
    vectors = token_index.store_vectors(read.vectors["cls"])
    index = token_index.from_payload(
      stored.codec(), read.payload, read.offsets, word_ids=read.word_ids,
      candidates={"cls": vectors},
    )  # fmt: skip
    found = find(index, 1)
    place = np.array([names.index(name) for name in read.ids])
    np.testing.assert_array_equal(place[found.index], want[0])
    np.testing.assert_array_equal(found.scores, want[1])


def test_only_documents_without_words():
  cls = documents(1)[2][:2]
  index = token_index.build(
    np.zeros((0, 1), np.float32), np.zeros(3, np.int64),
    word_ids=np.zeros(0, np.uint32),
    candidates={"cls": token_index.store_vectors(cls)},
  )  # fmt: skip
  _, mask, query_cls, _ = questions(1)
  found = find(index, 1, k=2)
  want = (query_cls @ cls.T - 1000 * mask.sum(axis=1)[:, None]) / 2
  np.testing.assert_array_equal(
    found.scores, np.take_along_axis(want, np.asarray(found.index), axis=1)
  )


def test_shards_keep_their_words():
  words, offsets, cls, ids = documents(1)
  parts = []
  for first, last in ((0, 9), (9, NUM_DOCUMENTS)):
    local = offsets[first : last + 1]
    rows = slice(local[0], local[-1])
    vectors = token_index.store_vectors(cls[first:last])
    part = token_index.build(
      words[rows], local - local[0], page_size=4, word_ids=ids[rows],
      candidates={"cls": vectors},
    )  # fmt: skip
    parts.append(part)
  stacked = token_index.stack_shards(parts)
  for i, part in enumerate(parts):
    shard = jax.tree.map(lambda x, i=i: jnp.asarray(x[i]), stacked)
    k = part.num_documents
    want, got = find(part, 1, k=k), find(shard, 1, k=k)
    check(got, want)
  plain = [dataclasses.replace(parts[0], word_ids=None), parts[1]]
  with pytest.raises(ValueError, match="word_ids must be given of all shards"):
    token_index.stack_shards(plain)


def test_word_ids_are_counted_as_bytes():
  index = build(1, page_size=1)
  plain = dataclasses.replace(index, word_ids=None)
  assert len(index.word_ids) >= len(documents(1)[3])
  assert index.num_bytes - plain.num_bytes == 4 * len(index.word_ids)


@pytest.mark.unchecked
def test_errors_name_the_argument():
  words, offsets, _, ids = documents(1)
  with pytest.raises(ValueError, match=f"payload_rows={len(ids)}, word_ids=3"):
    token_index.build(words, offsets, word_ids=ids[:3])
  with pytest.raises(TypeError, match="word_ids must be uint32, got int64"):
    token_index.build(words, offsets, word_ids=ids.astype(np.int64))
  index = build(1)
  queries, mask, cls, query_ids = map(jnp.asarray, questions(1))
  fuse = functools.partial(colberter_texts.search_fused, k=1)
  arrays = queries, mask, cls, jnp.zeros(())
  missing = "query_word_ids must be given for an index with word_ids"
  with pytest.raises(ValueError, match=missing):
    fuse(index, *arrays)
  for other in (search.search, functools.partial(xtr.search, k_prime=3)):
    with pytest.raises(ValueError, match=missing):
      other(index, queries, mask, k=1)
  plain = dataclasses.replace(index, word_ids=None)
  with pytest.raises(ValueError, match="query_word_ids must be None for an"):
    fuse(plain, *arrays, query_ids)
  with pytest.raises(ValueError, match=r"query_word_ids must have shape \(6, "):
    fuse(index, *arrays, query_ids[:, :2])
  with pytest.raises(TypeError, match="query_word_ids must be uint32, got int"):
    fuse(index, *arrays, query_ids.astype(jnp.int32))

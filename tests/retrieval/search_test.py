"""Search against a loop: exact, with candidates, in shards, with deletions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from tests.compiled import run
from tokjax.kernels.maxsim import EMPTY_SCORE
from tokjax.retrieval import (
  codecs,
  index_files,
  index_scoring,
  muvera,
  search,
  token_index,
)

find = functools.partial(run, search.search)
DIM, NUM_DOCUMENTS, NUM_QUERIES = 16, 40, 5


def corpus(seed=0, num_documents=NUM_DOCUMENTS, longest=60):
  random = np.random.default_rng(seed)
  lengths = random.integers(1, longest, num_documents)
  lengths[[0, 3, num_documents - 1]] = 0  # first, inner and last are empty
  offsets = np.concatenate([[0], np.cumsum(lengths)])
  tokens = random.standard_normal((offsets[-1], DIM)).astype(np.float32)
  return tokens / np.linalg.norm(tokens, axis=1, keepdims=True), offsets


def questions(seed=1, num_tokens=7):
  random = np.random.default_rng(seed)
  shape = (NUM_QUERIES, num_tokens, DIM)
  mask = random.random(shape[:2]) < 0.7
  mask[0] = True
  mask[1] = False  # a query without tokens scores 0 everywhere
  queries = random.standard_normal(shape).astype(np.float32)
  return queries, mask


def loop(tokens, offsets, queries, mask):
  scores = np.full((len(queries), len(offsets) - 1), EMPTY_SCORE)
  for i, query in enumerate(queries):
    for d, (start, end) in enumerate(
      zip(offsets[:-1], offsets[1:], strict=True)
    ):
      if end > start:
        best = (query @ tokens[start:end].T).max(axis=1)
        scores[i, d] = best[mask[i]].sum()
  return scores


def first_k(scores, k):
  index = np.argsort(-scores, axis=1, kind="stable")[:, :k]
  return index, np.take_along_axis(scores, index, axis=1)


def candidates(tokens, offsets):
  config = muvera.FDEConfig(
    dim=DIM, num_simhash_bits=2, num_repetitions=4, projection_dim=None
  )
  params = run(muvera.init, jax.random.key(0), config)
  fde = muvera.encode_corpus(params, config, tokens, offsets)
  return {
    "mean": token_index.store_vectors(
      token_index.mean_vectors(tokens, offsets)
    ),
    "fde": token_index.store_vectors(
      fde, name="int8", fde_params=params, fde_config=config
    ),
  }


def check(found, scores, k=10):
  index, values = first_k(scores, k)
  np.testing.assert_array_equal(found.index, index)
  np.testing.assert_allclose(found.scores, values, rtol=1e-5, atol=1e-5)


@functools.cache
def small_index(page_size=4):
  tokens, offsets = corpus()
  return token_index.build(
    tokens,
    offsets,
    page_size=page_size,
    candidates=candidates(tokens, offsets),
  )


@pytest.mark.parametrize("page_size", [1, 4, 16, 100])
def test_exact_equals_loop(page_size):
  tokens, offsets = corpus()
  index = token_index.build(tokens, offsets, page_size=page_size)
  queries, mask = questions()
  check(find(index, queries, mask), loop(*corpus(), queries, mask))


def test_many_blocks_equal_loop(monkeypatch):
  """Blocks of 16 pages of one row: documents fill them unevenly."""
  monkeypatch.setattr(token_index, "_BLOCK_PAGES", 16)
  tokens, offsets = corpus()
  index = token_index.build(tokens, offsets, page_size=1)
  assert index.block_start.shape[0] > 10
  queries, mask = questions()
  want = loop(tokens, offsets, queries, mask)
  check(find(index, queries, mask), want)


@pytest.mark.parametrize("name", ["float16", "int8", "residual2", "pq8"])
def test_stored_codes_are_what_is_scored(name):
  tokens, offsets = corpus()
  codec = codecs.train(name, jax.random.key(0), tokens, num_centroids=32)
  index = token_index.build(tokens, offsets, codec)
  decode = jax.jit(lambda codec, x: codec.decode(codec.encode(x)))
  decoded = np.asarray(decode(codec, tokens))
  queries, mask = questions()
  check(find(index, queries, mask), loop(decoded, offsets, queries, mask))


@pytest.mark.parametrize("mode", ["mean", "fde"])
def test_all_documents_as_candidates_is_exact(mode):
  queries, mask = questions()
  found = find(small_index(), queries, mask, mode=mode, num_candidates=999)
  check(found, loop(*corpus(), queries, mask))


@pytest.mark.parametrize("mode", ["mean", "fde"])
def test_results_are_the_best_of_the_candidates(mode):
  index, (queries, mask) = small_index(), questions()
  first = run(
    index_scoring.candidate_scores, index.candidates[mode], queries, mask
  )
  chosen, _ = first_k(np.asarray(first), 12)
  scores = loop(*corpus(), queries, mask)
  allowed = np.full_like(scores, -np.inf)
  np.put_along_axis(
    allowed, chosen, np.take_along_axis(scores, chosen, 1), axis=1
  )
  found = find(index, queries, mask, mode=mode, num_candidates=12)
  check(found, allowed)


def test_given_query_vectors_choose_the_candidates():
  index, (queries, mask) = small_index(), questions()
  vectors = np.asarray(index.candidates["mean"].payload["values"])
  found = find(
    index,
    queries,
    mask,
    mode="mean",
    k=1,
    num_candidates=1,
    query_vectors=vectors[[5, 6, 7, 8, 9]],
  )
  assert found.index[:, 0].tolist() == [5, 6, 7, 8, 9]


def test_candidate_blocks_equal_one_product(monkeypatch):
  index, (queries, mask) = small_index(), questions()
  arrays = index.candidates["fde"], queries, mask
  want = run(index_scoring.candidate_scores, *arrays)
  monkeypatch.setattr(
    index_scoring, "_VECTOR_BLOCK", 7 * index.candidates["fde"].codec.dim
  )
  # Another function, which is traced anew.
  got = run(lambda *x: index_scoring.candidate_scores(*x), *arrays)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", [1, 8, 64])
def test_rescore_never_cuts_a_document(monkeypatch, block):
  """Lists of any lengths, with repeats and gaps, at any block size."""
  monkeypatch.setattr(index_scoring, "_RESCORE_PAGES", block)
  queries, mask = questions()
  scores = loop(*corpus(), queries, mask)
  random = np.random.default_rng(3)
  listed = random.integers(-1, NUM_DOCUMENTS, (NUM_QUERIES, 25))
  listed[0] = NUM_DOCUMENTS - 2  # one document 25 times
  listed[2] = -1
  listed[3] = 0  # only empty ones
  got = run(  # traced anew for each size
    lambda *x: index_scoring.rescore(*x),
    small_index(), queries, mask, listed.astype(np.int32),
  )  # fmt: skip
  want = np.where(
    listed >= 0,
    np.take_along_axis(scores, np.maximum(listed, 0), axis=1),
    -np.inf,
  )
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["exact", "mean"])
def test_deleted_documents_never_appear(mode):
  tokens, offsets = corpus()
  live = np.arange(NUM_DOCUMENTS) % 3 > 0
  index = dataclasses.replace(small_index(), live=jnp.asarray(live))
  queries, mask = questions()
  found = find(
    index, queries, mask, mode=mode, k=NUM_DOCUMENTS, num_candidates=99
  )
  scores = np.where(live[None], loop(tokens, offsets, queries, mask), -np.inf)
  index, values = first_k(scores, NUM_DOCUMENTS)
  np.testing.assert_array_equal(
    found.index, np.where(values > -np.inf, index, -1)
  )


@pytest.mark.parametrize("mode", ["exact", "mean", "fde"])
def test_batches_by_length_equal_one_batch(mode):
  queries, mask = questions(num_tokens=13)
  want = find(small_index(), queries, mask, mode=mode)
  got = search.search_batches(
    small_index(), queries, mask, mode=mode, batch_size=3, multiple=8
  )
  np.testing.assert_array_equal(got.index, want.index)
  np.testing.assert_allclose(got.scores, want.scores, rtol=1e-5, atol=1e-5)


def test_masked_query_tokens_have_no_influence():
  queries, mask = questions()
  poisoned = np.where(mask[..., None], queries, np.nan)
  for mode in ("exact", "mean", "fde"):
    want = find(small_index(), queries, mask, mode=mode)
    got = find(small_index(), poisoned, mask, mode=mode)
    np.testing.assert_array_equal(got.index, want.index)
    np.testing.assert_array_equal(got.scores, want.scores)


def shards(cuts):
  tokens, offsets = corpus()
  parts = []
  for first, last in zip(cuts[:-1], cuts[1:], strict=True):
    local = tokens[offsets[first] : offsets[last]]
    local_offsets = offsets[first : last + 1] - offsets[first]
    found = candidates(local, local_offsets)
    parts.append(
      token_index.build(local, local_offsets, page_size=4, candidates=found)
    )
  return token_index.stack_shards(parts)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("mode", ["exact", "mean", "fde"])
def test_shards_of_uneven_size_equal_one_index(kind, mode):
  cuts = [0, 13, 20, 31, NUM_DOCUMENTS]
  mesh = jax.make_mesh(
    (4,), ("data",), axis_types=(kind,), devices=jax.devices()[:4]
  )
  index = jax.device_put(shards(cuts), jax.NamedSharding(mesh, jax.P("data")))
  queries, mask = questions()
  function = functools.partial(
    search.search_sharded,
    mesh=mesh,
    axis_name="data",
    shard_sizes=tuple(np.diff(cuts).tolist()),
    mode=mode,
    num_candidates=13,
  )
  found = jax.jit(function)(index, queries, mask)
  check(found, loop(*corpus(), queries, mask))


def test_index_from_disk_finds_the_same(tmp_path):
  tokens, offsets = corpus()
  codec = codecs.Int8Codec(DIM)
  payload = codecs.encode_corpus(codec, tokens)
  ids = [f"doc {i}" for i in range(NUM_DOCUMENTS)]
  index_files.create(tmp_path, codec)
  index_files.add(tmp_path, ids, payload, offsets)
  stored = index_files.delete(tmp_path, ids[:20])
  loaded = stored.load()
  index = token_index.from_payload(
    stored.codec(), loaded.payload, loaded.offsets
  )
  queries, mask = questions()
  found = find(index, queries, mask)
  scores = loop(
    np.asarray(codec.decode(jax.tree.map(jnp.asarray, payload))),
    offsets,
    queries,
    mask,
  )
  scores[:, :20] = -np.inf
  want, _ = first_k(scores, 10)
  assert [[loaded.ids[i] for i in row] for row in np.asarray(found.index)] == [
    [ids[i] for i in row] for row in want
  ]


def test_bytes_are_counted():
  tokens, offsets = corpus()
  index = token_index.build(tokens, offsets, codecs.Int8Codec(DIM), page_size=1)
  payload = sum(x.nbytes for x in index.payload.values())
  assert payload >= len(tokens) * index.codec.bytes_per_token
  assert index.num_bytes > payload


@pytest.mark.unchecked
def test_errors_name_the_argument():
  index, (queries, mask) = small_index(), questions()
  with pytest.raises(ValueError, match="mode must be one of 'exact', 'mean'"):
    search.search(index, queries, mask, mode="plaid")
  with pytest.raises(ValueError, match="k must lie in 1..40, got 41"):
    search.search(index, queries, mask, k=41)
  with pytest.raises(ValueError, match="num_candidates must lie in 10..40"):
    search.search(index, queries, mask, mode="mean", num_candidates=9)
  with pytest.raises(ValueError, match="queries_width=15, index_dim=16"):
    search.search(index, queries[..., :-1], mask)
  tokens, offsets = corpus()
  with pytest.raises(ValueError, match="offsets must run from 0"):
    token_index.build(tokens, offsets[:-2])
  with pytest.raises(ValueError, match="documents=40, mean_rows=3"):
    three = token_index.store_vectors(np.eye(3, dtype=np.float32))
    token_index.build(tokens, offsets, candidates={"mean": three})

"""Scores of a token index: all documents, listed documents, or candidates.

The parts that `tokjax.retrieval.search` puts together. Page maxima come from
one matrix product per block, and document maxima from log2(pages) shifted
maxima over them, so that neither a scatter nor a token mask is needed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import UInt32

from tokjax import checks, compat
from tokjax.kernels.maxsim import EMPTY_SCORE
from tokjax.retrieval import colberter_scores, muvera
from tokjax.retrieval.token_index import Candidates, TokenIndex
from tokjax.typing import Array, Bool, Float, Int

__all__ = [
  "Ranking",
  "as_ranking",
  "candidate_scores",
  "exact",
  "prepare_queries",
  "rescore",
]

# Float32 numbers of candidate vectors decoded at a time: 16 MiB.
_VECTOR_BLOCK = 1 << 22
# Pages gathered at a time when candidates are scored.
_RESCORE_PAGES = 64


class Ranking(NamedTuple):
  """Best documents of each query, best first; ties: lower index first.

  Attributes:
    index: position of the document in the index, int32; -1 where fewer than
      k documents were found.
    scores: MaxSim, float32; -inf where `index` is -1.
  """

  index: Int[Array, "*batch K"]
  scores: Float[Array, "*batch K"]


def exact(
  index: TokenIndex,
  queries: Float[Array, "Nq Q D"],
  query_mask: Bool[Array, "Nq Q"] | None,
  *,
  k: int,
) -> Ranking:
  """The k documents of largest MaxSim, by a scan over blocks of documents.

  Each step decodes one block, multiplies it with all query tokens and merges
  its documents into the k best so far: 2 Nq Q T D FLOPs in all, and
  4 Nq Q block_pages page_size bytes at a time.

  Args:
    index: the documents.
    queries: query tokens, any float dtype.
    query_mask: True where a query token counts; None for all.
    k: results per query, 1..Nd.

  Returns:
    The best documents, best first.

  Raises:
    ValueError: if sizes disagree or k is out of range.
  """
  checks.in_range(1, index.num_documents, k=k)
  queries, query_mask = prepare_queries(index, queries, query_mask)
  num_queries, num_tokens, width = queries.shape
  flat = queries.reshape(-1, width)
  size, pages = index.page_size, index.block_pages
  last_document = index.num_documents - 1

  def step(found, number):
    document = index.block_start[number] + jnp.arange(
      index.block_documents, dtype=jnp.int32
    )
    inside = document < index.block_start[number + 1]
    document = jnp.minimum(document, last_document)
    start = index.first_page[document[0]]
    best = _page_maxima(
      index, _slice(index.payload, start * size, pages * size), flat
    )
    rank = jax.lax.dynamic_slice_in_dim(index.page_rank, start, pages)
    best = _document_maxima(best, rank, index.max_pages)  # [pages, Nq * Q]
    last = index.first_page[document] + index.num_pages[document] - 1 - start
    best = best[jnp.clip(last, 0, pages - 1)]
    best = best.reshape(-1, num_queries, num_tokens)
    scores = jnp.sum(jnp.where(query_mask[None], best, 0), axis=2)
    empty = index.num_pages[document] == 0
    scores = jnp.where(empty[:, None], EMPTY_SCORE, scores)
    allowed = inside & index.live[document]
    scores = jnp.where(allowed[:, None], scores, -jnp.inf)  # [documents, Nq]
    return _merge(found, document, scores.T), None

  scores = jnp.full_like(flat, -jnp.inf, shape=(num_queries, k))
  scores = _varying(scores, index.payload)
  nothing = Ranking(
    index=jnp.full_like(scores, -1, dtype=jnp.int32), scores=scores
  )
  numbers = jnp.arange(index.block_start.shape[0] - 1, dtype=jnp.int32)
  return as_ranking(*reversed(jax.lax.scan(step, nothing, numbers)[0]))


def candidate_scores(
  candidates: Candidates,
  queries: Float[Array, "Nq Q D"],
  query_mask: Bool[Array, "Nq Q"],
  *,
  query_vectors: Float[Array, "Nq F"] | None = None,
) -> Float[Array, "Nq Nd"]:
  """Inner product of every query with the vector of every document.

  Vectors are decoded in blocks; the result holds 4 Nq Nd bytes.

  Args:
    candidates: one vector per document.
    queries: query tokens, used where no vectors are given.
    query_mask: True where a query token counts.
    query_vectors: see `search`.

  Returns:
    float32 scores, for ranking only: their scale has no meaning.

  Raises:
    ValueError: if the widths disagree.
  """
  if query_vectors is None:
    queries = jnp.where(query_mask[..., None], queries, 0)
    if candidates.fde_config is None:
      query_vectors = jnp.sum(queries.astype(jnp.float32), axis=1)
    else:
      query_vectors = muvera.encode_queries(
        candidates.fde_params, candidates.fde_config, queries, query_mask
      )
  checks.same_size(
    query_vectors_width=query_vectors.shape[1],
    candidates_width=candidates.codec.dim,
  )
  query_vectors = query_vectors.astype(jnp.float32)

  def score(payload):
    rows = candidates.codec.decode(payload)
    return jnp.matmul(rows, query_vectors.T, precision="highest")

  payload = candidates.payload
  total = jax.tree.leaves(payload)[0].shape[0]
  size = max(1, _VECTOR_BLOCK // candidates.codec.dim)
  if total <= size or payload["values"].dtype == jnp.float32:
    return score(payload).T

  def step(scores, number):
    # The last block overlaps the one before; the same scores are rewritten.
    start = jnp.minimum(number * size, total - size)
    block = score(_slice(payload, start, size))
    return jax.lax.dynamic_update_slice_in_dim(scores, block, start, 0), None

  start = jnp.zeros_like(query_vectors, shape=(total, query_vectors.shape[0]))
  start = _varying(start, payload)
  numbers = jnp.arange(-(-total // size), dtype=jnp.int32)
  return jax.lax.scan(step, start, numbers)[0].T


def rescore(
  index: TokenIndex,
  queries: Float[Array, "Nq Q D"],
  query_mask: Bool[Array, "Nq Q"] | None,
  documents: Int[Array, "Nq C"],
  query_word_ids: UInt32[Array, "Nq Q"] | None = None,
) -> Float[Array, "Nq C"]:
  """MaxSim of each query with its own list of documents.

  With word ids the match is exact, as in `colberter_scores.score`: products of
  different words count as 0 in the maximum.

  Only the pages of the listed documents are read and decoded, in blocks of a
  static size whose number depends on the lengths found: no document is cut,
  and short documents cost little. Queries are handled one after the other.

  Args:
    index: the documents.
    queries: query tokens, any float dtype.
    query_mask: True where a query token counts; None for all.
    documents: positions in the index; -1 for none.
    query_word_ids: ids that exact match compares; given if the index has
      some, and only then.

  Returns:
    float32 scores; EMPTY_SCORE for a document without tokens (with exact match
    PADDING_SCORE for each query word), -inf at -1.

  Raises:
    ValueError: if sizes disagree, or only one side has word ids.
    TypeError: if word ids are not uint32.
  """
  queries, query_mask = prepare_queries(
    index, queries, query_mask, query_word_ids
  )
  checks.same_size(queries=queries.shape[0], documents=documents.shape[0])
  size, block = index.page_size, min(index.block_pages, _RESCORE_PAGES)
  num_documents, num_tokens = documents.shape[1], queries.shape[1]
  room = num_documents * index.max_pages + block

  def one(inputs):
    query, query_mask, documents, word_ids = inputs  # [Q, D], [Q], [C], [Q]
    listed = documents >= 0
    documents = jnp.maximum(documents, 0)
    num_pages = jnp.where(listed, index.num_pages[documents], 0)
    ends = jnp.cumsum(num_pages)
    shift = index.first_page[documents] - (ends - num_pages)

    def step(number, best):
      slot = number * block + jnp.arange(block, dtype=jnp.int32)
      place = jnp.searchsorted(ends, slot, side="right")
      # Slots past the last page read some page; nobody looks at the result.
      page = slot + shift[jnp.minimum(place, num_documents - 1)]
      rows = (page * size)[:, None] + jnp.arange(size, dtype=jnp.int32)[None, :]
      payload, row_ids = jax.tree.map(
        lambda x: x[rows.reshape(-1)], (index.payload, index.word_ids)
      )
      similarity = _page_maxima(index, payload, query, row_ids, word_ids)
      return jax.lax.dynamic_update_slice_in_dim(
        best, similarity, number * block, 0
      )

    best = jnp.zeros_like(query, shape=(room, num_tokens))
    best = _varying(best, index.payload)
    best = jax.lax.fori_loop(0, -(-ends[-1] // block), step, best)
    rank = _ranks(num_pages, ends, room)
    best = _document_maxima(best, rank, index.max_pages)[ends - 1]  # [C, Q]
    scores = jnp.sum(jnp.where(query_mask[None, :], best, 0), axis=1)
    empty = EMPTY_SCORE
    if word_ids is not None:
      empty = colberter_scores.PADDING_SCORE * jnp.sum(query_mask)
    scores = jnp.where(num_pages > 0, scores, empty)
    return jnp.where(listed, scores, -jnp.inf)

  return jax.lax.map(one, (queries, query_mask, documents, query_word_ids))


def prepare_queries(index, queries, query_mask, query_word_ids=None):
  """float32 queries without NaN padding, and a mask; checks what is given."""
  checks.has_rank(3, queries=queries)
  checks.same_size(queries_width=queries.shape[2], index_dim=index.codec.dim)
  if query_mask is None:
    query_mask = jnp.ones_like(queries[..., 0], dtype=bool)
  checks.same_size(queries=queries.shape[0], query_mask=query_mask.shape[0])
  checks.same_size(
    queries_tokens=queries.shape[1], query_mask_tokens=query_mask.shape[1]
  )
  _check_word_ids(index, query_mask, query_word_ids)
  queries = jnp.where(query_mask[..., None], queries, 0)
  return queries.astype(jnp.float32), query_mask


def as_ranking(scores, index) -> Ranking:
  """Results whose score is -inf get the index -1."""
  return Ranking(jnp.where(scores > -jnp.inf, index, -1), scores)


def _check_word_ids(index, query_mask, query_word_ids):
  if query_word_ids is None and index.word_ids is not None:
    raise ValueError(
      "query_word_ids must be given for an index with word_ids, where only "
      "equal words match (colberter_texts.search_fused), got None"
    )
  if query_word_ids is None:
    return
  if index.word_ids is None:
    raise ValueError(
      "query_word_ids must be None for an index without word_ids, where exact "
      "match has nothing to compare"
    )
  if query_word_ids.shape != query_mask.shape:
    raise ValueError(
      f"query_word_ids must have shape {query_mask.shape}, got "
      f"{query_word_ids.shape}"
    )
  checks.has_dtype(jnp.uint32, query_word_ids=query_word_ids)


def _page_maxima(index, payload, query_tokens, row_ids=None, word_ids=None):
  """Largest similarity of each query token in each page, [pages, tokens].

  With ids of rows and of query tokens, that of different ones counts as 0.
  """
  rows = index.codec.decode(payload)
  # Rows first: the maximum then runs over an outer axis, in vector code.
  similarity = jnp.matmul(rows, query_tokens.T, precision="highest")
  if row_ids is not None:
    same = row_ids[:, None] == word_ids[None, :]
    similarity = jnp.where(same, similarity, 0)
  return jnp.max(
    similarity.reshape(-1, index.page_size, similarity.shape[1]), 1
  )


def _document_maxima(best, rank, max_pages):
  """Running maximum over the pages of a document, complete at its last page.

  After the step of width w a page holds the maximum over itself and the
  2 w - 1 pages before it in the same document.
  """
  width = 1
  while width < max_pages:
    before = jnp.concatenate([best[:width], best[:-width]])
    best = jnp.where((rank >= width)[:, None], jnp.maximum(best, before), best)
    width *= 2
  return best


def _ranks(num_pages, ends, room):
  """Position of each of `room` listed pages within its document."""
  start = jnp.zeros_like(ends, shape=(room,))
  # Where a document starts, its first slot; a running maximum carries it on.
  starts = jnp.where(num_pages > 0, ends - num_pages, 0)
  start = jax.lax.cummax(start.at[starts].max(starts))
  return jnp.arange(room, dtype=jnp.int32) - start


def _merge(found, document, scores):
  """The k best of those found before and a block [Nq, documents]."""
  document = jnp.broadcast_to(document[None, :], scores.shape)
  scores = jnp.concatenate([found.scores, scores], axis=1)
  index = jnp.concatenate([found.index, document], axis=1)
  # Earlier documents stand first, so ties keep the lower index.
  scores, place = jax.lax.top_k(scores, found.scores.shape[1])
  return Ranking(jnp.take_along_axis(index, place, axis=1), scores)


def _slice(payload, start, size):
  return jax.tree.map(
    lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), payload
  )


def _varying(x, payload):
  """Inside `shard_map`: as different on each device as the payload is."""
  return compat.varying_together(x, jax.tree.leaves(payload)[0])[0]

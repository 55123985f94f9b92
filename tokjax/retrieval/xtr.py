"""XTR: documents are scored from the tokens that token retrieval returns.

ColBERT retrieves tokens, then fetches every token of the documents they point
to and scores again. XTR trains the token retrieval itself (`train_scores`: a
query token sees only its best tokens of the whole batch) and then scores from
the retrieved tokens alone (`aggregate`, `search`): a similarity that was not
retrieved is imputed by the worst one that was.

The encoder is ColBERT's (`tokjax.retrieval.colbert`) with fewer rules about
text, see `text_config`. Published models are T5 encoders: lower-case text, the
end-of-sequence token scored, a linear head of width 128 without bias.
"""

import functools
from collections.abc import Hashable
from typing import Literal

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.kernels.maxsim import sharding
from tokjax.retrieval import (
  colbert,
  index_scoring,
  token_retrieval,
  xtr_scoring,
)
from tokjax.retrieval.index_scoring import Ranking
from tokjax.retrieval.token_index import TokenIndex
from tokjax.typing import Array, Bool, Float, Int

__all__ = [
  "aggregate",
  "search",
  "text_config",
  "train_scores",
  "train_scores_sharded",
]

# What a batch of queries may hold in training: a few queries of 32 tokens
# against 100,000 document tokens.
_BUDGET_BYTES = 256 << 20


def text_config(
  query_length: int = 32, document_length: int = 512
) -> colbert.ColbertConfig:
  """How XTR turns texts into scored tokens.

  No markers, no [MASK] expansion, no skipped words: every token is scored,
  the closing special token included, and scaled to unit length. Lower-casing
  is the tokenizer's affair.

  Args:
    query_length: most tokens of a query, specials included.
    document_length: most tokens of a document, specials included.

  Returns:
    What `colbert.encode_documents` and `encode_queries` take; works with any
    encoder, T5 or BERT-like.

  Example:
    >>> config = text_config()
    >>> config.query_marker, config.expand_queries, config.document_length
    (None, False, 512)

  Source: Lee et al., 2023, "Rethinking the Role of Token Retrieval in
  Multi-Vector Retrieval", and its published code; the query length of 32 is
  that of later code (WARP).
  """
  return colbert.ColbertConfig(
    query_length=query_length,
    document_length=document_length,
    query_marker=None,
    document_marker=None,
    expand_queries=False,
    skip_words=(),
  )


def train_scores(
  queries: Float[Array, "B Q D"],
  documents: Float[Array, "C N D"],
  query_mask: Bool[Array, "B Q"] | None = None,
  document_mask: Bool[Array, "C N"] | None = None,
  *,
  k_train: int,
  topk: Literal["exact", "threshold"] = "exact",
  z: Literal["retrieved", "positive"] = "retrieved",
  memory_budget_bytes: int = _BUDGET_BYTES,
) -> Float[Array, "B C"]:
  """Scores queries against the documents of a batch, as token retrieval would.

  Every query token retrieves its `k_train` best tokens among those of all
  documents together. A document's score is the mean, over the query tokens
  that retrieved one of its tokens, of the best one retrieved:

      score[i, j] = sum_a max_{b retrieved by (i, a)} <q[i, a], d[j, b]> / Z

  with Z the number of such query tokens, at least 1. A document of which
  nothing was retrieved scores 0 and passes no gradient. Once `k_train` covers
  the pool this is the mean MaxSim. Scores depend on the whole pool: a
  document's score changes with the documents beside it.

  Gradients go from each maximum to one document token, the lowest among ties,
  and to the query token; what is retrieved is a constant. Backward needs no
  similarities: only the number of each winner is kept.

  Args:
    queries: query tokens, float32 or bfloat16.
    documents: tokens of all documents of the batch, same dtype.
    query_mask: True where the query token counts; None for all.
    document_mask: True where the document token may be retrieved; None for
      all. Masked tokens are never retrieved, whatever `k_train` is.
    k_train: tokens a query token retrieves, static; more than there are means
      all. The paper tunes it in 32..320 with the batch size.
    topk: how ties at the last place are broken, static. "exact" retrieves
      `k_train` tokens, the lower position first; "threshold" all that reach
      the value of the last place, so that twins are treated alike.
    z: "retrieved" as above. "positive" is for parity with other code, where a
      token that was not retrieved counts as 0 inside the maximum and Z is the
      number of positive maxima, at least 0.001, so that a document whose
      retrieved similarities are all negative may be scaled up a thousandfold.
    memory_budget_bytes: bound on scratch, static: queries are scored a few at
      a time. One query is the least that is held.

  Returns:
    float32 scores. A document without valid tokens scores 0.

  Raises:
    ValueError: if sizes disagree, dtypes differ or a setting is out of range.

  Example:
    >>> import jax.numpy as jnp
    >>> queries = jnp.eye(2)[None]  # similarities are document coordinates
    >>> documents = jnp.array([[[0.9, 0.3], [0.2, 0.7]],
    ...                        [[0.8, 0.6], [0.1, 0.5]]])
    >>> [round(float(s), 2)
    ...  for s in train_scores(queries, documents, k_train=2)[0]]
    [0.8, 0.7]

  Cost: 6 B Q C N D FLOPs with backward, and one top-k of C N numbers for each
  query token. Holds the budget, 4 B Q C bytes of winners and, for bfloat16,
  the documents in float32, in which their gradient is summed.

  On an Explicit mesh queries may be sharded over their first axis, and every
  device scores its own; documents are gathered. On an Auto mesh the result is
  the same, but the compiler may gather the queries too: there, and wherever
  code runs inside `jax.shard_map`, use `train_scores_sharded`.

  Source: Lee et al., 2023, "Rethinking the Role of Token Retrieval in
  Multi-Vector Retrieval", equation 2. That negatives stay in the maximum, Z
  of at least 1, the tie rules and the blocks are ours.
  """
  checks.has_rank(3, queries=queries, documents=documents)
  checks.same_size(
    queries_dim=queries.shape[2], documents_dim=documents.shape[2]
  )
  checks.in_range(1, 1 << 31, k_train=k_train)
  checks.in_range(1, 1 << 62, memory_budget_bytes=memory_budget_bytes)
  checks.one_of(("exact", "threshold"), topk=topk)
  checks.one_of(("retrieved", "positive"), z=z)
  if queries.dtype != documents.dtype:
    raise ValueError(
      "queries and documents must have one dtype, "
      f"got {queries.dtype} and {documents.dtype}"
    )
  return _train_scores(
    queries,
    documents,
    _checked_mask("query_mask", query_mask, queries),
    _checked_mask("document_mask", document_mask, documents),
    xtr_scoring.Settings(k_train, topk, z, memory_budget_bytes),
  )


def train_scores_sharded(
  queries: Float[Array, "b Q D"],
  documents: Float[Array, "c N D"],
  query_mask: Bool[Array, "b Q"] | None = None,
  document_mask: Bool[Array, "c N"] | None = None,
  *,
  axis_name: Hashable,
  **settings,
) -> Float[Array, "b C"]:
  """`train_scores` of local queries against the documents of all devices.

  For `jax.shard_map`. Gathers the documents, then scores: the pool is the
  whole batch, and ties are broken as on one device. The transpose of the
  gathering sums a document's gradient over the devices.

  Args:
    queries: this device's queries.
    documents: this device's documents, equally many everywhere.
    query_mask: as in `train_scores`.
    document_mask: as in `train_scores`.
    axis_name: mesh axis over which documents are spread.
    **settings: as in `train_scores`.

  Returns:
    float32 scores, one column per document of the axis: those of device p are
    columns `p * c` to `(p + 1) * c`.

  Raises:
    ValueError: as `train_scores`.

  Example:
    >>> import functools
    >>> import jax, jax.numpy as jnp
    >>> auto = (jax.sharding.AxisType.Auto,)
    >>> mesh = jax.make_mesh((1,), ("data",), axis_types=auto)
    >>> score = functools.partial(
    ...     train_scores_sharded, k_train=2, axis_name="data")
    >>> data = jax.P("data")
    >>> jax.shard_map(score, mesh=mesh, in_specs=(data, data), out_specs=data)(
    ...     jnp.ones((3, 2, 4)), jnp.ones((5, 6, 4))).shape
    (3, 5)

  Cost: every device receives the C N D numbers of all documents. It could keep
  its own and exchange, for all B queries, the `k_train` best values of each
  query token: their k-th largest is a threshold that splits the pool. But that
  sends B Q k_train numbers from every device to every other, and B Q D and
  B C more for queries and scores. With two documents of 200 tokens of width
  128 per query of 32 tokens, it is more from 1,600 / k_train devices on.

  Source: ours.
  """

  def gather(x):
    return None if x is None else jax.lax.all_gather(x, axis_name, tiled=True)

  return train_scores(
    queries, gather(documents), query_mask, gather(document_mask), **settings
  )


def aggregate(
  document_ids: Int[Array, "Nq Q K"],
  scores: Float[Array, "Nq Q K"],
  query_mask: Bool[Array, "Nq Q"] | None = None,
  *,
  k: int,
  num_documents: int | None = None,
) -> Ranking:
  """Ranks documents by the tokens that each query token retrieved.

      score[D] = mean_a (best retrieved token of D for a, or missing[a])

  over valid query tokens a, where missing[a] is the lowest score that a
  retrieved: an upper bound of every similarity it did not. Documents with at
  least one retrieved token are ranked, no others.

  Args:
    document_ids: document of each retrieved token. Negative entries are
      dropped, as libraries for approximate search return them.
    scores: similarity of each retrieved token; entries with NaN or -inf are
      dropped.
    query_mask: True where the query token counts; None for all.
    k: results per query, static.
    num_documents: how many documents there are, static, at least k: fills a
      table [num_documents, Q] per query, and ids from there on are dropped.
      None sorts the Q K entries instead, whatever the ids: memory does not
      depend on the number of documents and no candidate is ever cut.

  Returns:
    Positions int32 and float32 scores, best first; ties: lower id first. -1
    and -inf where there are fewer than k candidates. A query token that
    retrieved nothing counts as similarity 0 to all.

  Raises:
    ValueError: if sizes disagree or k is out of range.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> ids = jnp.array([[[0, 1, 0], [1, 2, 2]]])
    >>> scores = jnp.array([[[0.9, 0.7, 0.5], [0.8, 0.6, 0.4]]])
    >>> found = jax.jit(aggregate, static_argnames="k")(ids, scores, k=3)
    >>> found.index.tolist()
    [[1, 0, 2]]
    >>> [round(s, 2) for s in found.scores.tolist()[0]]
    [0.75, 0.65, 0.55]

  Source: Lee et al., 2023, "Rethinking the Role of Token Retrieval in
  Multi-Vector Retrieval", equation 4; the two ways to compute it are ours.
  """
  checks.has_rank(3, document_ids=document_ids, scores=scores)
  if document_ids.shape != scores.shape:
    raise ValueError(
      f"document_ids and scores must have one shape, got {document_ids.shape} "
      f"and {scores.shape}"
    )
  checks.in_range(1, num_documents or 1 << 31, k=k)
  query_mask = _checked_mask("query_mask", query_mask, scores)
  one = functools.partial(_aggregate, k=k, num_documents=num_documents)
  return jax.vmap(one)(
    document_ids.astype(jnp.int32), scores.astype(jnp.float32), query_mask
  )


def search(
  index: TokenIndex,
  queries: Float[Array, "Nq Q D"],
  query_mask: Bool[Array, "Nq Q"] | None = None,
  *,
  k: int = 10,
  k_prime: int = 1000,
  block_size: int = 16_384,
) -> Ranking:
  """The k best documents by XTR, from an index in memory.

  Each query token retrieves its `k_prime` best tokens of the index, exactly:
  a scan over blocks of stored rows that keeps the best so far. Then documents
  are ranked by `aggregate`; no document is fetched or scored again. Once
  `k_prime` covers the tokens of the index, the ranking is that of MaxSim and
  scores are MaxSim divided by the number of query tokens.

  The scan reads all tokens, as exact MaxSim does (`search.search`): it states
  what XTR finds, and pays off where an approximate token index takes its
  place before `aggregate`. Wrap it in `jax.jit` with the keyword settings
  static.

  Args:
    index: the documents (retrieval/token_index.py).
    queries: query tokens, any float dtype; products and sums are float32.
    query_mask: True where a query token counts; None for all.
    k: results per query, 1..Nd.
    k_prime: tokens retrieved per query token; more than there are means all.
      The paper uses 40,000, its published code 1,000.
    block_size: stored rows scored at a time, static. Several times `k_prime`
      is fast.

  Returns:
    Positions int32 and float32 scores; -1 and -inf where fewer than k
    documents had a token retrieved, or the query has no valid token. Deleted
    documents are never retrieved.

  Raises:
    ValueError: if sizes disagree, a setting is out of range or the index has
      word ids.

  Example:
    >>> import functools
    >>> import jax, numpy as np
    >>> from tokjax.retrieval import token_index
    >>> tokens = np.array([[1, 0], [0, 1], [0.6, 0.8]], np.float32)
    >>> index = token_index.build(tokens, np.array([0, 2, 3]))
    >>> query = np.array([[[0.6, 0.8], [0.8, 0.6]]])
    >>> find = jax.jit(functools.partial(search, k=2, k_prime=2))
    >>> find(index, query).index.tolist()
    [[1, 0]]

  Cost: 2 Nq Q T D FLOPs for T stored rows, and a top-k of
  `block_size + k_prime` numbers per block and query token. Holds
  4 Nq Q block_size bytes of similarities and 8 Nq Q k_prime of results.

  Source: Lee et al., 2023, "Rethinking the Role of Token Retrieval in
  Multi-Vector Retrieval"; the scan is ours.
  """
  checks.in_range(1, index.num_documents, k=k)
  checks.in_range(1, 1 << 31, k_prime=k_prime)
  queries, query_mask = index_scoring.prepare_queries(
    index, queries, query_mask
  )
  documents, scores = token_retrieval.nearest_tokens(
    index, queries.reshape(-1, queries.shape[2]), k_prime, block_size=block_size
  )
  shape = (*query_mask.shape, -1)
  # Where there are no more documents than retrieved tokens, a table of them
  # is small, and faster than sorting the tokens.
  fits = index.num_documents <= query_mask.shape[1] * scores.shape[1]
  return aggregate(
    documents.reshape(shape),
    scores.reshape(shape),
    query_mask,
    k=k,
    num_documents=index.num_documents if fits else None,
  )


def _checked_mask(name, mask, array):
  """A mask over the first two axes of an array; all True for None."""
  if mask is None:
    return jnp.ones_like(array[:, :, 0], dtype=bool)
  if mask.shape != array.shape[:2]:
    raise ValueError(
      f"{name} must have shape {array.shape[:2]}, got {mask.shape}"
    )
  return mask


@functools.partial(jax.jit, static_argnames="settings")
def _train_scores(queries, documents, query_mask, document_mask, settings):
  def local(queries, query_mask, documents, document_mask):
    return xtr_scoring.pool_scores(
      queries, documents, query_mask, document_mask, settings
    )

  return sharding.over_query_shards(
    local, (queries, query_mask), (_whole(documents), _whole(document_mask))
  )


def _whole(x):
  """Gathered, where it is sharded on an Explicit mesh."""
  sharded = jax.typeof(x).sharding
  if all(axis is None for axis in sharded.spec):
    return x
  return jax.sharding.reshard(x, jax.NamedSharding(sharded.mesh, jax.P()))


def _aggregate(documents, scores, query_mask, *, k, num_documents):
  valid = query_mask[:, None] & (documents >= 0) & (scores > -jnp.inf)
  if num_documents is not None:
    valid &= documents < num_documents
  missing = jnp.min(jnp.where(valid, scores, jnp.inf), axis=1)
  missing = jnp.where(jnp.any(valid, axis=1), missing, 0)
  # What a retrieved token adds to a document that was given `missing`.
  gain = jnp.where(valid, scores - missing[:, None], 0)
  if num_documents is None:
    documents, total = _sorted_gains(documents, gain, valid)
    short = max(0, k - total.shape[0])
    documents = jnp.pad(documents, (0, short))
    total = jnp.pad(total, (0, short), constant_values=-jnp.inf)
  else:
    total = _table_of_gains(documents, gain, valid, num_documents)
  count = jnp.maximum(1, jnp.sum(query_mask))
  values, index = jax.lax.top_k((jnp.sum(missing) + total) / count, k)
  if num_documents is None:
    index = documents[index]
  return index_scoring.as_ranking(values, index)


def _table_of_gains(documents, gain, valid, num_documents):
  """The sum of every document's gains; -inf for one not retrieved."""
  row = jnp.where(valid, documents, num_documents)
  column = jax.lax.broadcasted_iota(jnp.int32, row.shape, 0)
  table = jnp.full_like(gain, -1, shape=(num_documents, gain.shape[0]))
  table = table.at[row, column].max(gain, mode="drop")
  total = jnp.sum(jnp.maximum(table, 0), axis=1)
  return jnp.where(jnp.any(table >= 0, axis=1), total, -jnp.inf)


def _sorted_gains(documents, gain, valid):
  """Retrieved documents, ascending, and their sums; -inf in spare slots."""
  none = jnp.iinfo(jnp.int32).max
  documents = jnp.where(valid, documents, none)
  token = jax.lax.broadcasted_iota(jnp.int32, documents.shape, 0)
  documents, token, loss = jax.lax.sort(
    tuple(x.reshape(-1) for x in (documents, token, -gain)), num_keys=3
  )

  def starts(x):  # True where a run of equal entries starts
    return jnp.concatenate([jnp.ones_like(x[:1], bool), x[1:] != x[:-1]])

  new = starts(documents)
  # The first of a (document, token) pair has the largest gain.
  gain = jnp.where(new | starts(token), -loss, 0)
  slot = jnp.cumsum(new) - 1
  total = jnp.zeros_like(gain).at[slot].add(gain)
  index = jnp.full_like(documents, none).at[slot].min(documents)
  return index, jnp.where(index < none, total, -jnp.inf)

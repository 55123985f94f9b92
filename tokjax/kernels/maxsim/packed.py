"""MaxSim over documents of different lengths, back to back, no padding."""

import functools

import jax
import jax.numpy as jnp

from tokjax import checks, compat
from tokjax.kernels.maxsim import sharding, xla
from tokjax.kernels.maxsim.api import DEFAULT_BUDGET_BYTES, mean_over_query
from tokjax.kernels.maxsim.reference import EMPTY_SCORE
from tokjax.typing import Array, Bool, Float, Int

__all__ = ["maxsim_packed"]


def maxsim_packed(
  queries: Float[Array, "Nq Q D"],
  tokens: Float[Array, "T D"],
  document_ids: Int[Array, " T"],
  query_mask: Bool[Array, "Nq Q"] | None = None,
  *,
  num_documents: int,
  mean: bool = False,
  memory_budget_bytes: int = DEFAULT_BUDGET_BYTES,
) -> Float[Array, "Nq num_documents"]:
  """Scores every query against documents stored one after the other.

  Same scores and gradients as `maxsim` on padded documents, without the
  padding: work follows the number of tokens. Tokens are multiplied with the
  queries a block at a time and a segmented maximum folds them into one row
  per document.

  Args:
    queries: query token vectors, float32 or bfloat16.
    tokens: token vectors of all documents, same dtype.
    document_ids: which document each token belongs to, ascending from 0. Ids
      of `num_documents` or more mark padding, whose rows may hold anything.
    query_mask: True where the query token counts; None for all.
    num_documents: number of documents, static; those without a token score
      `EMPTY_SCORE`.
    mean: divide by the number of valid query tokens, as in `maxsim`.
    memory_budget_bytes: bound on scratch; at least the maxima of one query,
      num_documents * Q floats, are held.

  Returns:
    float32 scores.

  Raises:
    ValueError: if ranks or sizes disagree, or dtypes differ.

  Example:
    >>> import jax.numpy as jnp
    >>> query = jnp.array([[[1.0, 0.0], [0.0, 1.0]]])
    >>> tokens = jnp.array([[0.6, 0.8], [0.8, 0.6], [1.0, 0.0]])
    >>> scores = maxsim_packed(
    ...     query, tokens, jnp.array([0, 0, 1]), num_documents=2)
    >>> [round(float(score), 4) for score in scores[0]]
    [1.6, 1.0]

  Cost: 2 * Nq * Q * T * D FLOPs; reads the tokens once per block of queries.

  On an Explicit mesh the queries may be sharded over their first axis; tokens
  must be whole, as documents may straddle any cut.

  Source: ours; the semantics are those of `maxsim`.
  """
  checks.has_rank(3, queries=queries)
  checks.has_rank(2, tokens=tokens, query_mask=query_mask)
  checks.has_rank(1, document_ids=document_ids)
  checks.same_size(queries_dim=queries.shape[2], tokens_dim=tokens.shape[1])
  checks.same_size(tokens=tokens.shape[0], document_ids=document_ids.shape[0])
  checks.in_range(1, 1 << 31, num_documents=num_documents)
  checks.in_range(1, 1 << 31, tokens=tokens.shape[0])
  if queries.dtype != tokens.dtype:
    raise ValueError(
      "queries and tokens must have one dtype, "
      f"got {queries.dtype} and {tokens.dtype}"
    )
  if query_mask is not None and query_mask.shape != queries.shape[:2]:
    raise ValueError(
      f"query_mask must have shape {queries.shape[:2]}, got {query_mask.shape}"
    )
  return _maxsim_packed(
    queries,
    tokens,
    document_ids,
    query_mask,
    num_documents=num_documents,
    mean=mean,
    memory_budget_bytes=memory_budget_bytes,
  )


@functools.partial(
  jax.jit, static_argnames=("num_documents", "mean", "memory_budget_bytes")
)
def _maxsim_packed(
  queries,
  tokens,
  document_ids,
  query_mask,
  *,
  num_documents,
  mean,
  memory_budget_bytes,
):
  def local(queries, query_mask, tokens, document_ids):
    queries, tokens, document_ids, query_mask = compat.varying_together(
      queries, tokens, document_ids, query_mask
    )
    scores = _scores(
      queries,
      tokens,
      document_ids,
      query_mask,
      num_documents,
      memory_budget_bytes,
    )
    if mean:
      found = _found(document_ids, num_documents)
      scores = mean_over_query(scores, queries, query_mask, found)
    return scores

  return sharding.over_query_shards(
    local, (queries, query_mask), (tokens, document_ids)
  )


def _found(document_ids, num_documents):
  """Whether each document has a token, [num_documents]."""
  # By bisection: a scatter would hold a second copy of all the ids.
  wanted = jnp.arange(num_documents, dtype=document_ids.dtype)
  place = jnp.searchsorted(document_ids, wanted)
  return document_ids.at[place].get(mode="fill", fill_value=-1) == wanted


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _scores(q, tokens, ids, query_mask, num_documents, memory_budget_bytes):
  return _forward(
    q, tokens, ids, query_mask, num_documents, memory_budget_bytes, False
  )[0]


def _scores_fwd(q, tokens, ids, query_mask, num_documents, memory_budget_bytes):
  scores, index = _forward(
    q, tokens, ids, query_mask, num_documents, memory_budget_bytes, True
  )
  return scores, (q, tokens, ids, query_mask, index)


def _scores_bwd(num_documents, memory_budget_bytes, saved, g):
  queries, tokens, ids, query_mask, index = saved  # index [Nq, Nd, Q]
  num_queries, query_tokens, dim = queries.shape
  wide = queries.astype(jnp.float32)
  if query_mask is not None:
    wide = jnp.where(query_mask[:, :, None], wide, 0)
  g = jnp.where(_found(ids, num_documents)[None, :], g.astype(jnp.float32), 0)
  tokens_or_zero = jnp.where((ids < num_documents)[:, None], tokens, 0)
  document_bytes = 2 * 4 * num_queries * query_tokens * dim
  block = max(1, min(num_documents, memory_budget_bytes // document_bytes))

  def step(carry, start, fresh):
    d_queries, d_tokens = carry
    weight = jax.lax.dynamic_slice_in_dim(g, start, block, 1)  # [Nq, b]
    weight = jnp.where(fresh[None, :], weight, 0)[:, :, None, None]
    row = jax.lax.dynamic_slice_in_dim(index, start, block, 1)  # [Nq, b, Q]
    gathered = tokens_or_zero[row].astype(jnp.float32)  # [Nq, b, Q, D]
    d_queries += jnp.sum(weight * gathered, axis=1)
    update = (weight * wide[:, None, :, :]).reshape(-1, dim)
    return d_queries, d_tokens.at[row.reshape(-1)].add(update)

  carry = (jnp.zeros_like(wide), jnp.zeros_like(tokens, dtype=jnp.float32))
  d_queries, d_tokens = xla.each_block(step, carry, num_documents, block)
  if query_mask is not None:
    d_queries = jnp.where(query_mask[:, :, None], d_queries, 0)
  return (
    d_queries.astype(queries.dtype),
    d_tokens.astype(tokens.dtype),
    None,
    None,
  )


_scores.defvjp(_scores_fwd, _scores_bwd)


def _forward(
  queries, tokens, ids, query_mask, num_documents, budget, return_index
):
  """Scores [Nq, Nd] and, if wanted, the token each query token met."""
  blocks = functools.partial(
    _forward_blocks,
    num_documents=num_documents,
    budget=budget,
    return_index=return_index,
  )
  scores, index = jax.lax.platform_dependent(
    queries,
    tokens,
    ids,
    query_mask,
    cpu=functools.partial(
      blocks, scratch=min(budget, xla.CPU_SCRATCH_BYTES), widen=True
    ),
    default=functools.partial(blocks, scratch=budget, widen=False),
  )
  found = _found(ids, num_documents)
  return jnp.where(found[None, :], scores, EMPTY_SCORE), index


def _forward_blocks(
  queries,
  tokens,
  ids,
  query_mask,
  *,
  num_documents,
  budget,
  return_index,
  scratch,
  widen,
):
  num_queries, query_tokens, dim = queries.shape
  columns = num_documents * query_tokens * 4  # bytes of one query's maxima
  copies = 2 if return_index else 1
  query_block = max(1, min(num_queries, budget // (columns * copies)))
  token_bytes = 4 * (query_block * query_tokens * copies + dim)
  token_block = max(1, min(tokens.shape[0], scratch // token_bytes))

  def of_queries(results, start, fresh):
    del fresh  # rows computed twice are written twice, alike
    query = jax.lax.dynamic_slice_in_dim(queries, start, query_block)
    best, index = _segment_max(
      query, tokens, ids, num_documents, token_block, return_index, widen
    )
    shape = (num_documents, query_block, query_tokens)
    best = jnp.swapaxes(best.reshape(shape), 0, 1)  # [q, Nd, Q]
    if query_mask is not None:
      mask = jax.lax.dynamic_slice_in_dim(query_mask, start, query_block)
      best = jnp.where(mask[:, None, :], best, 0)
    parts = [jnp.sum(best, axis=-1)]
    if return_index:
      parts.append(jnp.swapaxes(index.reshape(shape), 0, 1))
    return tuple(
      jax.lax.dynamic_update_slice_in_dim(whole, part, start, 0)
      for whole, part in zip(results, parts, strict=True)
    )

  shape = (num_queries, num_documents)
  results = [jnp.zeros_like(tokens, shape=shape, dtype=jnp.float32)]
  if return_index:
    shape = (*shape, query_tokens)
    results.append(jnp.zeros_like(tokens, shape=shape, dtype=jnp.int32))
  results = xla.each_block(of_queries, tuple(results), num_queries, query_block)
  return results if return_index else (results[0], None)


def _segment_max(
  queries, tokens, ids, num_documents, block, return_index, widen
):
  """Largest similarity per document, [Nd, Nq*Q], and its token position."""
  columns = queries.shape[0] * queries.shape[1]
  shape = (num_documents, columns)
  best = jnp.full_like(tokens, -jnp.inf, shape=shape, dtype=jnp.float32)
  carry = [best]
  if return_index:
    carry.append(jnp.zeros_like(tokens, shape=shape, dtype=jnp.int32))

  def step(carry, start, fresh):
    del fresh  # a maximum may see a token twice
    part = xla.rows(tokens, start, block)
    row = jax.lax.dynamic_slice_in_dim(ids, start, block)
    similarity = xla.similarities(part, queries, widen=widen)  # [R, Nq*Q]
    if not return_index:
      return (
        carry[0].at[row].max(similarity, mode="drop", indices_are_sorted=True),
      )
    return _fold_index(carry, similarity, row, start)

  carry = xla.each_block(step, tuple(carry), tokens.shape[0], block)
  return carry if return_index else (carry[0], None)


def _fold_index(carry, similarity, ids, start):
  """Folds a block into the maxima and the positions that reached them."""
  best, index = carry
  block = similarity.shape[0]
  # Documents of this block, numbered from 0 in order of appearance.
  new = jnp.concatenate([jnp.zeros_like(ids[:1]), ids[1:] != ids[:-1]])
  segment = jnp.cumsum(new)
  empty = jnp.full_like(similarity, -jnp.inf)
  largest = empty.at[segment].max(similarity, indices_are_sorted=True)
  position = jax.lax.broadcasted_iota(jnp.int32, similarity.shape, 0)
  reached = jnp.where(similarity == largest[segment], position, block - 1)
  first = jnp.full_like(reached, block - 1)
  first = first.at[segment].min(reached, indices_are_sorted=True)
  # Segments that do not exist keep an id past the end and are dropped.
  nowhere = jnp.full_like(ids, best.shape[0])
  document = nowhere.at[segment].set(ids, indices_are_sorted=True)
  old = best.at[document].get(mode="fill", fill_value=jnp.inf)
  better = largest > old  # an earlier block wins ties: lowest token
  old_index = index.at[document].get(mode="fill", fill_value=0)
  largest = jnp.where(better, largest, old)
  first = jnp.where(better, first + start, old_index)
  return (
    best.at[document].set(largest, mode="drop"),
    index.at[document].set(first, mode="drop"),
  )

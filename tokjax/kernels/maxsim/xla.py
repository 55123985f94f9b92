"""MaxSim in plain JAX over blocks of documents, bounded in memory.

One block is a matrix product of its tokens with all query tokens, laid out as
[documents, document tokens, query tokens]: the maximum then runs over a middle
axis and works on whole vectors of query tokens. On CPU a block is small enough
to stay in the cache between product and maximum; elsewhere it is as large as
the memory budget allows.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from tokjax.kernels.maxsim.reference import EMPTY_SCORE
from tokjax.typing import Array, Bool, Float, Int

__all__ = [
  "each_block",
  "maxsim_backward",
  "maxsim_forward",
  "rows",
  "similarities",
]

# Scratch of one block on CPU. Measured on two AMD cores that share 32 MiB of
# third-level cache: half and twice as much are slower by a tenth or more.
CPU_SCRATCH_BYTES = 4 << 20

# Query tokens of one matrix product on CPU. Measured on two Intel cores with
# 128 queries of 32 tokens: as many as the scratch holds, 3,200, runs at 85
# GFLOP/s, 1,024 at 233, 512 at 191.
_CPU_QUERY_TOKENS = 1024


def maxsim_forward(
  queries: Float[Array, "Nq Q D"],
  documents: Float[Array, "Nd N D"],
  query_mask: Bool[Array, "Nq Q"] | None,
  document_mask: Bool[Array, "Nd N"] | None,
  *,
  return_index: bool,
  memory_budget_bytes: int = 64 << 20,
):
  """Scores every query against every document, a block at a time.

  Args:
    queries: query vectors, float32 or bfloat16.
    documents: document vectors, same dtype.
    query_mask: True where the query token is valid; None for all.
    document_mask: True where the document token is valid; None for all.
    return_index: also return which document token each query token met.
    memory_budget_bytes: bound on what is held besides inputs and results. One
      document against one query is the least that is held.

  Returns:
    What `reference.maxsim_forward` returns.
  """
  blocks = functools.partial(_forward_blocks, return_index=return_index)
  cpu_bytes = min(memory_budget_bytes, CPU_SCRATCH_BYTES)
  result = jax.lax.platform_dependent(
    queries,
    documents,
    query_mask,
    document_mask,
    # Products of bfloat16 values are exact in float32, which CPUs are fast at.
    cpu=functools.partial(
      blocks,
      scratch_bytes=cpu_bytes,
      max_queries=max(1, _CPU_QUERY_TOKENS // queries.shape[1]),
      widen=True,
    ),
    default=functools.partial(
      blocks,
      scratch_bytes=memory_budget_bytes,
      max_queries=queries.shape[0],
      widen=False,
    ),
  )
  scores, index = result if return_index else (result, None)
  if document_mask is not None:
    found = jnp.any(document_mask, axis=1)  # [Nd]
    scores = jnp.where(found[None, :], scores, EMPTY_SCORE)
  return (scores, index) if return_index else scores


def _forward_blocks(
  queries,
  documents,
  query_mask,
  document_mask,
  *,
  return_index,
  scratch_bytes,
  max_queries,
  widen,
):
  num_queries, query_tokens, dim = queries.shape
  num_documents, num_tokens, _ = documents.shape
  itemsize = 4 if widen else documents.dtype.itemsize

  # Masking, and comparing with the maximum, may need a second array.
  copies = 1 + (document_mask is not None or return_index)

  def document_bytes(query_block):
    columns = query_block * query_tokens * copies
    return num_tokens * (columns * 4 + dim * itemsize)

  # All queries at once where a document's similarities to them fit.
  per_query = document_bytes(1) - document_bytes(0)
  query_block = _clip(
    (scratch_bytes - document_bytes(0)) // max(1, per_query),
    min(num_queries, max_queries),
  )
  document_block = _clip(
    scratch_bytes // max(1, document_bytes(query_block)), num_documents
  )

  def of_queries(results, query_start, fresh):
    del fresh  # rows computed twice are written twice, alike
    query = rows(queries, query_start, query_block)
    mask = rows(query_mask, query_start, query_block)

    def of_documents(results, document_start, fresh):
      del fresh
      parts = _block(
        query,
        rows(documents, document_start, document_block),
        mask,
        rows(document_mask, document_start, document_block),
        return_index=return_index,
        widen=widen,
      )
      return [
        jax.lax.dynamic_update_slice(
          whole,
          part,
          (query_start, document_start) + (0,) * (part.ndim - 2),
        )
        for whole, part in zip(results, parts, strict=True)
      ]

    return each_block(of_documents, results, num_documents, document_block)

  shape = (num_queries, num_documents)
  empty = [jnp.zeros_like(documents, shape=shape, dtype=jnp.float32)]
  if return_index:
    empty.append(
      jnp.zeros_like(documents, shape=(*shape, query_tokens), dtype=jnp.int32)
    )
  results = each_block(of_queries, empty, num_queries, query_block)
  return tuple(results) if return_index else results[0]


def _block(
  queries, documents, query_mask, document_mask, *, return_index, widen
):
  """Scores, and the arg max if wanted, of one block: [q, b], [q, b, Q]."""
  num_queries, query_tokens, _ = queries.shape
  num_documents, num_tokens, dim = documents.shape
  similarity = similarities(
    documents.reshape(num_documents * num_tokens, dim), queries, widen=widen
  ).reshape(num_documents, num_tokens, num_queries * query_tokens)
  if document_mask is not None:
    similarity = jnp.where(document_mask[:, :, None], similarity, -jnp.inf)
  best = jnp.max(similarity, axis=1)  # [b, q*Q]
  shape = (num_documents, num_queries, query_tokens)
  met = best.reshape(shape)
  if query_mask is not None:
    met = jnp.where(query_mask[None, :, :], met, 0)
  scores = jnp.sum(met, axis=-1).T  # [q, b]
  if not return_index:
    return (scores,)
  # The lowest position that reaches the maximum. Unlike argmax this is made of
  # plain vector operations; where NaN reaches nothing, the clip keeps it in
  # range.
  position = jax.lax.broadcasted_iota(jnp.int32, similarity.shape, 1)
  reached = jnp.where(similarity == best[:, None, :], position, num_tokens)
  index = jnp.minimum(jnp.min(reached, axis=1), num_tokens - 1)
  return scores, jnp.swapaxes(index.reshape(shape), 0, 1)


def similarities(
  tokens: Float[Array, "T D"],
  queries: Float[Array, "Nq Q D"],
  *,
  widen: bool,
) -> Float[Array, "T Nq*Q"]:
  """Inner products of tokens with all query tokens, float32.

  Args:
    tokens: document vectors of any documents.
    queries: query vectors.
    widen: multiply bfloat16 inputs as float32.

  Returns:
    One row per token, one column per query token.
  """
  flat = queries.reshape(-1, queries.shape[-1])  # [Nq*Q, D]
  if widen and tokens.dtype != jnp.float32:
    tokens, flat = tokens.astype(jnp.float32), flat.astype(jnp.float32)
  return jnp.matmul(
    tokens,
    flat.T,
    precision="highest" if tokens.dtype == jnp.float32 else None,
    preferred_element_type=jnp.float32,
  )


def maxsim_backward(
  g: Float[Array, "Nq Nd"],
  queries: Float[Array, "Nq Q D"],
  documents: Float[Array, "Nd N D"],
  query_mask: Bool[Array, "Nq Q"] | None,
  document_mask: Bool[Array, "Nd N"] | None,
  index: Int[Array, "Nq Nd Q"],
  *,
  memory_budget_bytes: int = 64 << 20,
):
  """Sends the gradient of each score through its arg max, a block at a time.

  Gathers the documents' winning rows for the queries, and adds each query
  row, times its gradient, to the document row it met. Sums are float32.

  Args:
    g: gradient with respect to the scores.
    queries: as given to `maxsim_forward`.
    documents: as given to `maxsim_forward`.
    query_mask: as given to `maxsim_forward`.
    document_mask: as given to `maxsim_forward`.
    index: as returned by `maxsim_forward`.
    memory_budget_bytes: bound on what is held besides inputs and results.

  Returns:
    What `reference.maxsim_backward` returns.
  """
  num_queries, query_tokens, dim = queries.shape
  num_documents, num_tokens, _ = documents.shape
  wide_queries = queries.astype(jnp.float32)
  if query_mask is not None:
    wide_queries = jnp.where(query_mask[:, :, None], wide_queries, 0)
  g = g.astype(jnp.float32)
  if document_mask is not None:
    g = jnp.where(jnp.any(document_mask, axis=1)[None, :], g, 0)
  # Per document: itself and its gradient in float32, and per query the rows
  # gathered and the rows to add.
  per_query = 4 * dim * 2 * query_tokens
  own = 4 * dim * 2 * num_tokens
  query_block = _clip((memory_budget_bytes - own) // per_query, num_queries)
  block = _clip(
    memory_budget_bytes // (own + query_block * per_query), num_documents
  )

  def of_documents(carry, start, fresh_documents):
    d_queries, d_documents = carry
    part = rows(documents, start, block).astype(jnp.float32)  # [b, N, D]
    mask = rows(document_mask, start, block)
    if mask is not None:
      part = jnp.where(mask[:, :, None], part, 0)  # NaN padding must not spread
    part = part.reshape(block * num_tokens, dim)

    def of_queries(carry, query_start, fresh_queries):
      d_queries, d_part = carry
      weight = jax.lax.dynamic_slice(
        g, (query_start, start), (query_block, block)
      )
      fresh = fresh_queries[:, None] & fresh_documents[None, :]
      weight = jnp.where(fresh, weight, 0)[:, :, None, None]
      met = jax.lax.dynamic_slice(
        index,
        (query_start, start, 0),
        (query_block, block, query_tokens),
      )
      number = jnp.arange(block, dtype=jnp.int32)[None, :, None]
      row = number * num_tokens + met  # [q, b, Q], row of `part`
      added = jnp.sum(weight * part[row], axis=1)  # [q, Q, D]
      old = rows(d_queries, query_start, query_block)
      query = rows(wide_queries, query_start, query_block)
      update = weight * query[:, None, :, :]  # [q, b, Q, D]
      return (
        jax.lax.dynamic_update_slice_in_dim(
          d_queries, old + added, query_start, 0
        ),
        d_part.at[row.reshape(-1)].add(update.reshape(-1, dim)),
      )

    carry = (d_queries, jnp.zeros_like(part))
    d_queries, d_part = each_block(of_queries, carry, num_queries, query_block)
    d_part = d_part.reshape(block, num_tokens, dim).astype(documents.dtype)
    old = rows(d_documents, start, block)
    d_part = jnp.where(fresh_documents[:, None, None], d_part, old)
    return d_queries, jax.lax.dynamic_update_slice_in_dim(
      d_documents, d_part, start, 0
    )

  carry = (jnp.zeros_like(wide_queries), jnp.zeros_like(documents))
  d_queries, d_documents = each_block(of_documents, carry, num_documents, block)
  if query_mask is not None:
    d_queries = jnp.where(query_mask[:, :, None], d_queries, 0)
  return d_queries.astype(queries.dtype), d_documents


def each_block(step: Callable, carry, size: int, block: int):
  """Folds a step over blocks of an axis; the last one is moved back to fit.

  The rows of the last two blocks may overlap. Doing them twice costs less than
  padding, which would copy the whole input.

  Args:
    step: maps `(carry, start, fresh)` to the next carry; `fresh[i]` is False
      where row `start + i` was part of an earlier block.
    carry: pytree of arrays.
    size: length of the axis.
    block: rows per step, at most `size`.

  Returns:
    The last carry.
  """
  if block == size:
    return step(carry, 0, jnp.ones(block, bool))

  def body(i, carry):
    start = jnp.minimum(i * block, size - block)
    return step(carry, start, start + jnp.arange(block) >= i * block)

  return jax.lax.fori_loop(0, -(-size // block), body, carry)


def _clip(block: int, size: int) -> int:
  return max(1, min(block, size))


def rows(x, start, block: int):
  """`block` rows from `start` on; everything, untouched, when that is all.

  Args:
    x: array, or None, which stays None.
    start: first row, may be traced.
    block: number of rows, static.

  Returns:
    The rows.
  """
  if x is None or x.shape[0] == block:
    return x
  if x.dtype == jnp.bfloat16:
    # Tied to the step; else the CPU compiler, which slices no bfloat16, turns
    # the whole array into float32 ahead of the loop.
    x, start = jax.lax.optimization_barrier((x, start))
  return jax.lax.dynamic_slice_in_dim(x, start, block, 0)

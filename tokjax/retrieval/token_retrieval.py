"""The best stored tokens of an index for each query token, exactly.

A scan over blocks of stored rows that keeps the best so far: what the first
stage of late interaction, and all of XTR, starts from.
"""

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.ops import selection
from tokjax.retrieval.token_index import TokenIndex
from tokjax.typing import Array, Float, Int32

__all__ = ["nearest_tokens"]


def nearest_tokens(
  index: TokenIndex,
  query_tokens: Float[Array, "Q D"],
  k: int,
  *,
  block_size: int = 16_384,
) -> tuple[Int32[Array, "Q K"], Float[Array, "Q K"]]:
  """Documents and similarities of the k best tokens of each query token.

  Tokens of deleted documents are never found, nor rows that fill a document's
  last page. Tokens of a document that are stored alike are all found.

  Args:
    index: the documents (retrieval/token_index.py), whatever their codec.
    query_tokens: vectors without mask, any float dtype; products are float32.
    k: tokens per query token, static; more than stored rows means all.
    block_size: rows scored at a time, static. Several times `k` is fast.

  Returns:
    The document of each token and its float32 inner product, best first; ties:
    lower row first. -1 and -inf where there were fewer than k tokens. K is k,
    or the number of rows if that is smaller.

  Raises:
    ValueError: if widths disagree or a setting is out of range.

  Example:
    >>> import jax, numpy as np
    >>> from tokjax.retrieval import token_index
    >>> tokens = np.array([[1, 0], [0, 1], [0.6, 0.8]], np.float32)
    >>> index = token_index.build(tokens, np.array([0, 2, 3]))
    >>> find = jax.jit(nearest_tokens, static_argnums=2)
    >>> documents, scores = find(index, np.array([[0.6, 0.8]]), 3)
    >>> documents.tolist()
    [[1, 0, 0]]

  Cost: 2 Q T D FLOPs for T stored rows, and a top-k of `block_size + k`
  numbers per block and query token. Holds 4 Q block_size bytes of similarities
  and 8 Q k of results.

  Source: ours.
  """
  checks.has_rank(2, query_tokens=query_tokens)
  checks.same_size(
    query_tokens_width=query_tokens.shape[1], index_dim=index.codec.dim
  )
  checks.in_range(1, 1 << 31, k=k, block_size=block_size)
  query_tokens = query_tokens.astype(jnp.float32)
  size = index.page_size
  num_pages = max(1, index.page_rank.shape[0] - index.block_pages)
  block = min(max(1, block_size // size), num_pages)
  k = min(k, num_pages * size)
  owner = _page_owners(index, num_pages)

  def step(number, best):
    # The last block is moved back to fit; what it repeats is masked out.
    start = jnp.minimum(number * block, num_pages - block)
    page = start + jnp.arange(block, dtype=jnp.int32)
    document = jax.lax.dynamic_slice_in_dim(owner, start, block)
    rank = jax.lax.dynamic_slice_in_dim(index.page_rank, start, block)
    position = rank[:, None] * size + jnp.arange(size, dtype=jnp.int32)[None]
    payload = jax.tree.map(
      lambda x: jax.lax.dynamic_slice_in_dim(x, start * size, block * size),
      index.payload,
    )
    allowed = (document >= 0) & (page >= number * block)
    allowed = allowed[:, None] & (
      position < index.num_tokens[document][:, None]
    )
    rows = index.codec.decode(payload)
    similarity = jnp.matmul(query_tokens, rows.T, precision="highest")
    allowed = jnp.broadcast_to(allowed.reshape(1, -1), similarity.shape)
    found = selection.top_k(similarity, min(k, block * size), allowed)
    place = jnp.where(found.index < 0, -1, found.index + start * size)
    found = selection.TopK(found.values, place)
    return selection.merge_top_k(best, found, k)

  shape = (query_tokens.shape[0], k)
  best = selection.TopK(
    jnp.full_like(query_tokens, -jnp.inf, shape=shape),
    jnp.full_like(query_tokens, -1, shape=shape, dtype=jnp.int32),
  )
  best = jax.lax.fori_loop(0, -(-num_pages // block), step, best)
  document = owner[jnp.maximum(best.index, 0) // size]
  return jnp.where(best.index < 0, -1, document), best.values


def _page_owners(index, num_pages):
  """Document of each page, int32; -1 for deleted ones and for spare pages."""
  document = jnp.arange(index.num_documents, dtype=jnp.int32)
  first = jnp.where(index.num_pages > 0, index.first_page, num_pages)
  owner = jnp.zeros_like(index.page_rank[:num_pages])
  owner = jax.lax.cummax(owner.at[first].set(document, mode="drop"))
  page = jnp.arange(num_pages, dtype=jnp.int32)
  inside = page < index.first_page[owner] + index.num_pages[owner]
  return jnp.where(inside & index.live[owner], owner, -1)

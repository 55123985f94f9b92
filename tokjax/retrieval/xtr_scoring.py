"""The training scores of XTR and their gradient, a block of queries at a time.

What `tokjax.retrieval.xtr.train_scores` runs after its checks. Forward writes
down which token of each document each query token met, so that backward needs
no similarities: the gradient of a block of them is one comparison, and two
matrix products carry it to queries and documents.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from tokjax import compat
from tokjax.kernels.maxsim import xla
from tokjax.typing import Array, Bool, Float, Int32

__all__ = ["Settings", "pool_scores"]

# float32 arrays of the size of a block's similarities that live at once:
# themselves, what is left of them by the masks, and what `top_k` and the
# comparisons with its result keep beside them.
_COPIES = 4


class Settings(NamedTuple):
  """Static settings of `pool_scores`; see `xtr.train_scores`."""

  k_train: int
  topk: Literal["exact", "threshold"]
  z: Literal["retrieved", "positive"]
  memory_budget_bytes: int


def pool_scores(
  queries: Float[Array, "B Q D"],
  documents: Float[Array, "C N D"],
  query_mask: Bool[Array, "B Q"],
  document_mask: Bool[Array, "C N"],
  settings: Settings,
) -> Float[Array, "B C"]:
  """Scores each query from its best tokens of the whole pool of documents.

  Args:
    queries: query tokens, float32 or bfloat16.
    documents: tokens of all documents, same dtype.
    query_mask: True where the query token counts.
    document_mask: True where the document token may be retrieved.
    settings: how, static.

  Returns:
    float32 scores; NaN for a query that met NaN in a valid token.
  """
  # NaN padding must not spread.
  queries = jnp.where(query_mask[:, :, None], queries, 0)
  documents = jnp.where(document_mask[:, :, None], documents, 0)
  arrays = compat.varying_together(
    queries, documents, query_mask, document_mask
  )
  return _pool_scores(*arrays, settings)


class _Block(NamedTuple):
  """Results of some queries; N as the winner where nothing was retrieved."""

  scores: Float[Array, "q C"]
  divisor: Float[Array, "q C"]
  winner: Int32[Array, "q Q C"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _pool_scores(queries, documents, query_mask, document_mask, settings):
  def step(scores, start, fresh):
    del fresh  # rows computed twice are written twice, alike
    found = score(start)
    return jax.lax.dynamic_update_slice_in_dim(scores, found.scores, start, 0)

  block, score = _blocks(
    queries, documents, query_mask, document_mask, settings
  )
  shape = (queries.shape[0], documents.shape[0])
  scores = jnp.zeros_like(queries, shape=shape, dtype=jnp.float32)
  return xla.each_block(step, scores, queries.shape[0], block)


def _pool_scores_fwd(queries, documents, query_mask, document_mask, settings):
  def step(found, start, fresh):
    del fresh
    return jax.tree.map(
      lambda whole, part: jax.lax.dynamic_update_slice_in_dim(
        whole, part, start, 0
      ),
      found,
      score(start),
    )

  block, score = _blocks(
    queries, documents, query_mask, document_mask, settings
  )
  shapes = jax.eval_shape(score, 0)
  found = jax.tree.map(
    lambda x: jnp.zeros_like(
      queries, shape=(queries.shape[0], *x.shape[1:]), dtype=x.dtype
    ),
    shapes,
  )
  found = xla.each_block(step, found, queries.shape[0], block)
  return found.scores, (queries, documents, found.divisor, found.winner)


def _pool_scores_bwd(settings, saved, g):
  queries, documents, divisor, winner = saved
  block = _block_size(queries, documents, settings)
  flat = documents.reshape(-1, documents.shape[2]).astype(jnp.float32)
  position = jnp.arange(documents.shape[1], dtype=jnp.int32)

  def step(carry, start, fresh):
    d_queries, d_flat = carry
    query, weight, divide, won = (
      xla.rows(x, start, block) for x in (queries, g, divisor, winner)
    )
    # Masked query tokens are zero: they give nothing to documents, and what
    # they get is dropped by the `where` that made them zero.
    weight = jnp.where(fresh[:, None], weight / divide, 0)  # [q, C]
    won = won[..., None] == position[None, None, None, :]  # [q, Q, C, N]
    d_similarity = jnp.where(won, weight[:, None, :, None], 0)
    d_similarity = d_similarity.reshape(-1, flat.shape[0])
    added = _product(d_similarity, flat, like=queries).reshape(query.shape)
    old = xla.rows(d_queries, start, block)
    query = query.reshape(-1, query.shape[2]).astype(jnp.float32)
    return (
      jax.lax.dynamic_update_slice_in_dim(d_queries, old + added, start, 0),
      d_flat + _product(d_similarity.T, query, like=queries),
    )

  d_queries = jnp.zeros_like(queries, dtype=jnp.float32)
  d_queries, d_flat = xla.each_block(
    step, (d_queries, jnp.zeros_like(flat)), queries.shape[0], block
  )
  d_documents = d_flat.reshape(documents.shape).astype(documents.dtype)
  return d_queries.astype(queries.dtype), d_documents, None, None


_pool_scores.defvjp(_pool_scores_fwd, _pool_scores_bwd)


def _blocks(queries, documents, query_mask, document_mask, settings):
  """Queries of a block, and the function of its first that scores it."""
  block = _block_size(queries, documents, settings)

  def score(start):
    return _score_block(
      xla.rows(queries, start, block),
      documents,
      xla.rows(query_mask, start, block),
      document_mask,
      settings,
    )

  return block, score


def _block_size(queries, documents, settings):
  pool = documents.shape[0] * documents.shape[1]
  per_query = 4 * _COPIES * queries.shape[1] * pool
  size = settings.memory_budget_bytes // max(1, per_query)
  return max(1, min(size, queries.shape[0]))


def _score_block(queries, documents, query_mask, document_mask, settings):
  num_documents, num_tokens, dim = documents.shape
  similarity = _product(
    queries.reshape(-1, dim), documents.reshape(-1, dim).T, like=queries
  )  # [q*Q, C*N]
  # Adding 0.0 would be optimised away; `top_k` puts -0.0 below 0.0.
  similarity = jnp.where(similarity == 0, 0.0, similarity)
  valid = document_mask.reshape(1, -1)
  similarity = jnp.where(valid, similarity, -jnp.inf)
  kept, sound = _retrieved(similarity, settings)
  rest = 0.0 if settings.z == "positive" else -jnp.inf
  shape = (*query_mask.shape, num_documents, num_tokens)
  kept = (kept & valid).reshape(shape)
  similarity = jnp.where(kept, similarity.reshape(shape), rest)
  best = jnp.max(similarity, axis=-1)  # [q, Q, C]
  # The lowest position that reaches the maximum.
  position = jax.lax.broadcasted_iota(jnp.int32, shape, 3)
  reached = kept & (similarity == best[..., None])
  winner = jnp.min(jnp.where(reached, position, num_tokens), axis=-1)
  counted = (winner < num_tokens) & query_mask[:, :, None]
  met = jnp.where(counted, best, 0)
  if settings.z == "positive":
    divisor = jnp.maximum(jnp.sum(met > 0, axis=1), 1e-3)
  else:
    divisor = jnp.maximum(jnp.sum(counted, axis=1), 1)
  # NaN among the similarities of a query shows in all its scores.
  sound = jnp.all(sound.reshape(query_mask.shape) | ~query_mask, axis=1)
  divisor = jnp.where(sound[:, None], divisor, jnp.nan).astype(jnp.float32)
  return _Block(jnp.sum(met, axis=1) / divisor, divisor, winner)


def _retrieved(similarity, settings):
  """Which tokens of a row [n, C*N] are retrieved; which rows hold no NaN."""
  k = min(settings.k_train, similarity.shape[1])
  values, place = jax.lax.top_k(similarity, k)
  least = values[:, -1:]
  kept = similarity >= least
  if settings.topk == "exact":
    # Among those that tie at the last place `top_k` took the lowest, up to the
    # highest position that it returned: no need to scatter all of them.
    last = jnp.max(jnp.where(values == least, place, -1), axis=1)
    position = jax.lax.broadcasted_iota(jnp.int32, similarity.shape, 1)
    kept &= (similarity > least) | (position <= last[:, None])
  return kept, ~jnp.isnan(values[:, 0])


def _product(a, b, *, like):
  """Matrix product in the dtype given, as exact as `like` deserves."""
  return jnp.matmul(
    a,
    b,
    precision="highest" if like.dtype == jnp.float32 else None,
    preferred_element_type=jnp.float32,
  )

"""MaxSim in its shortest correct form: the definition of truth.

It holds every similarity at once, so it is for small inputs and for tests.
"""

import jax
import jax.numpy as jnp

from tokjax.typing import Array, Bool, Float, Int

__all__ = ["EMPTY_SCORE", "maxsim_backward", "maxsim_forward"]

# Score of a document without a valid token. Finite, so that a softmax over
# scores stays free of NaN.
EMPTY_SCORE = -1e9


def maxsim_forward(
  queries: Float[Array, "Nq Q D"],
  documents: Float[Array, "Nd N D"],
  query_mask: Bool[Array, "Nq Q"] | None,
  document_mask: Bool[Array, "Nd N"] | None,
  *,
  return_index: bool,
):
  """Scores every query against every document.

      scores[i, j] = sum_a max_b <queries[i, a], documents[j, b]>

  over valid a and b only. Products are taken in the input dtype and summed
  in float32.

  Args:
    queries: query vectors, float32 or bfloat16.
    documents: document vectors, same dtype.
    query_mask: True where the query token is valid; None for all.
    document_mask: True where the document token is valid; None for all.
    return_index: also return which document token each query token met.

  Returns:
    Scores float32[Nq, Nd], `EMPTY_SCORE` for documents without valid tokens;
    with `return_index` also int32[Nq, Nd, Q], lowest index among ties, 0 for
    an empty document and without meaning for a masked query token.
  """
  similarity = jnp.einsum(  # [Nq, Nd, Q, N]
    "iad,jbd->ijab",
    queries,
    documents,
    precision="highest" if queries.dtype == jnp.float32 else None,
    preferred_element_type=jnp.float32,
  )
  if document_mask is not None:
    valid = document_mask[None, :, None, :]
    similarity = jnp.where(valid, similarity, -jnp.inf)
  best = jnp.max(similarity, axis=-1)  # [Nq, Nd, Q]
  if query_mask is not None:
    best = jnp.where(query_mask[:, None, :], best, 0)
  scores = jnp.sum(best, axis=-1)
  if document_mask is not None:
    found = jnp.any(document_mask, axis=1)
    scores = jnp.where(found[None, :], scores, EMPTY_SCORE)
  if not return_index:
    return scores
  return scores, jnp.argmax(similarity, axis=-1).astype(jnp.int32)


def maxsim_backward(
  g: Float[Array, "Nq Nd"],
  queries: Float[Array, "Nq Q D"],
  documents: Float[Array, "Nd N D"],
  query_mask: Bool[Array, "Nq Q"] | None,
  document_mask: Bool[Array, "Nd N"] | None,
  index: Int[Array, "Nq Nd Q"],
):
  """Sends the gradient of each score through its arg max.

      d_queries[i, a] = sum_j g[i, j] * documents[j, index[i, j, a]]
      d_documents[j, b] = sum_{i, a: index[i, j, a] = b} g[i, j] * queries[i, a]

  with float32 sums. Masked query tokens and empty documents get and give
  nothing, whatever their rows hold.

  Args:
    g: gradient with respect to the scores.
    queries: as given to `maxsim_forward`.
    documents: as given to `maxsim_forward`.
    query_mask: as given to `maxsim_forward`.
    document_mask: as given to `maxsim_forward`.
    index: as returned by `maxsim_forward`.

  Returns:
    Gradients with respect to queries and documents, in their dtypes.
  """
  num_tokens = documents.shape[1]
  wide_queries = queries.astype(jnp.float32)
  wide_documents = documents.astype(jnp.float32)
  g = g.astype(jnp.float32)
  if query_mask is not None:
    wide_queries = jnp.where(query_mask[:, :, None], wide_queries, 0)
  if document_mask is not None:
    wide_documents = jnp.where(document_mask[:, :, None], wide_documents, 0)
    g = jnp.where(jnp.any(document_mask, axis=1)[None, :], g, 0)
  route = jax.nn.one_hot(index, num_tokens)  # [Nq, Nd, Q, N]
  if query_mask is not None:
    route = jnp.where(query_mask[:, None, :, None], route, 0)
  d_queries = jnp.einsum(
    "ij,ijab,jbd->iad", g, route, wide_documents, precision="highest"
  )
  d_documents = jnp.einsum(
    "ij,ijab,iad->jbd", g, route, wide_queries, precision="highest"
  )
  return d_queries.astype(queries.dtype), d_documents.astype(documents.dtype)

"""ColBERTer's scores: text vectors, MaxSim of word vectors, and their mix.

With word ids only equal words match. That takes a maximum of its own, since
words that differ do take part in it, with 0.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import UInt32

from tokjax import checks
from tokjax.kernels import maxsim
from tokjax.kernels.maxsim import api, sharding
from tokjax.typing import Array, Bool, Float, Implementation

__all__ = ["PADDING_SCORE", "Scores", "score", "score_pairs"]

# What the published code writes over the scores of padding before the maximum.
PADDING_SCORE = -1000.0


class Scores(NamedTuple):
  """Scores of ColBERTer, float32.

  Attributes:
    scores: w * cls_scores + (1 - w) * token_scores, w = sigmoid(fusion).
    cls_scores: inner products of the text vectors.
    token_scores: MaxSim of the word vectors.
  """

  scores: Float[Array, "*batch n"]
  cls_scores: Float[Array, "*batch n"]
  token_scores: Float[Array, "*batch n"]


def score(
  query_cls: Float[Array, "Nq C"],
  query_words: Float[Array, "Nq Q D"],
  query_mask: Bool[Array, "Nq Q"],
  document_cls: Float[Array, "Nd C"],
  document_words: Float[Array, "Nd W D"],
  document_mask: Bool[Array, "Nd W"],
  fusion: Float[Array, ""],
  query_word_ids: UInt32[Array, "Nq Q"] | None = None,
  document_word_ids: UInt32[Array, "Nd W"] | None = None,
  *,
  memory_budget_bytes: int = api.DEFAULT_BUDGET_BYTES,
  implementation: Implementation | None = None,
) -> Scores:
  """Scores every query against every document.

      token_scores[i, j] = sum_a max_b <query_words[i, a], document_words[j, b]>
      scores = sigmoid(fusion) cls_scores + (1 - sigmoid(fusion)) token_scores

  over valid a and b. With word ids the match is exact: a product of different
  words is set to 0 before the maximum is taken. A query word that the document
  lacks then gives 0, and a negative product is lifted to 0, as soon as the
  document has another word. Masked slots give -1000 to that maximum.

  A document without words has the token score EMPTY_SCORE of MaxSim, or with
  exact match -1000 for each query word; `scores` and `token_scores` have no
  gradient there. A query without words has the token score 0. What masked rows
  hold has no influence. Gradients of ties go to the lowest b.

  Args:
    query_cls: vectors of the query texts.
    query_words: vectors of their words, float32 or bfloat16.
    query_mask: True where a query word counts.
    document_cls: vectors of the documents.
    document_words: vectors of their words, dtype of `query_words`.
    document_mask: True where a document word counts.
    fusion: logit of the weight of `cls_scores`.
    query_word_ids: ids that exact match compares; None for no exact match.
    document_word_ids: the same of the documents, given if the others are.
    memory_budget_bytes: bound on scratch, static; at least one document
      against one query is held.
    implementation: of `maxsim`; without meaning for exact match, where only
      None is accepted.

  Returns:
    All three scores [Nq, Nd], float32.

  Raises:
    ValueError: if sizes disagree, or only one side has word ids.
    TypeError: if word ids are not uint32.
    NotImplementedError: for an implementation of exact match.

  Example:
    >>> cls, mask = jnp.ones((1, 2)), jnp.ones((1, 2), bool)
    >>> query = jnp.array([[[1.0], [2.0]]])
    >>> document = jnp.array([[[3.0], [4.0]]])
    >>> ids = jnp.array([[7, 8]], jnp.uint32), jnp.array([[9, 8]], jnp.uint32)
    >>> found = score(
    ...   cls, query, mask, cls, document, mask, jnp.zeros(()), *ids)
    >>> [x.item() for x in found]  # 2 * 4 = 8 is the one match
    [5.0, 2.0, 8.0]

  Cost: 2 Nq Nd (C + Q W D) FLOPs, with exact match as without.

  Source: Hofstaetter et al., 2022, "ColBERTer"; the order of the operations of
  exact match is that of the published code, which also has -1000 where MaxSim
  has EMPTY_SCORE, and shares out the gradient of ties as PyTorch does.
  """
  checks.has_rank(3, query_words=query_words, document_words=document_words)
  _check(
    (query_cls, query_words, query_mask, query_word_ids),
    (document_cls, document_words, document_mask, document_word_ids),
    implementation,
  )

  def local(query_words, document_words, of_queries, of_documents):
    query_cls, query_mask, query_ids = of_queries
    document_cls, document_mask, document_ids = of_documents
    cls_scores = jnp.matmul(
      query_cls,
      document_cls.T,
      precision="highest",
      preferred_element_type=jnp.float32,
    )
    if query_ids is None:
      return cls_scores, maxsim.maxsim(
        query_words,
        document_words,
        query_mask,
        document_mask,
        memory_budget_bytes=memory_budget_bytes,
        implementation=implementation,
      )
    return cls_scores, _exact(
      query_words,
      document_words,
      query_mask,
      document_mask,
      query_ids,
      document_ids,
      memory_budget_bytes=memory_budget_bytes,
    )

  cls_scores, token_scores = sharding.over_shards(
    local,
    query_words,
    document_words,
    (query_cls, query_mask, query_word_ids),
    (document_cls, document_mask, document_word_ids),
  )
  found = jnp.any(document_mask, axis=1)[None, :]
  return _fuse(cls_scores, token_scores, fusion, found)


def score_pairs(
  query_cls: Float[Array, "B C"],
  query_words: Float[Array, "B Q D"],
  query_mask: Bool[Array, "B Q"],
  document_cls: Float[Array, "B n C"],
  document_words: Float[Array, "B n W D"],
  document_mask: Bool[Array, "B n W"],
  fusion: Float[Array, ""],
  query_word_ids: UInt32[Array, "B Q"] | None = None,
  document_word_ids: UInt32[Array, "B n W"] | None = None,
  *,
  memory_budget_bytes: int = api.DEFAULT_BUDGET_BYTES,
  implementation: Implementation | None = None,
) -> Scores:
  """Scores each query against its own documents, as `score` does.

  For training lists (the positive passage first) and for candidates of each
  query.

  Args:
    query_cls: one text vector per row.
    query_words: word vectors, float32 or bfloat16.
    query_mask: True where a query word counts.
    document_cls: n text vectors per query.
    document_words: word vectors of n documents per query.
    document_mask: True where a document word counts.
    fusion: logit of the weight of `cls_scores`.
    query_word_ids: ids that exact match compares; None for no exact match.
    document_word_ids: the same of the documents.
    memory_budget_bytes: bound on scratch of all rows together, static.
    implementation: as in `score`.

  Returns:
    All three scores [B, n], float32.

  Raises:
    ValueError: if sizes disagree, or only one side has word ids.
    TypeError: if word ids are not uint32.
    NotImplementedError: for an implementation of exact match.

  Example:
    >>> import numpy as np
    >>> query, documents = np.ones((2, 3, 4)), np.ones((2, 5, 6, 4))
    >>> found = jax.jit(score_pairs)(
    ...   query[:, 0], query, query[..., 0] > 0, documents[:, :, 0], documents,
    ...   documents[..., 0] > 0, 0.0)
    >>> found.scores.shape, float(found.scores[0, 0])
    ((2, 5), 8.0)

  Source: as `score`.
  """
  checks.has_rank(3, query_words=query_words)
  checks.has_rank(4, document_words=document_words)
  _check(
    (query_cls, query_words, query_mask, query_word_ids),
    (document_cls, document_words, document_mask, document_word_ids),
    implementation,
  )
  checks.same_size(
    query_rows=query_words.shape[0], document_rows=document_words.shape[0]
  )

  def local(
    query_words, document_words, query_cls, document_cls, query_mask,
    document_mask, query_ids, document_ids,
  ):  # fmt: skip
    cls_scores = jnp.einsum(
      "bc,bnc->bn",
      query_cls,
      document_cls,
      precision="highest",
      preferred_element_type=jnp.float32,
    )
    if query_ids is None:
      return cls_scores, maxsim.maxsim_pairs(
        query_words,
        document_words,
        query_mask,
        document_mask,
        memory_budget_bytes=memory_budget_bytes,
        implementation=implementation,
      )
    budget = max(1, memory_budget_bytes // query_words.shape[0])
    one = functools.partial(_exact, memory_budget_bytes=budget)

    def of_row(query_words, document_words, *masks_and_ids):
      query_mask, document_mask, query_ids, document_ids = masks_and_ids
      return one(
        query_words[None],
        document_words,
        query_mask[None],
        document_mask,
        query_ids[None],
        document_ids,
      )[0]

    return cls_scores, jax.vmap(of_row)(
      query_words,
      document_words,
      query_mask,
      document_mask,
      query_ids,
      document_ids,
    )

  cls_scores, token_scores = sharding.over_row_shards(
    local, query_words, document_words, query_cls, document_cls, query_mask,
    document_mask, query_word_ids, document_word_ids,
  )  # fmt: skip
  found = jnp.any(document_mask, axis=2)
  return _fuse(cls_scores, token_scores, fusion, found)


def _check(query, document, implementation):
  """Sizes and dtypes of two sides, each (cls, words, mask, word ids)."""
  for side, (cls, words, mask, ids) in (
    ("query", query), ("document", document),
  ):  # fmt: skip
    for name, array, shape in (
      (f"{side}_cls", cls, (*words.shape[:-2], cls.shape[-1])),
      (f"{side}_mask", mask, words.shape[:-1]),
      (f"{side}_word_ids", ids, words.shape[:-1]),
    ):
      if array is not None and array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
    checks.has_dtype(jnp.uint32, **{f"{side}_word_ids": ids})
  for i, name in enumerate(("cls", "words")):
    widths = {
      f"query_{name}_width": query[i].shape[-1],
      f"document_{name}_width": document[i].shape[-1],
    }
    checks.same_size(**widths)
  if (query[3] is None) != (document[3] is None):
    raise ValueError("word ids must be given of both sides or of neither")
  if query[3] is not None and implementation is not None:
    raise NotImplementedError(
      f"implementation {implementation!r} has no exact match: leave it None"
    )


def _fuse(cls_scores, token_scores, fusion, found):
  """Mixes both scores; documents without words send no gradient to it."""
  weight = jax.nn.sigmoid(fusion.astype(jnp.float32))
  token_scores = jnp.where(
    found, token_scores, jax.lax.stop_gradient(token_scores)
  )
  scores = weight * cls_scores + (1 - weight) * token_scores
  scores = jnp.where(found, scores, jax.lax.stop_gradient(scores))
  return Scores(scores, cls_scores, token_scores)


@functools.partial(jax.jit, static_argnames="memory_budget_bytes")
def _exact(
  query_words,
  document_words,
  query_mask,
  document_mask,
  query_ids,
  document_ids,
  *,
  memory_budget_bytes,
):
  """MaxSim over equal words, [Nq, Nd], a block at a time both ways."""
  num_queries, query_size, _ = query_words.shape
  num_documents, document_size, _ = document_words.shape
  query_words = jnp.where(query_mask[..., None], query_words, 0)
  document_words = jnp.where(document_mask[..., None], document_words, 0)

  @jax.checkpoint  # else the gradient keeps every block's products
  def one(query, document):
    words, mask, ids = query  # [Q, D], [Q], [Q]
    found, found_mask, found_ids = document  # [W, D], [W], [W]
    products = jnp.matmul(  # [Q, W]
      words,
      found.T,
      precision="highest",
      preferred_element_type=jnp.float32,
    )
    # The order of these lines is the definition: see `score`.
    products = jnp.where(ids[:, None] == found_ids[None, :], products, 0)
    products = jnp.where(found_mask[None, :], products, PADDING_SCORE)
    return jnp.sum(jnp.where(mask, _first_max(products), 0))

  pair_bytes = 3 * 4 * query_size * document_size  # products, and masks
  room = max(1, memory_budget_bytes // max(1, pair_bytes))
  query_block = min(room, num_queries)
  document_block = min(max(1, room // query_block), num_documents)

  def of_query(query):
    return jax.lax.map(
      functools.partial(one, query),
      (document_words, document_mask, document_ids),
      batch_size=document_block,
    )

  return jax.lax.map(
    of_query, (query_words, query_mask, query_ids), batch_size=query_block
  )


@jax.custom_jvp
def _first_max(x):
  """Maximum over the last axis; its gradient goes to the lowest index."""
  return jnp.max(x, axis=-1)


@_first_max.defjvp
def _first_max_jvp(primals, tangents):
  (x,), (dx,) = primals, tangents
  best = jnp.max(x, axis=-1)
  position = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
  reached = jnp.where(x == best[..., None], position, x.shape[-1])
  first = position == jnp.min(reached, axis=-1)[..., None]
  return best, jnp.sum(jnp.where(first, dx, 0), axis=-1)

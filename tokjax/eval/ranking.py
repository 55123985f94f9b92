"""Ranking metrics of arrays: one number per query, float32, on any device.

All take `ranked_relevance`, the grade of the document at each rank, best rank
first, and `where`, True where a document was returned at that rank. A grade
above 0 is relevant. A rank that is not returned keeps its place and counts as
not relevant, whatever its grade holds (NaN included). Queries without any
relevant document score 0. Average over queries yourself: the mean over all
judged queries is what papers report.

No gradient is meant to flow: the metrics are steps of the scores.
"""

import jax.numpy as jnp

from tokjax import checks
from tokjax.typing import Array, Bool, Float, Int

__all__ = [
  "average_precision",
  "ndcg",
  "precision",
  "recall",
  "reciprocal_rank",
  "success",
]


def ndcg(
  ranked_relevance: Float[Array, "Nq K"],
  ideal_relevance: Float[Array, "Nq M"],
  where: Bool[Array, "Nq K"] | None = None,
  *,
  k: int,
) -> Float[Array, " Nq"]:
  """Discounted gain of the first k ranks over that of the best order.

  DCG = sum over ranks r of grade_r / log2(r + 1); nDCG = DCG / ideal DCG.
  The gain is the grade itself, as in trec_eval and BEIR, not 2**grade - 1.

  Args:
    ranked_relevance: grade at each rank; negative grades count as 0.
    ideal_relevance: grades of all judged documents, descending, 0 as padding.
    where: True where a document was returned; None: everywhere.
    k: cut, at least 1; may exceed K and M, the ranks beyond are empty.

  Returns:
    float32 in 0..1.

  Raises:
    ValueError: if the numbers of queries disagree or k is below 1.

  Example:
    >>> ranked = jnp.array([[1.0, 0.0, 2.0]])  # d2, unjudged, d1
    >>> ideal = jnp.array([[2.0, 1.0, 1.0]])
    >>> print(f"{ndcg(ranked, ideal, k=3)[0]:.4f}")
    0.6388

  Source:
    Jarvelin and Kekalainen 2002, "Cumulated gain-based evaluation of IR
    techniques", with the linear gain of trec_eval's `ndcg_cut`.
  """
  _check(ranked_relevance, where, k=k)
  checks.has_rank(2, ideal_relevance=ideal_relevance)
  checks.same_size(
    ranked_relevance_queries=ranked_relevance.shape[0],
    ideal_relevance_queries=ideal_relevance.shape[0],
  )
  gain = _discounted(_returned(ranked_relevance, where), k)
  ideal = _discounted(ideal_relevance, k)
  return _ratio(gain, ideal)


def recall(
  ranked_relevance: Float[Array, "Nq K"],
  num_relevant: Int[Array, " Nq"],
  where: Bool[Array, "Nq K"] | None = None,
  *,
  k: int,
  capped: bool = False,
) -> Float[Array, " Nq"]:
  """Share of the relevant documents that stand in the first k ranks.

  Args:
    ranked_relevance: grade at each rank.
    num_relevant: number of relevant documents of the query.
    where: True where a document was returned; None: everywhere.
    k: cut, at least 1.
    capped: divide by min(k, num_relevant), so that 1 can always be reached
      (BEIR's R_cap).

  Returns:
    float32 in 0..1.

  Raises:
    ValueError: if the numbers of queries disagree or k is below 1.

  Example:
    >>> print(recall(jnp.array([[0.0, 1.0, 1.0]]), jnp.array([4]), k=2))
    [0.25]
  """
  _check(ranked_relevance, where, k=k, num_relevant=num_relevant)
  found = jnp.sum(_relevant(ranked_relevance, where, k), axis=1)
  possible = jnp.minimum(num_relevant, k) if capped else num_relevant
  return _ratio(found, possible)


def precision(
  ranked_relevance: Float[Array, "Nq K"],
  where: Bool[Array, "Nq K"] | None = None,
  *,
  k: int,
) -> Float[Array, " Nq"]:
  """Share of the first k ranks that are relevant; empty ranks are not.

  Args:
    ranked_relevance: grade at each rank.
    where: True where a document was returned; None: everywhere.
    k: cut, at least 1.

  Returns:
    float32 in 0..1.

  Raises:
    ValueError: if `where` has another shape or k is below 1.

  Example:
    >>> print(precision(jnp.array([[0.0, 1.0, 1.0]]), k=2))
    [0.5]
  """
  _check(ranked_relevance, where, k=k)
  return jnp.sum(_relevant(ranked_relevance, where, k), axis=1) / k


def success(
  ranked_relevance: Float[Array, "Nq K"],
  where: Bool[Array, "Nq K"] | None = None,
  *,
  k: int,
) -> Float[Array, " Nq"]:
  """1 where at least one relevant document stands in the first k ranks.

  Args:
    ranked_relevance: grade at each rank.
    where: True where a document was returned; None: everywhere.
    k: cut, at least 1 (LoTTE uses 5).

  Returns:
    float32, 0 or 1.

  Raises:
    ValueError: if `where` has another shape or k is below 1.

  Example:
    >>> print(success(jnp.array([[0.0, 1.0], [0.0, 0.0]]), k=5))
    [1. 0.]
  """
  _check(ranked_relevance, where, k=k)
  return jnp.max(_relevant(ranked_relevance, where, k), axis=1, initial=0.0)


def reciprocal_rank(
  ranked_relevance: Float[Array, "Nq K"],
  where: Bool[Array, "Nq K"] | None = None,
  *,
  k: int | None = None,
) -> Float[Array, " Nq"]:
  """One over the rank of the first relevant document; 0 beyond rank k.

  Args:
    ranked_relevance: grade at each rank.
    where: True where a document was returned; None: everywhere.
    k: cut, at least 1 (10 in MS MARCO's MRR@10); None: all ranks.

  Returns:
    float32 in 0..1.

  Raises:
    ValueError: if `where` has another shape or k is below 1.

  Example:
    >>> print(reciprocal_rank(jnp.array([[0.0, 1.0, 1.0]]), k=10))
    [0.5]
  """
  _check(ranked_relevance, where, k=k)
  hit = _relevant(ranked_relevance, where, k)
  return jnp.max(hit / _ranks(hit), axis=1, initial=0.0)


def average_precision(
  ranked_relevance: Float[Array, "Nq K"],
  num_relevant: Int[Array, " Nq"],
  where: Bool[Array, "Nq K"] | None = None,
  *,
  k: int | None = None,
) -> Float[Array, " Nq"]:
  """Precision at the rank of each relevant document, averaged over them all.

  AP = (sum over relevant ranks r <= k of precision@r) / num_relevant.

  Args:
    ranked_relevance: grade at each rank.
    num_relevant: number of relevant documents of the query, found or not.
    where: True where a document was returned; None: everywhere.
    k: cut, at least 1; None: all ranks.

  Returns:
    float32 in 0..1; its mean over queries is MAP.

  Raises:
    ValueError: if the numbers of queries disagree or k is below 1.

  Example:
    >>> ranked = jnp.array([[1.0, 0.0, 1.0]])  # (1/1 + 2/3) / 2
    >>> print(f"{average_precision(ranked, jnp.array([2]))[0]:.4f}")
    0.8333
  """
  _check(ranked_relevance, where, k=k, num_relevant=num_relevant)
  hit = _relevant(ranked_relevance, where, k)
  total = jnp.sum(hit * jnp.cumsum(hit, axis=1) / _ranks(hit), axis=1)
  return _ratio(total, num_relevant)


def _check(ranked_relevance, where, *, k, num_relevant=None) -> None:
  checks.has_rank(2, ranked_relevance=ranked_relevance, where=where)
  checks.has_rank(1, num_relevant=num_relevant)
  queries, ranks = ranked_relevance.shape
  if where is not None:
    checks.same_size(
      ranked_relevance_queries=queries, where_queries=where.shape[0]
    )
    checks.same_size(ranked_relevance_ranks=ranks, where_ranks=where.shape[1])
  if num_relevant is not None:
    checks.same_size(
      ranked_relevance_queries=queries,
      num_relevant_queries=num_relevant.shape[0],
    )
  if k is not None and k < 1:
    raise ValueError(f"k must be at least 1, got {k}")


def _returned(ranked_relevance, where):
  if where is None:
    return ranked_relevance
  return jnp.where(where, ranked_relevance, 0)


def _relevant(ranked_relevance, where, k):
  """1.0 where a relevant document was returned, among the first k ranks."""
  hit = _returned(ranked_relevance, where)[:, :k] > 0
  return hit.astype(jnp.float32)  # [Nq, min(K, k)]


def _discounted(relevance, k):
  gain = jnp.maximum(relevance[:, :k].astype(jnp.float32), 0)
  return jnp.sum(gain / jnp.log2(_ranks(gain) + 1), axis=1)


def _ranks(x):
  return jnp.arange(1, x.shape[1] + 1, dtype=jnp.float32)[None, :]


def _ratio(part, whole):
  """part / whole, 0 where whole is 0."""
  whole = whole.astype(jnp.float32)
  some = whole > 0
  return jnp.where(some, part / jnp.where(some, whole, 1), 0)

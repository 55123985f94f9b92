"""Index quality: an approximate ranking against the exact one.

Documents are integers (their row in the corpus); no judgements are needed.
"""

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.typing import Array, Bool, Float, Int

__all__ = ["overlap", "spearman", "top_one_recall"]


def overlap(
  approximate: Int[Array, "Nq K"],
  exact: Int[Array, "Nq M"],
  where: Bool[Array, "Nq K"] | None = None,
) -> Float[Array, " Nq"]:
  """Share of the exact top M that an approximate top K contains.

  With K = M this is recall@K of the index. Costs one sort of
  K + M numbers per query.

  Args:
    approximate: documents found, each once, in any order; not negative.
    exact: the true best documents, each once, in any order; not negative.
    where: True where `approximate` holds a document; None: everywhere.

  Returns:
    float32 in 0..1.

  Raises:
    ValueError: if the numbers of queries disagree or M is 0.

  Example:
    >>> print(overlap(jnp.array([[4, 7, 1]]), jnp.array([[7, 4, 9]])))
    [0.6666667]
  """
  _check(approximate, exact, where)
  if where is not None:
    approximate = jnp.where(where, approximate, -1)
  # Each list holds a document once: what comes twice is in both.
  both = jnp.sort(jnp.concatenate([approximate, exact], axis=1), axis=1)
  shared = (both[:, 1:] == both[:, :-1]) & (both[:, 1:] >= 0)
  return jnp.sum(shared, axis=1, dtype=jnp.float32) / exact.shape[1]


def top_one_recall(
  approximate: Int[Array, "Nq K"],
  exact: Int[Array, "Nq M"],
  where: Bool[Array, "Nq K"] | None = None,
) -> Float[Array, " Nq"]:
  """1 where the exact best document is among those found (1Recall@K).

  Args:
    approximate: documents found, in any order.
    exact: the true ranking, best first; only its first column counts.
    where: True where `approximate` holds a document; None: everywhere.

  Returns:
    float32, 0 or 1.

  Raises:
    ValueError: if the numbers of queries disagree or M is 0.

  Example:
    >>> print(top_one_recall(jnp.array([[4, 7]]), jnp.array([[7, 4]])))
    [1.]
  """
  _check(approximate, exact, where)
  found = approximate == exact[:, :1]
  if where is not None:
    found = found & where
  return jnp.any(found, axis=1).astype(jnp.float32)


def spearman(
  approximate_scores: Float[Array, "Nq K"], exact_scores: Float[Array, "Nq K"]
) -> Float[Array, " Nq"]:
  """Rank correlation of two scorings of the same documents.

  Pearson's correlation of the ranks; equal scores share their mean rank.

  Args:
    approximate_scores: of K documents per query.
    exact_scores: of the same documents in the same order.

  Returns:
    float32 in -1..1; 0 where one scoring is constant.

  Raises:
    ValueError: if the shapes differ.

  Example:
    >>> one = jnp.array([[1.0, 2.0, 3.0]])
    >>> print(spearman(one, jnp.array([[10.0, 20.0, 15.0]])))
    [0.5]
  """
  checks.has_rank(
    2, approximate_scores=approximate_scores, exact_scores=exact_scores
  )
  for axis, name in enumerate(("queries", "documents")):
    checks.same_size(
      **{
        f"approximate_scores_{name}": approximate_scores.shape[axis],
        f"exact_scores_{name}": exact_scores.shape[axis],
      }
    )
  one = _centred_ranks(approximate_scores)  # [Nq, K]
  two = _centred_ranks(exact_scores)
  product = jnp.sum(one * two, axis=1)
  scale = jnp.sum(one * one, axis=1) * jnp.sum(two * two, axis=1)
  varied = scale > 0
  return jnp.where(
    varied, product * jax.lax.rsqrt(jnp.where(varied, scale, 1)), 0
  )


def _check(approximate, exact, where) -> None:
  checks.has_rank(2, approximate=approximate, exact=exact, where=where)
  checks.same_size(
    approximate_queries=approximate.shape[0], exact_queries=exact.shape[0]
  )
  if exact.shape[1] == 0:
    raise ValueError("exact must hold at least one document per query")
  if where is not None:
    checks.same_size(
      approximate_ranks=approximate.shape[1], where_ranks=where.shape[1]
    )
    checks.same_size(
      approximate_queries=approximate.shape[0],
      where_queries=where.shape[0],
    )


def _centred_ranks(scores):
  """Rank of each score minus the mean rank; equal scores share theirs."""
  num = scores.shape[1]
  order = jnp.argsort(scores, axis=1)
  ordered = jnp.take_along_axis(scores, order, axis=1)
  place = jnp.broadcast_to(jnp.arange(num)[None, :], scores.shape)
  differs = ordered[:, 1:] != ordered[:, :-1]  # [Nq, K - 1]
  starts = jnp.pad(differs, ((0, 0), (1, 0)), constant_values=True)
  ends = jnp.pad(differs, ((0, 0), (0, 1)), constant_values=True)
  # First and last place of the run of equal scores each place is in.
  first = jax.lax.cummax(jnp.where(starts, place, 0), axis=1)
  last = jax.lax.cummin(jnp.where(ends, place, num), axis=1, reverse=True)
  ranks = (first + last - num + 1).astype(jnp.float32) / 2
  return jnp.take_along_axis(ranks, jnp.argsort(order, axis=1), axis=1)

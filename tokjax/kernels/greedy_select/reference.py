"""Greedy selection in its shortest correct form: the definition of truth.

Every step computes the scores of all candidates anew from the tokens picked so
far, so it is for small inputs and for tests.
"""

import jax
import jax.numpy as jnp

from tokjax.typing import Array, Float, Int32

__all__ = ["DEPENDENT", "select"]

# A "dpp" candidate whose remaining variance is this part of its own or less
# is a combination of the picked ones, up to float32 rounding: variance 0.
DEPENDENT = 1e-6


def select(
  table: Float[Array, "B M N"],
  opening: Float[Array, "B N"],
  bonus: Float[Array, "B N"],
  *,
  num_keep: int,
  objective: str,
  weight: float,
) -> tuple[Int32[Array, "B K"], Float[Array, "B K"]]:
  """Picks `num_keep` columns one by one.

  The first pick has the largest `opening`; every later one the largest score
  given the set S picked before, among those with an opening above -inf:

      max_min, mmr:  bonus_j - weight max_{c in S} table_cj
      max_sum:       -sum_{c in S} table_cj
      coverage:      bonus_j + sum_i max(0, table_ij - best_i),
                     best_i = max(0, max_{c in S} table_ic)
      dpp:           bonus_j - table_jS table_SS^-1 table_Sj

  Args:
    table: similarities, any float dtype; computed with as float32.
    opening: score of the first pick, -inf where a column must never be picked.
    bonus: score of a column by itself; for "dpp" the diagonal of the table.
    num_keep: number of picks.
    objective: which score.
    weight: factor of the similarity in "max_min" and "mmr".

  Returns:
    The picks, ties to the lower index, and their scores; -inf where there was
    no candidate left.
  """

  def one(table, opening, bonus):
    table = table.astype(jnp.float32)
    allowed = opening > -jnp.inf
    picked = jnp.zeros_like(allowed)
    scores, index, gain = opening, [], []
    for step in range(num_keep):
      if step:
        scores = _scores(table, picked, bonus, objective, weight)
      scores = jnp.where(allowed & ~picked, scores, -jnp.inf)
      pick = jnp.argmax(scores)
      index.append(pick.astype(jnp.int32))
      gain.append(scores[pick])
      picked |= (jnp.arange(picked.size) == pick) & allowed
    return jnp.stack(index), jnp.stack(gain)

  return jax.vmap(one)(table, opening, bonus)


def _scores(table, picked, bonus, objective, weight):
  if objective in ("max_min", "mmr"):
    closest = jnp.max(jnp.where(picked[:, None], table, -jnp.inf), axis=0)
    return bonus - weight * closest
  if objective == "max_sum":
    return -jnp.sum(jnp.where(picked[:, None], table, 0), axis=0)
  if objective == "coverage":
    best = jnp.max(jnp.where(picked[None, :], table, 0), axis=1)  # [M]
    best = jnp.maximum(best, 0)
    return bonus + jnp.sum(jnp.maximum(table - best[:, None], 0), axis=0)
  # Rows and columns outside the set become those of the identity.
  both = picked[:, None] & picked[None, :]
  inner = jnp.where(both, table, jnp.eye(picked.size))
  outer = jnp.where(picked[:, None], table, 0)  # [N, N]
  explained = jnp.sum(outer * jnp.linalg.solve(inner, outer), axis=0)
  left = bonus - explained
  return jnp.where(left > DEPENDENT * bonus, left, 0)

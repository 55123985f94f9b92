"""Greedy selection in plain JAX: one scan, the state updated step by step.

A step costs O(N) for "max_min", "mmr" and "max_sum" (one row of the table),
O(M N) for "coverage" (all of it) and O(K N) for "dpp" (a row, and the Cholesky
factor so far).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from tokjax.kernels.greedy_select.reference import DEPENDENT
from tokjax.typing import Array, Float, Int32

__all__ = ["select", "select_by_rows"]


def select(
  table: Float[Array, "B M N"],
  opening: Float[Array, "B N"],
  bonus: Float[Array, "B N"],
  *,
  num_keep: int,
  objective: str,
  weight: float,
) -> tuple[Int32[Array, "B K"], Float[Array, "B K"]]:
  """Picks as `reference.select` does.

  Args:
    table: similarities, any float dtype; read as float32.
    opening: score of the first pick, -inf where a column must never be picked.
    bonus: score of a column by itself; for "dpp" the diagonal of the table.
    num_keep: number of picks.
    objective: which score.
    weight: factor of the similarity in "max_min" and "mmr".

  Returns:
    What `reference.select` returns.
  """

  def one(table, opening, bonus):
    if objective == "coverage":
      return _scan(*_coverage(table, bonus), opening, num_keep)
    if objective == "dpp":
      row = _row_of(table)
      return _scan(*_dpp(row, bonus, num_keep), opening, num_keep)
    return select_by_rows(
      _row_of(table),
      opening,
      bonus,
      num_keep=num_keep,
      objective=objective,
      weight=weight,
    )

  return jax.vmap(one)(table, opening, bonus)


def select_by_rows(
  row: Callable,
  opening: Float[Array, " N"],
  bonus: Float[Array, " N"],
  *,
  num_keep: int,
  objective: str,
  weight: float,
) -> tuple[Int32[Array, " K"], Float[Array, " K"]]:
  """Picks for one example, with the table given by its rows.

  Args:
    row: maps a position to its float32[N] similarities.
    opening: as in `select`.
    bonus: as in `select`.
    num_keep: number of picks.
    objective: "max_min", "mmr" or "max_sum".
    weight: as in `select`.

  Returns:
    Picks and scores, as in `reference.select`.
  """
  if objective == "max_sum":

    def add(total, pick, step):
      total = total + row(pick)
      return total, -total

    return _scan(add, jnp.zeros_like(opening), opening, num_keep)

  def nearer(closest, pick, step):
    closest = jnp.maximum(closest, row(pick))
    return closest, bonus - weight * closest

  start = jnp.full_like(opening, -jnp.inf)
  return _scan(nearer, start, opening, num_keep)


def _scan(update, state, opening, num_keep):
  """Pick, update, score; `update(state, pick, step) -> state, scores`."""
  position = jnp.arange(opening.size, dtype=jnp.int32)

  def best(scores, allowed):
    scores = jnp.where(allowed, scores, -jnp.inf)
    top = jnp.max(scores)
    # Two plain reductions are several times faster on CPU than `argmax`.
    pick = jnp.min(jnp.where(scores == top, position, opening.size - 1))
    return pick, top

  def step(carry, number):
    state, allowed, pick = carry
    allowed &= position != pick
    state, scores = update(state, pick, number)
    pick, gain = best(scores, allowed)
    return (state, allowed, pick), (pick, gain)

  allowed = opening > -jnp.inf
  pick, gain = best(opening, allowed)
  _, (picks, gains) = jax.lax.scan(
    step, (state, allowed, pick), jnp.arange(num_keep - 1)
  )
  return (
    jnp.concatenate([pick[None], picks]),
    jnp.concatenate([gain[None], gains]),
  )


def _row_of(table):
  return lambda pick: table[pick].astype(jnp.float32)


def _coverage(table, bonus):
  """Update and first state: what covers each target best so far."""

  def update(best, pick, step):
    best = jnp.maximum(best, table[:, pick].astype(jnp.float32))
    more = jnp.maximum(table.astype(jnp.float32) - best[:, None], 0)
    return best, bonus + jnp.sum(more, axis=0)

  return update, jnp.zeros_like(table[:, 0], dtype=jnp.float32)


def _dpp(row, bonus, num_keep):
  """Update and first state: variances left, rows of the Cholesky factor."""

  def update(state, pick, step):
    left, factor = state  # [N], [K - 1, N]
    variance = left[pick]
    product = jnp.matmul(factor[:, pick], factor, precision="highest")
    usable = variance > 0
    scale = jax.lax.rsqrt(jnp.where(usable, variance, 1.0))
    new = jnp.where(usable, (row(pick) - product) * scale, 0)
    factor = jax.lax.dynamic_update_index_in_dim(factor, new, step, 0)
    left = left - jnp.square(new)
    left = jnp.where(left > DEPENDENT * bonus, left, 0)
    return (left, factor), left

  left = jnp.where(jnp.isfinite(bonus), bonus, 0)
  factor = jnp.zeros_like(bonus, shape=(max(1, num_keep - 1), bonus.size))
  return update, (left, factor)

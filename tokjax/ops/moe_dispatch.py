"""Tokens to rows of experts and back, under static shapes.

    kept = keep_within_capacity(index, weights, capacity=c, num_experts=E)
    plan = plan_rows(jnp.where(kept, index, -1), num_experts=E)
    rows = gather_rows(x, plan)                  # sorted by expert
    y = combine_rows(experts(rows, plan.group_sizes), weights, plan)

A token asks for k experts; each such wish is an assignment, number t k + j of
token t. What is dropped, and what goes where, are two questions: an assignment
is dropped by an index of -1, and rows in one or several buffers hold the rest.

Source: Lepikhin et al. (2020), "GShard", capacity; Gale et al. (2022),
"MegaBlocks", rows sorted by expert and nothing dropped.
"""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.typing import Array, Bool, Float, Int, Int32

__all__ = [
  "RowPlan",
  "combine_rows",
  "expert_capacity",
  "gather_rows",
  "keep_within_capacity",
  "plan_rows",
]


class RowPlan(NamedTuple):
  """Where assignments go: M rows, those of a buffer sorted by expert.

  Attributes:
    assignment: that each row holds; -1 for a row that is empty.
    row: of each assignment; -1 for one that goes nowhere.
    group_sizes: rows of each expert.
    overflow: assignments for which their buffer had no row.
  """

  assignment: Int32[Array, " M"]
  row: Int32[Array, "T k"]
  group_sizes: Int32[Array, " E"]
  overflow: Int32[Array, ""]


def expert_capacity(
  num_tokens: int, *, num_chosen: int, num_experts: int, factor: float
) -> int:
  """Tokens that an expert takes at most: ceil(T k / E * factor).

  Args:
    num_tokens: T, that share the capacity.
    num_chosen: k.
    num_experts: E.
    factor: 1 where even loads just fit; published 1 to 1.25.

  Returns:
    At most T, more is of no use.

  Raises:
    ValueError: if the factor is negative.

  Example:
    >>> expert_capacity(4096, num_chosen=2, num_experts=8, factor=1.25)
    1280
  """
  checks.in_range(0, math.inf, factor=factor)
  checks.in_range(1, math.inf, num_experts=num_experts)
  capacity = num_tokens * num_chosen / num_experts * factor
  return min(num_tokens, math.ceil(round(capacity, 6)))


def keep_within_capacity(
  index: Int[Array, "T k"],
  weights: Float[Array, "T k"],
  *,
  capacity: int,
  num_experts: int,
  policy: Literal["probs", "position"] = "probs",
) -> Bool[Array, "T k"]:
  """Which assignments an expert with room for so many takes.

  Args:
    index: of experts; others than 0..E - 1 are not kept.
    weights: of their outputs.
    capacity: of each expert; 0 keeps nothing.
    num_experts: E.
    policy: who stays, "probs" the largest weights, of equal ones the first
      tokens; "position" the first tokens.

  Returns:
    True where it stays. No gradient passes.

  Raises:
    ValueError: if sizes differ or the policy is unknown.

  Example:
    >>> index = jnp.array([[0], [0], [1]])
    >>> weights = jnp.array([[0.2], [0.7], [0.1]])
    >>> keep = jax.jit(lambda index, weights: keep_within_capacity(
    ...   index, weights, capacity=1, num_experts=2))
    >>> keep(index, weights)[:, 0].tolist()
    [False, True, True]

  Cost: two sorts of T k numbers, with "probs" three.
  """
  checks.one_of(("probs", "position"), policy=policy)
  checks.in_range(0, math.inf, capacity=capacity)
  checks.same_size(index_tokens=index.shape[0], weights_tokens=weights.shape[0])
  checks.same_size(chosen=index.shape[1], weights_chosen=weights.shape[1])
  expert = _experts(index, num_experts)
  if policy == "probs":
    weights = jax.lax.stop_gradient(weights).astype(jnp.float32)
    # Stable: by weight, then those of one expert in that order.
    order = jnp.argsort(-weights.reshape(-1))
    order = order[jnp.argsort(expert[order])]
  else:
    order = jnp.argsort(expert)
  _, starts = _spans(expert, num_experts)
  place = _inverse(order) - starts[jnp.minimum(expert, num_experts - 1)]
  kept = (expert < num_experts) & (place < capacity)
  return kept.reshape(index.shape)


def plan_rows(
  index: Int[Array, "T k"],
  *,
  num_experts: int,
  num_buffers: int = 1,
  buffer_rows: int | None = None,
) -> RowPlan:
  """Gives every assignment a row, sorted by expert.

  One buffer for all experts is what grouped products read; one for each
  expert is [E, C, D]; one for the experts of each device is what can be sent.

  Args:
    index: of experts; others than 0..E - 1 go nowhere.
    num_experts: E.
    num_buffers: that share the experts evenly, each those of a stretch.
    buffer_rows: of each buffer; None for T k, or T where a buffer is for one
      expert, which always suffice if no token asks for an expert twice.

  Returns:
    The plan, M = num_buffers * buffer_rows. In a buffer rows of one expert are
    in the order of tokens, and empty rows come last.

  Raises:
    ValueError: if the buffers do not share the experts evenly.

  Example:
    >>> plan = jax.jit(lambda index: plan_rows(index, num_experts=2))(
    ...   jnp.array([[1], [0], [-1], [1]]))
    >>> plan.assignment.tolist(), plan.row[:, 0].tolist()
    ([1, 0, 3, -1], [1, 0, -1, 2])
    >>> plan.group_sizes.tolist(), int(plan.overflow)
    ([1, 2], 0)

  Cost: two sorts of T k numbers; nothing of size T k E.
  """
  checks.has_rank(2, index=index)
  checks.in_range(1, num_experts, num_buffers=num_buffers)
  checks.divisible(num_buffers, num_experts=num_experts)
  share = num_experts // num_buffers  # experts of a buffer
  rows = buffer_rows
  if rows is None:
    rows = index.shape[0] if share == 1 else index.size
  expert = _experts(index, num_experts)
  order = jnp.argsort(expert)  # stable
  counts, starts = _spans(expert, num_experts)
  counts = counts.reshape(num_buffers, share)
  starts = starts.reshape(num_buffers, share)[:, 0]
  buffer = jnp.minimum(expert // share, num_buffers - 1)
  within = _inverse(order) - starts[buffer]
  placed = (expert < num_experts) & (within < rows)
  row = jnp.where(placed, buffer * rows + within, -1)
  slot = jnp.arange(rows)[None]
  held = slot < jnp.sum(counts, axis=1, keepdims=True)
  source = jnp.where(held, starts[:, None] + slot, 0)
  ends = jnp.minimum(jnp.cumsum(counts, axis=1), rows)
  sizes = jnp.diff(ends, axis=1, prepend=0)
  return RowPlan(
    assignment=jnp.where(held, order[source], -1).reshape(-1),
    row=row.reshape(index.shape),
    group_sizes=sizes.reshape(-1),
    overflow=jnp.sum((expert < num_experts) & ~placed, dtype=jnp.int32),
  )


def gather_rows(x: Float[Array, "T D"], plan: RowPlan) -> Float[Array, "M D"]:
  """The token of each row; zeros in empty rows.

  Args:
    x: tokens.
    plan: of `plan_rows`.

  Returns:
    Rows in the dtype of the tokens. A token gets the gradients of its rows.

  Example:
    >>> index, x = jnp.array([[1], [0]]), jnp.array([[5.0], [7.0]])
    >>> jax.jit(lambda x: gather_rows(
    ...   x, plan_rows(index, num_experts=2)))(x).tolist()
    [[7.0], [5.0]]
  """
  token = jnp.maximum(plan.assignment, 0) // plan.row.shape[1]
  return jnp.where((plan.assignment >= 0)[:, None], x[token], 0)


def combine_rows(
  y: Float[Array, "M D"], weights: Float[Array, "T k"], plan: RowPlan
) -> Float[Array, "T D"]:
  """The weighted sum of the rows of each token.

  Args:
    y: what experts made of the rows.
    weights: of `tokjax.ops.moe_routing.route`.
    plan: of `plan_rows`.

  Returns:
    Summed in float32, in the dtype of `y`. An assignment without a row adds
    nothing, and its weight gets no gradient.

  Example:
    >>> index, halves = jnp.array([[0, 1], [1, -1]]), jnp.full((2, 2), 0.5)
    >>> y = jnp.array([[2.0], [4.0], [8.0], [0.0]])  # sorted by expert
    >>> jax.jit(lambda y: combine_rows(
    ...   y, halves, plan_rows(index, num_experts=2)))(y).tolist()
    [[3.0], [4.0]]
  """
  found = (plan.row >= 0)[..., None]
  rows = jnp.where(found, y[jnp.maximum(plan.row, 0)], 0)  # [T, k, D]
  weighted = weights[..., None] * rows.astype(jnp.float32)
  return jnp.sum(weighted, axis=1).astype(y.dtype)


def _experts(index, num_experts):
  """Of each assignment; E for none."""
  flat = index.reshape(-1)
  valid = (flat >= 0) & (flat < num_experts)
  return jnp.where(valid, flat, num_experts).astype(jnp.int32)


def _spans(expert, num_experts):
  """How many assignments each expert has, and where they start if sorted."""
  counts = jnp.zeros_like(expert, shape=num_experts)
  counts = counts.at[expert].add(1, mode="drop")
  return counts, jnp.cumsum(counts) - counts


def _inverse(order):
  """The place of each number in a permutation."""
  return jnp.argsort(order)

"""Experts: one MLP for each group of rows, and the mixture on one device.

    routing = route(logits, num_chosen=2)
    out = mixture(x, routing.index, routing.weights, experts)
    y = x + out.output

`tokjax.parallel.moe_folding` is the same over many devices.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.ops import moe_dispatch
from tokjax.typing import Array, Float, Int, Int32

__all__ = [
  "Experts",
  "Mixture",
  "batched_mlp",
  "grouped_matmul",
  "grouped_mlp",
  "init_experts",
  "mixture",
]


class Experts(NamedTuple):
  """Weights of E gated MLPs, or of plain ones.

  Attributes:
    up: into the hidden width.
    down: out of it.
    gate: into the hidden width, for act(x gate) * (x up); None for act(x up).
  """

  up: Float[Array, "E D F"]
  down: Float[Array, "E F D"]
  gate: Float[Array, "E D F"] | None = None


class Mixture(NamedTuple):
  """What experts add to tokens.

  Attributes:
    output: in the dtype of the tokens; zeros for one whose experts had no
      room, which the residual carries on.
    dropped: assignments that were wanted and found no room.
  """

  output: Float[Array, "T D"]
  dropped: Int32[Array, ""]


def init_experts(
  key: jax.Array,
  *,
  num_experts: int,
  width: int,
  hidden: int,
  gated: bool = True,
) -> Experts:
  """Normal weights of variance 1 / inputs.

  Args:
    key: of the draw.
    num_experts: E.
    width: D, of tokens.
    hidden: F, of each expert.
    gated: with gates.

  Returns:
    float32 weights.

  Example:
    >>> experts = init_experts(
    ...   jax.random.key(0), num_experts=2, width=4, hidden=8)
    >>> experts.gate.shape, experts.down.shape
    ((2, 4, 8), (2, 8, 4))
  """
  keys = jax.random.split(key, 3)
  up, gate = (
    jax.random.normal(k, (num_experts, width, hidden)) * width**-0.5
    for k in keys[:2]
  )
  down = jax.random.normal(keys[2], (num_experts, hidden, width))
  return Experts(up, down * hidden**-0.5, gate if gated else None)


def grouped_matmul(
  rows: Float[Array, "M K"],
  weights: Float[Array, "G K N"],
  group_sizes: Int[Array, " G"],
) -> Float[Array, "M N"]:
  """Each row times the matrix of its group.

  Args:
    rows: of group 0, then of group 1, and so on; those left over come last.
    weights: one matrix for each group.
    group_sizes: how many rows each has.

  Returns:
    Summed in float32, in the dtype of the rows; what rows that are left over
    give is not defined.

  Raises:
    ValueError: if sizes do not fit.

  Example:
    >>> rows, weights = jnp.ones((3, 1)), jnp.array([[[2.0]], [[5.0]]])
    >>> grouped_matmul(rows, weights, jnp.array([1, 2])).tolist()
    [[2.0], [5.0], [5.0]]

  Cost: 2 M K N FLOPs where ragged products are native; on CPU G times that.
  Under `jax.vmap` all operands must be mapped, on axis 0.
  """
  checks.same_size(groups=weights.shape[0], group_sizes=group_sizes.shape[0])
  checks.same_size(rows_width=rows.shape[1], weights_width=weights.shape[1])
  product = jax.lax.ragged_dot(
    rows, weights, group_sizes, preferred_element_type=jnp.float32
  )
  return product.astype(rows.dtype)


def grouped_mlp(
  experts: Experts,
  rows: Float[Array, "M D"],
  group_sizes: Int[Array, " E"],
  *,
  activation: Callable[[Array], Array] = jax.nn.silu,
) -> Float[Array, "M D"]:
  """The expert of each row, of rows sorted by expert.

  Args:
    experts: weights.
    rows: as for `grouped_matmul`.
    group_sizes: rows of each expert.
    activation: of the gate, or of the hidden units of plain experts.

  Returns:
    In the dtype of the rows.

  Example:
    >>> experts = Experts(jnp.ones((1, 1, 1)), 3 * jnp.ones((1, 1, 1)))
    >>> grouped_mlp(
    ...   experts, jnp.array([[2.0], [-1.0]]), jnp.array([2]),
    ...   activation=jax.nn.relu).tolist()
    [[6.0], [0.0]]

  Cost: 6 D F FLOPs a row, 4 D F without gates.
  """

  def product(rows, weights):
    return grouped_matmul(rows, weights, group_sizes)

  return _mlp(experts, rows, product, activation)


def batched_mlp(
  experts: Experts,
  rows: Float[Array, "E C D"],
  *,
  activation: Callable[[Array], Array] = jax.nn.silu,
) -> Float[Array, "E C D"]:
  """The MLP of each expert, of as many rows for each.

  Args:
    experts: weights.
    rows: a buffer for each expert.
    activation: as for `grouped_mlp`.

  Returns:
    In the dtype of the rows.

  Raises:
    ValueError: if there is not one buffer for each expert.

  Example:
    >>> experts = Experts(jnp.ones((2, 1, 1)), jnp.ones((2, 1, 1)))
    >>> rows = jnp.array([[[1.0]], [[2.0]]])
    >>> batched_mlp(experts, rows, activation=jax.nn.relu)[:, 0, 0].tolist()
    [1.0, 2.0]
  """
  checks.same_size(buffers=rows.shape[0], experts=experts.up.shape[0])

  def product(rows, weights):
    found = jnp.matmul(rows, weights, preferred_element_type=jnp.float32)
    return found.astype(rows.dtype)

  return _mlp(experts, rows, product, activation)


def mixture(
  x: Float[Array, "T D"],
  index: Int[Array, "T k"],
  weights: Float[Array, "T k"],
  experts: Experts,
  *,
  capacity: int | None = None,
  policy: Literal["probs", "position"] = "probs",
  activation: Callable[[Array], Array] = jax.nn.silu,
) -> Mixture:
  """sum_j weights_j expert_j(x) over the experts that a token chose.

  Args:
    x: tokens.
    index: of their experts, from `tokjax.ops.moe_routing.route`; -1 for none.
    weights: of the experts' outputs.
    experts: weights.
    capacity: most tokens of an expert; None drops nothing.
    policy: who stays, as in `moe_dispatch.keep_within_capacity`.
    activation: as for `grouped_mlp`.

  Returns:
    The sum, and how many assignments were dropped. Gradients reach tokens,
    weights and experts.

  Raises:
    ValueError: if sizes do not fit.

  Example:
    >>> experts = Experts(jnp.ones((2, 1, 1)), jnp.ones((2, 1, 1)))
    >>> x, index = jnp.array([[1.0], [2.0]]), jnp.array([[0], [0]])
    >>> found = mixture(x, index, jnp.ones((2, 1)), experts, capacity=1,
    ...                 activation=jax.nn.relu)
    >>> found.output.tolist(), int(found.dropped)
    ([[1.0], [0.0]], 1)

  Cost: k times 6 D F FLOPs a token, and a gather of k D numbers each way.
  """
  num_experts = experts.up.shape[0]
  checks.same_size(tokens=x.shape[0], index_tokens=index.shape[0])
  checks.same_size(tokens=x.shape[0], weights_tokens=weights.shape[0])

  def whole(x, index, weights, experts):
    wanted = (index >= 0) & (index < num_experts)
    kept = wanted
    if capacity is not None:
      kept = moe_dispatch.keep_within_capacity(
        index,
        weights,
        capacity=capacity,
        num_experts=num_experts,
        policy=policy,
      )
    plan = moe_dispatch.plan_rows(
      jnp.where(kept, index, -1), num_experts=num_experts
    )
    rows = moe_dispatch.gather_rows(x, plan)
    y = grouped_mlp(experts, rows, plan.group_sizes, activation=activation)
    output = moe_dispatch.combine_rows(y, weights, plan)
    return output, jnp.sum(wanted & ~kept, dtype=jnp.int32)

  # On a mesh of Explicit axes the compiler lays out what is in between.
  spec = jax.typeof(x).sharding.spec
  if any(axis is not None for axis in spec):
    whole = jax.sharding.auto_axes(whole, out_sharding=(spec, jax.P()))
  return Mixture(*whole(x, index, weights, experts))


def _mlp(experts, rows, product, activation):
  hidden = product(rows, experts.up)
  if experts.gate is None:
    hidden = activation(hidden.astype(jnp.float32))
  else:
    gate = activation(product(rows, experts.gate).astype(jnp.float32))
    hidden = gate * hidden
  return product(hidden.astype(rows.dtype), experts.down)

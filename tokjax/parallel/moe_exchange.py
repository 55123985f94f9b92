"""Rows to the devices of their experts and back, in three ways.

What `tokjax.parallel.moe_folding` does between routing and output, inside
`jax.shard_map`. All ways compute the same; they differ in what they send and in
how much room they need:

- "capacity": a buffer for each expert, [E, rows, D], of which every device
  gets those of its own; one product for each expert over all its rows.
- "padded": a buffer for each device, [P, rows, D], and how many rows of it are
  of which expert; sorted on arrival, one product for groups of rows.
- "ragged": the rows that there are, sorted by expert, to the places that the
  counts of all devices say; as many as `rows` on arrival.

Where the hidden width of experts is cut (etp), the devices of one expert gather
each other's rows, compute a part of the sum, and scatter it.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tokjax import checks
from tokjax.ops import moe_dispatch, moe_experts
from tokjax.ops.moe_experts import Experts
from tokjax.parallel.moe_mesh import FoldedMesh
from tokjax.typing import Array, Float, Int, Int32

__all__ = ["exchange"]


def exchange(
  x: Float[Array, "T D"],
  index: Int[Array, "T k"],
  weights: Float[Array, "T k"],
  experts: Experts,
  *,
  folded: FoldedMesh,
  way: Literal["capacity", "padded", "ragged"],
  rows: int,
  activation: Callable[[Array], Array] = jax.nn.silu,
) -> tuple[Float[Array, "T D"], Int32[Array, ""]]:
  """The mixture of experts that are on other devices; for `jax.shard_map`.

  Args:
    x: tokens of this device.
    index: of their experts; -1 for none.
    weights: of the experts' outputs.
    experts: of this device, E / P of them, or their part of the hidden width.
    folded: the mesh, of which ep and etp are used.
    way: how to send.
    rows: of a buffer; see above.
    activation: as in `moe_experts.grouped_mlp`.

  Returns:
    As `moe_experts.mixture`, without what had no room, and how many
    assignments of this device had none.

  Raises:
    ValueError: if the way is unknown.
    NotImplementedError: for "ragged" on a mesh of CPUs.
  """
  checks.one_of(("capacity", "padded", "ragged"), way=way)
  if way == "capacity":
    send = _by_capacity
  elif way == "padded" or not folded.ep:
    send = _padded
  else:
    _check_ragged(folded.mesh)
    send = _ragged
  return send(x, index, weights, experts, folded, rows, activation)


def _by_capacity(x, index, weights, experts, folded, rows, activation):
  num_experts = experts.up.shape[0] * folded.size(folded.ep)
  plan = moe_dispatch.plan_rows(
    index, num_experts=num_experts, num_buffers=num_experts, buffer_rows=rows
  )
  sent = moe_dispatch.gather_rows(x, plan).reshape(num_experts, rows, -1)
  here = _all_to_all(sent, folded.ep, 0, 1)  # [E / P, P rows, D]
  here = _gather(here, folded.etp, 1)
  y = moe_experts.batched_mlp(experts, here, activation=activation)
  y = _scatter(y, folded.etp, 1)
  y = _all_to_all(y, folded.ep, 1, 0).reshape(num_experts * rows, -1)
  return moe_dispatch.combine_rows(y, weights, plan), plan.overflow


def _padded(x, index, weights, experts, folded, rows, activation):
  num_ranks, share = folded.size(folded.ep), experts.up.shape[0]
  plan = moe_dispatch.plan_rows(
    index,
    num_experts=num_ranks * share,
    num_buffers=num_ranks,
    buffer_rows=rows,
  )
  sizes = plan.group_sizes.reshape(num_ranks, share)
  sizes = _all_to_all(sizes, folded.ep, 0, 0)  # of what each device sent
  here = _all_to_all(moe_dispatch.gather_rows(x, plan), folded.ep, 0, 0)
  ends = jnp.cumsum(sizes, axis=1)
  # Behind the last expert's rows this is `share`, which is no expert.
  expert = jnp.sum(
    jnp.arange(rows)[None, :, None] >= ends[:, None],
    axis=-1,
    dtype=jnp.int32,
  )
  y = _grouped(here, expert.reshape(-1), experts, folded, activation)
  y = _all_to_all(y, folded.ep, 0, 0)
  return moe_dispatch.combine_rows(y, weights, plan), plan.overflow


def _ragged(x, index, weights, experts, folded, rows, activation):
  num_ranks, share = folded.size(folded.ep), experts.up.shape[0]
  plan = moe_dispatch.plan_rows(index, num_experts=num_ranks * share)
  sizes = jax.lax.all_gather(plan.group_sizes, folded.ep)
  sizes = sizes.reshape(num_ranks, num_ranks, share)  # [from, to, expert]
  wanted = jnp.sum(sizes, axis=2)
  leaves_at = jnp.cumsum(wanted, axis=1) - wanted  # place at the sender
  arrives_at = jnp.minimum(jnp.cumsum(wanted, axis=0) - wanted, rows)
  fits = jnp.minimum(wanted, rows - arrives_at)
  me = jax.lax.axis_index(folded.ep)
  sent = moe_dispatch.gather_rows(x, plan)
  here = jax.lax.ragged_all_to_all(
    sent,
    jnp.zeros_like(sent, shape=(rows, sent.shape[1])),
    leaves_at[me],
    fits[me],
    arrives_at[me],
    fits[:, me],
    axis_name=folded.ep,
  )
  ends = jnp.minimum(jnp.cumsum(sizes[:, me], axis=1), fits[:, me, None])
  ends = (arrives_at[:, me, None] + ends).reshape(-1)  # ascending
  group = jnp.searchsorted(ends, jnp.arange(rows), side="right")
  expert = jnp.where(group < ends.shape[0], group % share, -1)
  y = _grouped(here, expert, experts, folded, activation)
  y = jax.lax.ragged_all_to_all(
    y,
    jnp.zeros_like(sent),
    arrives_at[:, me],
    fits[:, me],
    leaves_at[:, me],
    fits[me],
    axis_name=folded.ep,
  )
  output = moe_dispatch.combine_rows(y, weights, plan)
  return output, jnp.sum(wanted[me] - fits[me])


def _grouped(rows, expert, experts, folded, activation):
  """Rows through their experts, where they are; zeros where there is none."""
  rows, expert = (_gather(x, folded.etp, 0) for x in (rows, expert))
  share = experts.up.shape[0]
  plan = moe_dispatch.plan_rows(expert[:, None], num_experts=share)
  y = moe_experts.grouped_mlp(
    experts,
    moe_dispatch.gather_rows(rows, plan),
    plan.group_sizes,
    activation=activation,
  )
  one = jnp.ones_like(plan.row, dtype=jnp.float32)
  y = moe_dispatch.combine_rows(y, one, plan)
  return _scatter(y, folded.etp, 0)


def _all_to_all(x, axes, split, join):
  if not axes:
    return x
  return jax.lax.all_to_all(x, axes, split, join, tiled=True)


def _gather(x, axes, axis):
  if not axes:
    return x
  return jax.lax.all_gather(x, axes, axis=axis, tiled=True)


def _scatter(x, axes, axis):
  """The sum over devices, of which each keeps its part."""
  if not axes:
    return x
  return jax.lax.psum_scatter(x, axes, scatter_dimension=axis, tiled=True)


def _check_ragged(mesh):
  if isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == "cpu":
    raise NotImplementedError(
      "CPUs have no ragged all-to-all: instead of 'ragged' use 'padded'"
    )

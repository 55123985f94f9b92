"""Experts folded into the devices of attention, beside experts cut like it.

Bytes and seconds of a layer are those of `tokjax.parallel.moe_costs`; the bytes
of small layers are counted in programs compiled for CPU devices, folded and
not, and must be those of the same functions.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from tokjax.benchmarks import compiled_bytes
from tokjax.benchmarks.trained_vit import Row
from tokjax.parallel import moe_costs, moe_folding, moe_mesh, moe_weights
from tokjax.parallel.moe_costs import MoeSent, Workload
from tokjax.parallel.moe_weights import MoeConfig

__all__ = ["FoldingRun", "claimed", "counted", "lead"]

_WIDTH, _HIDDEN, _BATCH, _LENGTH = 8, 4, 4, 16  # of the small layer


@dataclasses.dataclass(frozen=True)
class FoldingRun:
  """A layer of a published model on nodes of fast links."""

  dataset: str  # the model, for the title of the table
  width: int  # of a token
  hidden: int  # of an expert
  num_experts: int
  num_chosen: int
  ep: int  # devices of all experts where they are folded, each whole
  tp: int  # of attention
  cp: int  # of attention
  length: int  # of a sequence; a device has its part over tp and cp
  flops: float = 989e12  # a second, of an H100 in bfloat16
  near_rate: float = 450e9  # bytes a second to devices of the node
  far_rate: float = 50e9  # to others
  domain: int = 8  # devices of a node


def counted(run: FoldingRun, experts: Mapping[str, int]) -> MoeSent:
  """Bytes that a device sends in the compiled forward pass of a small layer.

  Of 8 devices, dp x cp x tp, with the tp of the run and what is left of its cp;
  2 experts a token of 8, tokens of 8 numbers, float32.

  Args:
    run: whose attention is taken.
    experts: sizes of "ep" and "etp".

  Returns:
    What `moe_costs.sent` models.

  Raises:
    ValueError: if there are no 8 CPU devices.
  """
  cp = min(run.cp, 8 // run.tp)
  attention = {"dp": 8 // (run.tp * cp), "cp": cp, "tp": run.tp}
  folded = moe_mesh.make_folded_mesh(
    attention, experts, devices=compiled_bytes.cpu_devices(8)
  )
  config = MoeConfig(num_experts=8, num_chosen=2, capacity_factor=1.0)
  weights = jax.eval_shape(
    lambda key: moe_weights.init_moe(
      key, config, width=_WIDTH, hidden=_HIDDEN
    ),
    jax.random.key(0),
  )  # fmt: skip
  x = jax.ShapeDtypeStruct((_BATCH, _LENGTH, _WIDTH), jnp.float32)

  def placed(x, spec):
    place = jax.sharding.NamedSharding(folded.mesh, spec)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

  program = jax.jit(
    lambda x, weights: (
      moe_folding.moe_layer(x, weights, config=config, folded=folded).output
    )
  ).lower(
    placed(x, jax.P(folded.dp, folded.sequence)),
    jax.tree.map(placed, weights, moe_weights.weight_specs(weights, folded)),
  )
  found = compiled_bytes.results(program.compile().as_text())
  ep, etp = folded.size(folded.ep), folded.size(folded.etp)
  return MoeSent(
    exchange=found["all-to-all"] * (ep - 1) / ep,
    # Of the gathered result a device has its own part; of what is scattered
    # it sends as much as it gets to each of the others.
    parts=found["all-gather"] * (etp - 1) / etp
    + found["reduce-scatter"] * (etp - 1),
  )


def claimed(run: FoldingRun, *, progress: bool = True) -> dict[str, Row]:
  """Both layouts, forward; backward sends as much and computes twice as much.

  Args:
    run: the layer.
    progress: print a layout when it is done.

  Returns:
    Rows "folded" and "unfolded", which have the same experts on as many
    devices (`moe_costs.unfolded`): "MB" of 1e6 bytes that a device sends over
    "exchange MB" and "parts MB", in ms the "products" of experts, the
    "exchange", the "parts" and their sum; and bytes of the small layer,
    "counted" and "as modelled".
  """
  work = Workload(
    tokens=run.length // (run.tp * run.cp),
    width=run.width,
    hidden=run.hidden,
    num_chosen=run.num_chosen,
    ep=run.ep,
  )
  # The small layer has as many devices of all experts, 8.
  small = Workload(
    tokens=_BATCH * _LENGTH // 8, width=_WIDTH, hidden=_HIDDEN, ep=8, itemsize=4
  )
  apart = {"tp": run.tp, "cp": run.cp}
  layouts = {
    "folded": (work, small),
    "unfolded": (
      moe_costs.unfolded(work, **apart), moe_costs.unfolded(small, **apart)
    ),
  }  # fmt: skip
  rows = {}
  for name, (work, small) in layouts.items():
    amounts = moe_costs.sent(work)
    times = moe_costs.seconds(
      work,
      flops=run.flops,
      near_rate=run.near_rate,
      far_rate=run.far_rate,
      domain=run.domain,
    )
    found = counted(run, {"ep": small.ep, "etp": small.etp})
    rows[name] = Row({
      "MB": sum(amounts) / 1e6,
      "exchange MB": amounts.exchange / 1e6,
      "parts MB": amounts.parts / 1e6,
      **{key: 1e3 * time for key, time in times._asdict().items()},
      "ms": 1e3 * sum(times),
      "counted": sum(found),
      "as modelled": sum(moe_costs.sent(small)),
    })  # fmt: skip
    if progress:
      print(name, rows[name].metrics, flush=True)
  return rows


def lead(rows: Mapping[str, Row]) -> float:
  """Share of the bytes, and of the time, that folding saves.

  Args:
    rows: of `claimed`.

  Returns:
    The smaller of both; minus infinity if a small program does not send what
    is modelled.

  Example:
    >>> def row(amount, time):
    ...   return Row({"MB": amount, "ms": time, "counted": 1, "as modelled": 1})
    >>> lead({"folded": row(3.0, 1.0), "unfolded": row(4.0, 2.0)})
    0.25
  """
  if any(x.metrics["counted"] != x.metrics["as modelled"]
         for x in rows.values()):  # fmt: skip
    return -float("inf")
  one, other = (rows[name].metrics for name in ("folded", "unfolded"))
  return min(1 - one[metric] / other[metric] for metric in ("MB", "ms"))

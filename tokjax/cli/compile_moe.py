"""`tokjax compile --moe NAME`: a layer of experts on a slice, two layouts.

Value and gradient of one block of a published model, attention and experts, in
bfloat16: each pair of devices has a sequence of 4,096 tokens. Attention is cut
over tp = 2. Eight devices hold all experts, in both layouts:

- folded: ep = 8, whole experts on devices in a row, those of attention's tp
  among them;
- unfolded: ep = 4 and etp = 2, every expert cut over tp like heads are.

What a model needs beyond a layer, such as its optimizer and its table, is not
in it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tokjax import checks
from tokjax.cli import compile_fit
from tokjax.models import moe_transformer
from tokjax.models.moe_transformer import CONFIGS, MoeTransformerConfig
from tokjax.parallel import data_sheets, moe_costs, moe_mesh, rules
from tokjax.parallel.moe_mesh import FoldedMesh

__all__ = ["LAYOUTS", "rows"]

LAYOUTS = {"folded": {"ep": 8}, "unfolded": {"ep": 4, "etp": 2}}
_TP = 2


def rows(
  name: str | MoeTransformerConfig,
  *,
  topology: str,
  devices: Sequence[Any],
  length: int = 4096,
) -> Iterator[dict[str, Any]]:
  """Compiles the layer in both layouts.

  Args:
    name: of `moe_transformer.CONFIGS`, or a shape.
    topology: name of the devices.
    devices: from `topologies.devices_of`; a multiple of 8.
    length: of a sequence.

  Yields:
    Rows, see `compile_fit.compile_row`; the bound is for the layer, forward
    and back. "sent_bytes" is what a device sends for the experts then, by
    `moe_costs`.

  Raises:
    ValueError: for an unknown name or another number of devices.
  """
  if isinstance(name, str):
    checks.one_of(tuple(CONFIGS), moe=name)
  config = CONFIGS[name] if isinstance(name, str) else name
  checks.divisible(8, devices=len(devices))
  attention = {"dp": len(devices) // _TP, "tp": _TP}
  sheet = data_sheets.find(topology)
  for layout, experts in LAYOUTS.items():
    folded = moe_mesh.make_folded_mesh(attention, experts, devices=devices)
    work, flops = _work(config, folded, length)
    sent = 2 * sum(moe_costs.sent(work))  # as much again on the way back
    bound = sheet and data_sheets.bound(sheet, flops=flops, link_bytes=sent)
    yield compile_fit.compile_row(
      jax.value_and_grad(_value(folded), argnums=(0, 1)),
      _arguments(config, folded, length),
      topology=topology,
      devices=devices,
      bound=bound,
      unit="layer",
      program=layout,
      sent_bytes=sent,
    )


def _value(folded: FoldedMesh):
  def value(block, x):
    mask = jnp.ones_like(x[..., 0], bool)
    y, found = block(x, mask, folded=folded)
    return jnp.mean(y.astype(jnp.float32)) + found.losses.z

  return value


def _arguments(config, folded, length):
  """The block and its input, as shapes with their places."""
  block = jax.eval_shape(
    lambda: moe_transformer.MoeBlock(config, rngs=nnx.Rngs(0))
  )
  # A block by itself has no axis of layers.
  placed = [
    (pattern.removeprefix("blocks/"), axes[1:])
    for pattern, axes in moe_transformer.placement(folded)
  ]
  places = rules.shardings(block, folded.mesh, placed)

  def shape(x, place):
    return jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=place)

  tokens = jax.sharding.NamedSharding(
    folded.mesh, jax.P(folded.dp, folded.sequence)
  )
  x = (folded.size(folded.dp), length, config.width)
  return (
    jax.tree.map(shape, block, places),
    jax.ShapeDtypeStruct(x, jnp.bfloat16, sharding=tokens),
  )


def _work(config, folded, length):
  """The experts of a device, forward; and FLOPs of its layer, all passes."""
  width, moe = config.width, config.moe
  tokens = length // _TP
  work = moe_costs.Workload(
    tokens=tokens,
    width=width,
    hidden=config.hidden,
    num_chosen=moe.num_chosen,
    ep=folded.size(folded.ep),
    etp=folded.size(folded.etp),
    room=moe.capacity_factor or 1.0,
  )
  share = config.num_key_heads / config.num_heads
  of_token = 4 * width * width * (1 + share) + 4 * length * width
  return work, 3 * (work.flops + tokens * of_token)

"""`tokjax compile --moe NAME`: a layer of experts on a slice, three layouts.

Value and gradient of blocks of a published model, attention, experts and a
shared expert, in bfloat16: each pair of devices has a sequence of 4,096 tokens.
Attention is cut over tp = 2. Eight devices hold

- folded: all experts, ep = 8, whole ones on devices in a row, those of
  attention's tp among them;
- unfolded: all experts, ep = 4 and etp = 2, every expert cut over tp like heads
  are;
- stages: two layers, pp = 2, each with its experts on four devices, ep = 4.
  Four micro-batches, of as many tokens as above, take five ticks.

What a model needs beyond its layers, such as its optimizer and its table, is
not in it.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tokjax import checks
from tokjax.cli import compile_fit
from tokjax.models import moe_transformer
from tokjax.models.moe_block import MoeBlock, MoeTransformerConfig
from tokjax.models.moe_transformer import CONFIGS
from tokjax.parallel import data_sheets, moe_costs, moe_mesh, pipeline, rules
from tokjax.parallel.moe_mesh import FoldedMesh

__all__ = ["LAYOUTS", "rows"]

# Attention and experts, dp is what is left.
LAYOUTS = {
  "folded": ({"tp": 2}, {"ep": 8}),
  "unfolded": ({"tp": 2}, {"ep": 4, "etp": 2}),
  "stages": ({"pp": 2, "tp": 2}, {"ep": 4}),
}
_NUM_MICRO = 4  # if there are stages


def rows(
  name: str | MoeTransformerConfig,
  *,
  topology: str,
  devices: Sequence[Any],
  length: int = 4096,
) -> Iterator[dict[str, Any]]:
  """Compiles the layer, or one for each stage, in all layouts.

  Args:
    name: of `moe_transformer.CONFIGS`, or a shape.
    topology: name of the devices.
    devices: from `topologies.devices_of`; a multiple of 8.
    length: of a sequence.

  Yields:
    Rows, see `compile_fit.compile_row`; the bound is for the layer, or for all
    ticks of a stage, forward and back. "sent_bytes" is what a device sends for
    the experts then, by `moe_costs`.

  Raises:
    ValueError: for an unknown name or another number of devices.
  """
  if isinstance(name, str):
    checks.one_of(tuple(CONFIGS), moe=name)
  config = CONFIGS[name] if isinstance(name, str) else name
  checks.divisible(8, devices=len(devices))
  sheet = data_sheets.find(topology)
  for layout, (attention, experts) in LAYOUTS.items():
    dp = len(devices) // math.prod(attention.values())
    folded = moe_mesh.make_folded_mesh(
      {**attention, "dp": dp}, experts, devices=devices
    )
    num_stages = folded.size(folded.pp)
    num_micro = _NUM_MICRO if num_stages > 1 else 1
    ticks = len(pipeline.schedule(num_stages, num_micro))
    work, flops = _work(config, folded, length)
    sent = 2 * sum(moe_costs.sent(work))  # as much again on the way back
    yield compile_fit.compile_row(
      jax.value_and_grad(_value(folded), argnums=(0, 1)),
      _arguments(config, folded, num_micro, length),
      topology=topology,
      devices=devices,
      bound=sheet
      and data_sheets.bound(
        sheet, flops=ticks * flops, link_bytes=ticks * sent
      ),
      unit="layer" if ticks == 1 else f"{ticks} ticks",
      program=layout,
      sent_bytes=ticks * sent,
    )


def _value(folded: FoldedMesh):
  def stage(blocks, x, held, folded):
    def layer(x, block):
      x, found = block(x, jnp.ones_like(x[..., 0], bool), folded=folded)
      return x, found.losses.z

    return jax.lax.scan(layer, x, blocks)

  def value(blocks, micro):
    y, z = pipeline.pipeline(stage, blocks, micro, folded=folded)
    return jnp.mean(y.astype(jnp.float32)) + jnp.mean(z)

  return value


def _arguments(config, folded, num_micro, length):
  """A block of each stage and micro-batches, as shapes with their places."""

  def new_blocks():
    keys = jax.random.split(jax.random.key(0), folded.size(folded.pp))
    return jax.vmap(lambda key: MoeBlock(config, rngs=nnx.Rngs(key)))(keys)

  blocks = jax.eval_shape(new_blocks)
  placed = [
    (pattern.removeprefix("blocks/"), axes)
    for pattern, axes in moe_transformer.placement(folded)
  ]
  places = rules.shardings(blocks, folded.mesh, placed)

  def shape(x, place):
    return jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=place)

  tokens = jax.sharding.NamedSharding(
    folded.mesh, jax.P(None, folded.dp, folded.sequence)
  )
  micro = (num_micro, folded.size(folded.dp), length, config.width)
  return (
    jax.tree.map(shape, blocks, places),
    jax.ShapeDtypeStruct(micro, jnp.bfloat16, sharding=tokens),
  )


def _work(config, folded, length):
  """The experts of a device, forward; and FLOPs of its layer, all passes."""
  width, moe = config.width, config.moe
  tokens = length // folded.size(folded.sequence)
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
  of_token += 6 * width * config.shared_hidden
  return work, 3 * (work.flops + tokens * of_token)

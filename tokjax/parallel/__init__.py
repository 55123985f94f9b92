"""Devices and how programs are laid out over them.

- `tokjax.parallel.meshes`: the mesh of a run, and batches on it.
- `tokjax.parallel.rules`: where each parameter lives, by its path.
- `tokjax.parallel.topologies`: compiling for devices that are not there.

Exact attention over a sequence that is cut among devices:

- `tokjax.parallel.zigzag`: the order that shares causal work fairly.
- `tokjax.parallel.ring_attention`: keys and values travel in a ring.
- `tokjax.parallel.token_ring`: queries travel, and results come home.
- `tokjax.parallel.ring_costs`: what each sends, and how long it takes.
- `tokjax.parallel.attention_meetings`, `attention_blocks`: what both are made
  of.

Mixtures of experts, laid out in another way than the attention around them:

- `tokjax.parallel.moe_mesh`: one mesh for both layouts.
- `tokjax.parallel.moe_folding`: the layer; `moe_weights`: its settings and
  weights; `moe_exchange`: how rows travel.
- `tokjax.parallel.moe_costs`: what that sends, and how long it takes.
- `tokjax.parallel.pipeline`: layers in stages, a batch in micro-batches.
"""

from tokjax.parallel.topologies import (
  CompileReport,
  compile_for,
  devices_of,
  environment,
  h100_topology,
  tpu_topology,
)

__all__ = [
  "CompileReport",
  "compile_for",
  "devices_of",
  "environment",
  "h100_topology",
  "tpu_topology",
]

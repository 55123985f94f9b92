"""Devices and how programs are laid out over them.

- `tokjax.parallel.meshes`: the mesh of a run, and batches on it.
- `tokjax.parallel.rules`: where each parameter lives, by its path.
- `tokjax.parallel.topologies`: compiling for devices that are not there.
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

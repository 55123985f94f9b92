"""The mesh of devices a run is laid out over, and the batches on it.

Three axes with fixed names serve every run, on one device or thousands:

- `data`: each group of devices has other rows of the batch and a copy of the
  parameters.
- `fsdp`: other rows of the batch too, and the parameters cut among them.
- `tensor`: the same rows; the width of the layers cut among them.

An axis of size 1 costs nothing, so sharding rules can name all three always.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding

from tokjax.parallel import rules

__all__ = [
  "AXES",
  "BATCH_AXES",
  "MeshConfig",
  "lay_out",
  "make_mesh",
  "shard_batch",
]

# From the least to the most communication per step: the last axis gets
# neighbouring devices.
AXES = ("data", "fsdp", "tensor")
# Those whose devices hold other rows of the batch.
BATCH_AXES = ("data", "fsdp")


@dataclasses.dataclass(unsafe_hash=True)
class MeshConfig:
  """How a run lays out its devices; see `make_mesh`."""

  data: int = -1  # groups with a copy of the parameters; -1: what is left
  fsdp: int = 1  # devices that share one copy
  tensor: int = 1  # devices that share the width of layers

  def make(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh, of all devices or of some."""
    return make_mesh(self.data, self.fsdp, self.tensor, devices=devices)


def make_mesh(
  data: int = -1,
  fsdp: int = 1,
  tensor: int = 1,
  *,
  devices: Sequence[jax.Device] | None = None,
  axis_types: AxisType = AxisType.Auto,
) -> Mesh:
  """Lays devices out in a grid of data x fsdp x tensor.

  Under `jax.distributed` these are the devices of all processes, and every
  process must make the same call. They are ordered so that the last axes get
  the fastest links.

  Args:
    data: groups of devices with a copy of the parameters each.
    fsdp: devices that share one copy, for storage.
    tensor: devices that share the width of the layers.
      One of the three may be -1: it takes the devices that are left.
    devices: which ones; None for all of `jax.devices()`.
    axis_types: `AxisType.Auto` (the compiler lays out what is in between) or
      `AxisType.Explicit` (the layout is part of the type), for all axes.

  Returns:
    A mesh with the axes `data`, `fsdp` and `tensor`.

  Raises:
    ValueError: if the sizes do not multiply to the number of devices.

  Example:
    >>> dict(make_mesh(devices=jax.devices()[:1]).shape)
    {'data': 1, 'fsdp': 1, 'tensor': 1}
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = _fill({"data": data, "fsdp": fsdp, "tensor": tensor}, len(devices))
  return lay_out(dict(zip(AXES, sizes, strict=True)), devices, axis_types)


def lay_out(
  sizes: Mapping[str, int],
  devices: Sequence[jax.Device],
  axis_types: AxisType = AxisType.Auto,
) -> Mesh:
  """A mesh of named axes, the last ones along the fastest links.

  An axis may be a part of a side of a pod, which `jax.make_mesh` refuses.

  Args:
    sizes: of the axes, slowest links first.
    devices: as many as the sizes multiply to.
    axis_types: of all axes.

  Example:
    >>> lay_out({"data": 1, "tensor": 1}, jax.devices()[:1]).axis_names
    ('data', 'tensor')
  """
  grid = mesh_utils.create_device_mesh(
    tuple(sizes.values()), devices, allow_split_physical_axes=True
  )
  return Mesh(grid, tuple(sizes), axis_types=(axis_types,) * len(sizes))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
  """Cuts the rows of a batch over the `data` and `fsdp` axes of the mesh.

  Args:
    batch: a pytree of host arrays with the rows on axis 0. Under
      `jax.distributed` each process passes its own rows, in the order of the
      processes.
    mesh: the devices.

  Returns:
    The tree of global arrays.

  Raises:
    ValueError: if an array has no rows or the rows do not divide; the message
      names the array.

  Example:
    >>> mesh = make_mesh(devices=jax.devices()[:1])
    >>> shard_batch({"ids": np.zeros((4, 7), np.int32)}, mesh)["ids"].shape
    (4, 7)
  """
  axes = tuple(a for a in BATCH_AXES if mesh.shape.get(a, 1) > 1)
  sharding = NamedSharding(mesh, jax.P(axes) if axes else jax.P())
  num_parts = int(np.prod([mesh.shape[a] for a in axes], dtype=int))
  parts = sharding.addressable_devices_indices_map((num_parts,)).values()
  num_local = len({part[0].start for part in parts})  # parts of this process

  def place(path, x):
    x = np.asarray(x)
    if x.ndim == 0 or x.shape[0] % num_local:
      raise ValueError(
        f"rows of batch array {rules.leaf_path(path)!r} must be a multiple of "
        f"{num_local}, one part for each device along {axes or 'no axis'}, "
        f"got shape {x.shape}"
      )
    shape = (x.shape[0] // num_local * num_parts, *x.shape[1:])
    return jax.make_array_from_process_local_data(sharding, x, shape)

  return jax.tree_util.tree_map_with_path(place, batch)


def _fill(sizes, num_devices):
  """The sizes with -1 replaced by what is left."""
  said = ", ".join(f"{name}={size}" for name, size in sizes.items())
  values = list(sizes.values())
  if any(size < 1 and size != -1 for size in values):
    raise ValueError(f"mesh sizes must be positive or -1, got {said}")
  if values.count(-1) > 1:
    raise ValueError(f"one mesh size may be -1, got {said}")
  named = math.prod(size for size in values if size != -1)
  if -1 in values and num_devices % named:
    raise ValueError(
      f"the mesh {said} needs a multiple of {named} devices, got {num_devices}"
    )
  if -1 not in values and num_devices != named:
    raise ValueError(
      f"the mesh {said} needs {named} devices, got {num_devices}"
    )
  return tuple(num_devices // named if n == -1 else n for n in values)

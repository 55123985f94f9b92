"""Runs a function of a batch on the examples that each device holds."""

from collections.abc import Callable

import jax

from tokjax import compat

__all__ = ["over_batch_shards"]


def over_batch_shards(local: Callable, **arrays):
  """Calls `local` on local examples; examples need nothing from each other.

  Args:
    local: maps arrays, in the order given, to a pytree of arrays with the
      same first axis.
    **arrays: arrays [B, ...] or None, by the name that errors shall use; the
      sharding of the first is everybody's.

  Returns:
    What `local` returns, for all examples.

  Raises:
    ValueError: if an axis other than the first is sharded on an Explicit mesh.
  """
  names, values = list(arrays), list(arrays.values())
  axes = [_first_axis(name, x) for name, x in arrays.items()]
  mesh, axis = jax.typeof(values[0]).sharding.mesh, axes[0]

  def varying(*given):
    return local(*compat.varying_together(*given))

  if axis is None and not any(axes):
    return varying(*values)
  present = [i for i, x in enumerate(values) if x is not None]
  spec = jax.P(axis)

  def of_present(*given):
    full = [None] * len(names)
    for i, x in zip(present, given, strict=True):
      full[i] = x
    return varying(*full)

  given = [jax.sharding.reshard(values[i], spec) for i in present]
  return jax.shard_map(
    of_present, mesh=mesh, in_specs=(spec,) * len(given), out_specs=spec
  )(*given)


def _first_axis(name, x):
  """Mesh axes of the first axis on an Explicit mesh; None for unsharded."""
  if x is None:
    return None
  spec = tuple(jax.typeof(x).sharding.spec)
  if any(axis is not None for axis in spec[1:]):
    raise ValueError(
      f"{name} must be sharded over its first axis only, got {spec}"
    )
  return spec[0] if spec else None

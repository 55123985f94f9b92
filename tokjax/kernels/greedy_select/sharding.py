"""Runs a function of a batch on the examples that each device holds."""

from collections.abc import Callable

import jax

from tokjax import compat
from tokjax.kernels import sharding

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
  axes = [sharding.first_axis(name, x) for name, x in arrays.items()]
  values = tuple(arrays.values())

  def varying(*given):
    return local(*compat.varying_together(*given))

  if not any(axes):
    return varying(*values)
  spec = jax.P(axes[0])
  return sharding.over_shards(varying, values, (spec,) * len(values), spec)

"""How a function of local shards becomes one of sharded arrays.

On an Explicit mesh an array's type says how it is sharded; every kernel reads
that, decides what must be whole, and runs on the shards that are left.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from tokjax.typing import Array

__all__ = ["first_axis", "first_two_axes", "over_shards"]

_Axes = str | tuple[str, ...] | None


def first_axis(name: str, x: Array | None) -> _Axes:
  """Mesh axes over which the first axis of an array is sharded.

  Args:
    name: what the error shall call the array.
    x: any array, or None for one that was not given.

  Returns:
    One or several mesh axes of an Explicit mesh; None for an array that is
    whole, or sharded in a way that its type does not say.

  Raises:
    ValueError: if another axis is sharded.

  Example:
    >>> import jax.numpy as jnp
    >>> first_axis("queries", jnp.ones((2, 3))) is None
    True
  """
  if x is None:
    return None
  spec = tuple(jax.typeof(x).sharding.spec)
  if any(axis is not None for axis in spec[1:]):
    raise ValueError(
      f"{name} must be sharded over its first axis only, got {spec}"
    )
  return spec[0] if spec else None


def first_two_axes(name: str, x: Array) -> tuple[_Axes, _Axes]:
  """Mesh axes over which the first two axes of an array are sharded.

  Args:
    name: what the error shall call the array.
    x: any array of two axes or more.

  Returns:
    Of each, as `first_axis`.

  Raises:
    ValueError: if another axis is sharded.

  Example:
    >>> import jax.numpy as jnp
    >>> first_two_axes("q", jnp.ones((2, 3, 4)))
    (None, None)
  """
  spec = tuple(jax.typeof(x).sharding.spec)
  first, second, *whole = (*spec, None, None)
  if any(axis is not None for axis in whole):
    raise ValueError(
      f"{name} must be sharded over its first two axes only, got {spec}"
    )
  return first, second


def over_shards(
  local: Callable,
  arrays: Sequence[Any],
  in_specs: Sequence[Any],
  out_specs: Any,
):
  """Calls a function on shards of arrays, moved there where need be.

  Args:
    local: maps local shards of the arrays, None among them, to a pytree.
    arrays: arrays, pytrees of arrays and None; the first is an array and names
      the mesh.
    in_specs: how `local` wants each of them, a pytree as a whole or leaf by
      leaf; that of a None is not read.
    out_specs: how what it returns is sharded.

  Returns:
    What `local` returns, for all shards.

  Example:
    >>> import jax.numpy as jnp
    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> with jax.set_mesh(mesh):
    ...   x = jax.device_put(jnp.arange(3.0), jax.P("data"))
    ...   over_shards(jnp.square, [x], [jax.P("data")], jax.P("data")).tolist()
    [0.0, 1.0, 4.0]
  """
  in_specs = tuple(in_specs)
  mesh = jax.typeof(arrays[0]).sharding.mesh
  arrays = tuple(
    x if x is None else jax.sharding.reshard(x, spec)
    for x, spec in zip(arrays, in_specs, strict=True)
  )
  return jax.shard_map(
    local, mesh=mesh, in_specs=in_specs, out_specs=out_specs
  )(*arrays)

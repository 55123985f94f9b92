"""The parts of jax that move between versions, wrapped in one place.

jax 0.10.2 (the newest for Python 3.11) and 0.11 (Python 3.12) agree on
everything used here; a difference gets its branch in this file, with the
version that lets us delete it.
"""

from collections.abc import Sequence
from typing import Any

import jax

from tokjax.typing import Array

__all__ = ["result_like", "varying_together"]


def varying_together(*arrays: Array | None) -> tuple[Array | None, ...]:
  """The arrays, all varying over the same manual mesh axes.

  Inside `jax.shard_map` an array carries the mesh axes over which its value
  differs from device to device. A Pallas call wants operands that agree, and
  a custom gradient must vary like its argument; this marks each as varying
  over the union. The transpose of the mark is the sum over devices that a
  replicated argument needs. Outside it changes nothing.

  Args:
    *arrays: any arrays; None stays None.

  Returns:
    The same values, as many as came.

  Example:
    >>> import jax.numpy as jnp
    >>> a, b = varying_together(jnp.ones(2), jnp.zeros(3))
    >>> a.shape, b.shape
    ((2,), (3,))
  """

  def varying(x):
    return jax.typeof(x).manual_axis_type.varying

  union = frozenset().union(*(varying(x) for x in arrays if x is not None))

  def mark(x):
    missing = () if x is None else tuple(sorted(union - varying(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x

  return tuple(mark(x) for x in arrays)


def result_like(
  shape: Sequence[int], dtype: Any, operand: Array
) -> jax.ShapeDtypeStruct:
  """Describes an output that varies over the mesh axes of an operand.

  Args:
    shape: shape of the output.
    dtype: its dtype.
    operand: array from which the manual axes are taken, after
      `varying_together`.

  Returns:
    What `pallas_call` takes as `out_shape`, so that the call passes the check
    of `jax.shard_map`.

  Example:
    >>> import jax.numpy as jnp
    >>> result_like((2, 3), jnp.int32, jnp.ones(4)).shape
    (2, 3)
  """
  return jax.ShapeDtypeStruct(
    tuple(shape),
    dtype,
    manual_axis_type=jax.typeof(operand).manual_axis_type,
  )

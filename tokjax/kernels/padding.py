"""Values after an axis, so that tiles fit."""

import jax.numpy as jnp

from tokjax.typing import Array

__all__ = ["pad_to", "pad_to_multiple"]


def pad_to(x: Array, axis: int, size: int, value: int | float = 0) -> Array:
  """Values after an axis, up to a size.

  Args:
    x: any array.
    axis: which.
    size: of the axis then, at least what it is.
    value: what fills it.

  Example:
    >>> pad_to(jnp.arange(3), 0, 5, -1).tolist()
    [0, 1, 2, -1, -1]
  """
  if x.shape[axis] == size:
    return x
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, size - x.shape[axis])
  return jnp.pad(x, widths, constant_values=value)


def pad_to_multiple(
  x: Array, axis: int, multiple: int, value: int | float = 0
) -> Array:
  """Values after an axis, up to a multiple.

  Args:
    x: any array.
    axis: which.
    multiple: of what the size of the axis is then.
    value: what fills it.

  Example:
    >>> pad_to_multiple(jnp.arange(3), 0, 2).tolist()
    [0, 1, 2, 0]
  """
  size = x.shape[axis]
  return pad_to(x, axis, size + -size % multiple, value)

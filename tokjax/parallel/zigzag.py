"""The order of a sequence that gives each device as much causal work.

    order = zigzag_order(length, num_devices)
    ids, targets, positions = ids[:, order], targets[:, order], order

Under a causal mask the last tokens read many keys and the first few. Cut into
2 P chunks, device r of P gets chunks r and 2 P - 1 - r, so that each holds one
of the early and one of the late. Reorder once, where the batch is made, and all
that belongs to tokens with it: targets, segment ids, positions of a rotary
embedding. Everything but attention treats tokens alike.
"""

import numpy as np

from tokjax import checks
from tokjax.typing import Array

__all__ = ["from_zigzag", "to_zigzag", "zigzag_order"]


def zigzag_order(length: int, num_devices: int) -> np.ndarray:
  """Position in the sequence of each token in zigzag order.

  Args:
    length: tokens of the whole sequence, a multiple of 2 `num_devices`: pad
      before.
    num_devices: devices that share it, at least 1; a device holds
      length / `num_devices` tokens in a row of this order.

  Returns:
    int32 [length] of the host. Within a device positions ascend.

  Raises:
    ValueError: if the chunks do not divide the length.

  Example:
    >>> zigzag_order(8, 2).tolist()
    [0, 1, 6, 7, 2, 3, 4, 5]

  Source: zhuzilin/ring-flash-attention, and after it TokenRing.
  """
  checks.in_range(1, length, num_devices=num_devices)
  checks.divisible(2 * num_devices, length=length)
  chunks = np.arange(length, dtype=np.int32).reshape(2 * num_devices, -1)
  # Row r holds chunks r and 2 P - 1 - r.
  early, late = chunks[:num_devices], chunks[num_devices:][::-1]
  return np.stack([early, late], axis=1).reshape(-1)


def to_zigzag(
  x: Array | np.ndarray, num_devices: int, *, axis: int = -1
) -> Array | np.ndarray:
  """An array in the order of the sequence, brought into zigzag order.

  Args:
    x: any array, of the host or of devices; the axis must not be sharded yet.
    num_devices: devices that are to share the axis.
    axis: the tokens.

  Returns:
    The same entries.

  Raises:
    ValueError: if 2 `num_devices` does not divide the axis.

  Example:
    >>> import jax.numpy as jnp
    >>> to_zigzag(jnp.arange(4), 2).tolist()
    [0, 3, 1, 2]
  """
  return x.take(zigzag_order(x.shape[axis], num_devices), axis=axis)


def from_zigzag(
  x: Array | np.ndarray, num_devices: int, *, axis: int = -1
) -> Array | np.ndarray:
  """The way back; arguments and errors are those of `to_zigzag`.

  Example:
    >>> import jax.numpy as jnp
    >>> from_zigzag(to_zigzag(jnp.arange(4), 2), 2).tolist()
    [0, 1, 2, 3]
  """
  order = zigzag_order(x.shape[axis], num_devices)
  return x.take(np.argsort(order), axis=axis)

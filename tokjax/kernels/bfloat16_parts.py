"""float32 values as sums of bfloat16 values, for matrix units that take those.

Three parts hold the 24 bits of a float32. A product of two such values is nine
products of parts; the six large ones leave an error near 2^-24.
"""

import jax.numpy as jnp
from jax import lax

from tokjax.typing import Array, Float

__all__ = ["bfloat16_parts"]


def bfloat16_parts(
  x: Float[Array, "*shape"], count: int
) -> list[Float[Array, "*shape"]]:
  """Arrays of bfloat16 that sum to x, the largest first.

  To be run by XLA, which may drop a cast to bfloat16 and back; it never drops
  `reduce_precision`.

  Args:
    x: float32; a part of NaN or inf is NaN or inf.
    count: how many parts, static; each holds 8 bits.

  Returns:
    The parts.

  Example:
    >>> high, low = bfloat16_parts(jnp.array([1 + 2.0**-10]), 2)
    >>> high.tolist(), low.tolist()
    ([1.0], [0.0009765625])
  """
  parts = []
  for _ in range(count):
    part = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    parts.append(part.astype(jnp.bfloat16))
    x = x - part
  return parts

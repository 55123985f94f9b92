"""Rotary positions: what two tokens say to each other hangs on their distance.

    queries, keys = rotate(queries), rotate(keys)

Source: Su et al., 2021, "RoFormer: Enhanced Transformer with Rotary Position
Embedding"; channel i is turned with channel i + d/2, as in GPT-NeoX and Llama.
"""

import jax.numpy as jnp

from tokjax import checks
from tokjax.typing import Array, Float, Int

__all__ = ["rotate"]


def rotate(
  x: Float[Array, "*batch N d"],
  positions: Int[Array, " N"] | None = None,
  *,
  base: float = 10000.0,
) -> Float[Array, "*batch N d"]:
  """Turns each pair of channels by an angle in proportion to the position.

  Pair i turns by position * base^(-2 i / d). The dot product of two rotated
  vectors depends on the difference of their positions only.

  Args:
    x: queries or keys.
    positions: one per token; None counts from 0.
    base: the longest wave is 2 pi base tokens long.

  Returns:
    The same lengths in the dtype of x; angles are float32.

  Raises:
    ValueError: if d is odd or there are not N positions.

  Example:
    >>> import jax
    >>> x = jnp.array([[1.0, 0.0], [1.0, 0.0]])
    >>> [round(float(y), 4) for y in jax.jit(rotate)(x)[1]]  # cos 1, sin 1
    [0.5403, 0.8415]
  """
  num_tokens, width = x.shape[-2:]
  checks.divisible(2, width=width)
  if positions is None:
    positions = jnp.arange(num_tokens)
  checks.same_size(positions=positions.shape[0], tokens=num_tokens)
  rates = base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
  angles = positions.astype(jnp.float32)[:, None] * rates[None]  # [N, d/2]
  shape = (1,) * (x.ndim - 2) + angles.shape
  cos, sin = jnp.cos(angles).reshape(shape), jnp.sin(angles).reshape(shape)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = first * cos - second * sin, second * cos + first * sin
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)

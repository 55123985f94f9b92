"""Lengths and angles of vectors, safe at zero."""

import jax
import jax.numpy as jnp

from tokjax.typing import Array, Float

__all__ = ["cosine", "safe_normalize"]


def safe_normalize(
  x: Float[Array, "*batch D"], *, epsilon: float = 1e-12
) -> Float[Array, "*batch D"]:
  """Scales the last axis to length one; zero stays zero, gradient included.

  Vectors no longer than `epsilon` become zero with zero gradient instead of
  NaN. The length is computed in float32.

  Args:
    x: vectors, any float dtype.
    epsilon: length at or below which a vector counts as zero.

  Returns:
    Vectors in the dtype of `x`.

  Example:
    >>> import jax.numpy as jnp
    >>> unit = safe_normalize(jnp.array([[3.0, 4.0], [0.0, 0.0]]))
    >>> [[round(float(x), 4) for x in row] for row in unit]
    [[0.6, 0.8], [0.0, 0.0]]

  Source: common knowledge; the zero gradient at zero is ours.
  """
  wide = x.astype(jnp.float32)
  # Scaled by the largest entry first, whose square cannot over- or underflow.
  largest = jax.lax.stop_gradient(
    jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
  )
  # The inner `where`s keep division and rsqrt away from 0, whose gradients are
  # infinite.
  scaled = wide / jnp.where(largest > 0, largest, 1.0)
  square = jnp.sum(jnp.square(scaled), axis=-1, keepdims=True)  # 1..D, or 0
  scale = jax.lax.rsqrt(jnp.where(square > 0, square, 1.0))
  nonzero = largest * jnp.sqrt(jax.lax.stop_gradient(square)) > epsilon
  return jnp.where(nonzero, scaled * scale, 0).astype(x.dtype)


def cosine(
  x: Float[Array, "*batch D"], y: Float[Array, "*batch D"]
) -> Float[Array, "*batch"]:
  """Cosines of pairs of vectors, float32; 0 where one of them is zero.

  Args:
    x: vectors.
    y: one for each of them.

  Returns:
    In -1..1.

  Example:
    >>> import jax.numpy as jnp
    >>> x, y = jnp.array([3.0, 4.0]), jnp.array([1.0, 0.0])
    >>> round(cosine(x, y).item(), 4)
    0.6
  """
  x, y = (safe_normalize(a.astype(jnp.float32)) for a in (x, y))
  return jnp.sum(x * y, axis=-1)

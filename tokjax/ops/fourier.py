"""Coordinates as waves, so that a network sees small differences."""

import jax.numpy as jnp

from tokjax import checks
from tokjax.typing import Array, Float

__all__ = ["fourier_features"]


def fourier_features(
  x: Float[Array, "*batch D"], *, num_frequencies: int
) -> Float[Array, "*batch E"]:
  """x, and sine and cosine of 2^k pi x for k below `num_frequencies`.

  Args:
    x: coordinates.
    num_frequencies: F.

  Returns:
    float32 of width D (1 + 2 F): x, the sines by coordinate, the cosines.

  Raises:
    ValueError: if F is negative.

  Example:
    >>> x = fourier_features(jnp.array([0.5]), num_frequencies=1)
    >>> x.round(3).tolist()
    [0.5, 1.0, -0.0]

  Source: Mildenhall et al., 2020, "NeRF"; frequencies of 3DShape2VecSet.
  """
  checks.in_range(0, 1 << 10, num_frequencies=num_frequencies)
  x = x.astype(jnp.float32)
  angles = [jnp.pi * 2**k * x for k in range(num_frequencies)]
  # [*batch, D, F] -> [*batch, D F]
  angles = jnp.stack(angles, axis=-1) if angles else x[..., None][..., :0]
  angles = angles.reshape(*x.shape[:-1], -1)
  return jnp.concatenate([x, jnp.sin(angles), jnp.cos(angles)], axis=-1)

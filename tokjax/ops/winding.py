"""Inside or outside of a surface of triangles, by solid angles."""

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.typing import Array, Float

__all__ = ["winding_numbers"]


def winding_numbers(
  points: Float[Array, "P 3"],
  triangles: Float[Array, "F 3 3"],
  *,
  block_size: int = 256,
) -> Float[Array, " P"]:
  """How often a surface goes round each point.

  The sum of the signed solid angles of the triangles over 4 pi. For a closed
  surface whose triangles turn anticlockwise as seen from outside it is 1
  inside and 0 outside, up to rounding. For one with holes it is in between,
  smooth away from the surface, and 1/2 is where to cut; triangles turned the
  other way count negative.

  Args:
    points: where to ask, any float dtype.
    triangles: their corners.
    block_size: triangles looked at at once, static.

  Returns:
    float32. No gradient flows.

  Raises:
    ValueError: if `block_size` is not positive.

  Example:
    >>> corners = jnp.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    >>> faces = jnp.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])
    >>> points = jnp.array([[0.2, 0.2, 0.2], [1.0, 1.0, 1.0]])
    >>> jnp.abs(jax.jit(winding_numbers)(points, corners[faces])).round(3)
    Array([1., 0.], dtype=float32)

  Cost: some 60 FLOPs and one arc tangent for each pair; holds P x `block_size`
  numbers at most.

  Source: Jacobson, Kavan and Sorkine-Hornung (2013), "Robust Inside-Outside
  Segmentation using Generalized Winding Numbers"; the angle of a triangle, Van
  Oosterom and Strackee (1983), "The Solid Angle of a Plane Triangle".
  """
  checks.in_range(1, 1 << 20, block_size=block_size)
  points, triangles = jax.lax.stop_gradient((points, triangles))
  points = points.astype(jnp.float32)
  triangles = triangles.astype(jnp.float32)
  # Triangles without area, seen under no angle, fill the last block.
  missing = -triangles.shape[0] % block_size
  triangles = jnp.pad(triangles, ((0, missing), (0, 0), (0, 0)))
  blocks = triangles.reshape(-1, block_size, 3, 3)
  start = jnp.zeros_like(points[:, 0])

  def add(total, block):
    return total + jnp.sum(_half_angles(points, block), axis=1), None

  total, _ = jax.lax.scan(add, start, blocks)
  return total / (2 * jnp.pi)


def _half_angles(points, triangles):
  """Half the solid angle of triangle f as seen from point p, [P, F]."""
  # Coordinates apart: every line is one pass over numbers [P, F].
  a, b, c = (
    [triangles[None, :, i, axis] - points[:, None, axis] for axis in range(3)]
    for i in range(3)
  )
  length_a, length_b, length_c = (jnp.sqrt(_dot(x, x)) for x in (a, b, c))
  volume = (
    a[0] * (b[1] * c[2] - b[2] * c[1])
    + a[1] * (b[2] * c[0] - b[0] * c[2])
    + a[2] * (b[0] * c[1] - b[1] * c[0])
  )
  rest = (
    length_a * length_b * length_c
    + _dot(a, b) * length_c
    + _dot(b, c) * length_a
    + _dot(c, a) * length_b
  )
  return jnp.arctan2(volume, rest)


def _dot(x, y):
  return x[0] * y[0] + x[1] * y[1] + x[2] * y[2]

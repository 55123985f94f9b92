"""Tables of position embeddings on another grid, as torch interpolates them.

Published vision transformers learn one vector per cell of a square grid and
are used at other sizes through torch's bicubic interpolation. It is linear and
separable: one small matrix per axis, made on the host from the two sizes.
"""

import jax.numpy as jnp
import numpy as np

from tokjax import checks
from tokjax.typing import Array, Float

__all__ = ["interpolate_grid", "interpolation_matrix"]


def interpolate_grid(
  table: Float[Array, "N D"],
  grid: tuple[int, int],
  new_grid: tuple[int, int],
  *,
  antialias: bool = False,
) -> Float[Array, "M D"]:
  """Position embeddings of a grid of another size, bicubic.

  Args:
    table: one row per cell, row by row.
    grid: rows and columns of the table.
    new_grid: rows and columns wanted, static.
    antialias: as in `interpolation_matrix`.

  Returns:
    One row per cell of the new grid, in the dtype of the table; the table
    itself where the grids are equal.

  Raises:
    ValueError: if the table does not have the cells of its grid.

  Example:
    >>> table = jnp.arange(4.0)[:, None]
    >>> interpolate_grid(table, (2, 2), (1, 1))[:, 0].tolist()
    [1.5]

  Cost: 2 D (M_rows N_rows N_columns + M_rows M_columns N_columns) FLOPs.

  Source: `torch.nn.functional.interpolate(mode="bicubic",
    align_corners=False)`, which the published checkpoints are used with.
  """
  checks.same_size(table=table.shape[0], cells_of_grid=grid[0] * grid[1])
  if grid == new_grid:
    return table
  rows, columns = (
    jnp.asarray(interpolation_matrix(old, new, antialias=antialias))
    for old, new in zip(grid, new_grid, strict=True)
  )
  cells = table.astype(jnp.float32).reshape(*grid, -1)
  cells = jnp.einsum("rh,hwd->rwd", rows, cells, precision="highest")
  cells = jnp.einsum("cw,rwd->rcd", columns, cells, precision="highest")
  return cells.reshape(-1, table.shape[-1]).astype(table.dtype)


def interpolation_matrix(
  size: int, new_size: int, *, antialias: bool = False
) -> np.ndarray:
  """The matrix that resamples an axis by torch's bicubic interpolation.

  Sample i of the new axis stands at (i + 1/2) size / new_size - 1/2 of the
  old. Without antialiasing it reads its four neighbours with the cubic kernel
  of a = -0.75, cells beyond the border being those at the border. With it the
  kernel has a = -0.5, is as many times wider as the axis shrinks, and its
  weights within the border are scaled to sum 1.

  Args:
    size: cells of the old axis.
    new_size: cells of the new.
    antialias: what DINOv2 with registers was published with; the others
      without.

  Returns:
    float32 [new_size, size]; rows sum to 1.

  Raises:
    ValueError: for a size below 1.

  Example:
    >>> interpolation_matrix(2, 4)[0].astype(float).round(4).tolist()
    [1.1055, -0.1055]

  Source: Keys (1981), "Cubic convolution interpolation"; the constants and
    borders are torch's.
  """
  checks.in_range(1, float("inf"), size=size, new_size=new_size)
  scale = size / new_size
  center = (np.arange(new_size) + 0.5) * scale - 0.5  # [M]
  matrix = np.zeros((new_size, size))
  if antialias:
    width = max(scale, 1.0)
    distance = (np.arange(size)[None] - center[:, None]) / width
    matrix = _cubic(distance, -0.5)
    matrix /= matrix.sum(axis=1, keepdims=True)
  else:
    first = np.floor(center).astype(int) - 1
    for tap in range(4):
      weight = _cubic(center - (first + tap), -0.75)
      place = np.clip(first + tap, 0, size - 1)
      np.add.at(matrix, (np.arange(new_size), place), weight)
  return matrix.astype(np.float32)


def _cubic(distance, a):
  x = np.abs(distance)
  near = (a + 2) * x**3 - (a + 3) * x**2 + 1
  far = a * (x**3 - 5 * x**2 + 8 * x - 4)
  return np.where(x <= 1, near, np.where(x < 2, far, 0))

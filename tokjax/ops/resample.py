"""Maps of tokens on another grid, by constant matrices.

A row of n tokens becomes one of m by an [m, n] matrix; a map takes one matrix
for its rows and one for its columns. The matrices are made on the host:

- `area_matrix`: each output is the mean of the inputs it covers (adaptive
  average pooling).
- `cubic_matrix`: cubic interpolation as image libraries of published encoders
  do it; `jax.image.resize` has another kernel and other edges.
- `linear_matrix`: linear interpolation.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from tokjax import checks
from tokjax.typing import Array, Float

__all__ = [
  "area_matrix",
  "cubic_matrix",
  "linear_matrix",
  "pyramid",
  "resample",
]


def area_matrix(inputs: int, outputs: int) -> np.ndarray:
  """Means over floor(i n / m) .. ceil((i + 1) n / m) - 1, float32[m, n].

  Bins overlap where m does not divide n.

  Args:
    inputs: n.
    outputs: m.

  Example:
    >>> area_matrix(4, 2).tolist()
    [[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]

  Source: adaptive average pooling of torch.
  """
  _check(inputs, outputs)
  place, where = np.arange(outputs)[:, None], np.arange(inputs)[None]
  first = place * inputs // outputs
  end = -((-(place + 1) * inputs) // outputs)
  covered = (where >= first) & (where < end)
  return (covered / covered.sum(1, keepdims=True)).astype(np.float32)


def cubic_matrix(
  inputs: int, outputs: int, sharpness: float = -0.75
) -> np.ndarray:
  """Cubic interpolation at centres of cells, float32[m, n].

  No smoothing when shrinking; what lies beyond the edge is the edge.

  Args:
    inputs: n.
    outputs: m.
    sharpness: the parameter a of the kernel.

  Example:
    >>> (cubic_matrix(2, 4) @ np.array([0.0, 1.0])).round(5).tolist()
    [-0.10547, 0.22656, 0.77344, 1.10547]

  Source: Keys (1981), "Cubic convolution interpolation"; a = -.75 as torch.
  """

  def kernel(x):
    x, a = np.abs(x), sharpness
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0))

  return _interpolation(inputs, outputs, kernel, range(-1, 3))


def linear_matrix(inputs: int, outputs: int) -> np.ndarray:
  """Linear interpolation at centres of cells, float32[m, n].

  Args:
    inputs: n.
    outputs: m.

  Example:
    >>> (linear_matrix(2, 4) @ np.array([0.0, 1.0])).tolist()
    [0.0, 0.25, 0.75, 1.0]
  """
  return _interpolation(
    inputs, outputs, lambda x: np.maximum(1 - np.abs(x), 0), range(2)
  )


def _interpolation(inputs, outputs, kernel, taps):
  _check(inputs, outputs)
  centre = (np.arange(outputs) + 0.5) * inputs / outputs - 0.5
  first = np.floor(centre).astype(int)
  matrix = np.zeros((outputs, inputs))
  for tap in taps:
    place = np.clip(first + tap, 0, inputs - 1)
    weight = kernel(centre - (first + tap))
    np.add.at(matrix, (np.arange(outputs), place), weight)
  return matrix.astype(np.float32)


def _check(inputs, outputs):
  checks.in_range(1, 1 << 20, inputs=inputs, outputs=outputs)


def resample(
  x: Float[Array, "*batch height width C"],
  rows: np.ndarray,
  columns: np.ndarray,
) -> Float[Array, "*batch height2 width2 C"]:
  """A map on another grid: `rows` times x times `columns` transposed.

  Args:
    x: channels last.
    rows: [height2, height], one of the matrices here.
    columns: [width2, width].

  Returns:
    In the dtype of x, summed in float32.

  Raises:
    ValueError: if a matrix has another width.

  Example:
    >>> x = jnp.arange(4.0).reshape(1, 2, 2, 1)
    >>> resample(x, area_matrix(2, 1), area_matrix(2, 1)).item()
    1.5
  """
  height, width = x.shape[-3:-1]
  checks.same_size(rows=rows.shape[1], height=height)
  checks.same_size(columns=columns.shape[1], width=width)
  y = jnp.einsum(
    "ph,...hwc->...pwc", rows, x.astype(jnp.float32), precision="highest"
  )
  y = jnp.einsum("qw,...pwc->...pqc", columns, y, precision="highest")
  return y.astype(x.dtype)


def pyramid(
  x: Float[Array, "*batch N C"], sides: Sequence[int]
) -> Float[Array, "*batch N2 C"]:
  """A square map as maps of several sides, by means, coarse to fine.

  Args:
    x: the tokens of a square map, row by row.
    sides: side of each map, static.

  Returns:
    The tokens of all maps, one map after the other, each row by row.

  Raises:
    ValueError: if the tokens fill no square.

  Example:
    >>> x = jnp.array([[[1.0], [2.0], [3.0], [4.0]]])
    >>> pyramid(x, (1, 2))[0, :, 0].tolist()
    [2.5, 1.0, 2.0, 3.0, 4.0]

  Cost: 2 N N2 C FLOPs.
  """
  side = int(np.sqrt(x.shape[-2]) + 0.5)
  checks.same_size(tokens=x.shape[-2], square=side * side)
  one = [area_matrix(side, s) for s in sides]
  matrix = np.concatenate([np.kron(a, a) for a in one])
  y = jnp.einsum(
    "mn,...nc->...mc", matrix, x.astype(jnp.float32), precision="highest"
  )
  return y.astype(x.dtype)

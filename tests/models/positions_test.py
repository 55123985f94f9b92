"""Bicubic interpolation of tables, against a loop over torch's definition."""

import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.models import positions


def sample(values, place, width, a):
  """One sample of a row by the cubic kernel; cells outside are at the edge."""

  def cubic(x):
    x = abs(x)
    if x <= 1:
      return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

  total = weight = 0.0
  if width is None:  # four taps, clamped
    first = int(np.floor(place)) - 1
    for i in range(first, first + 4):
      total += cubic(place - i) * values[min(max(i, 0), len(values) - 1)]
    return total
  for i, value in enumerate(values):
    w = cubic((i - place) / width)
    total, weight = total + w * value, weight + w
  return total / weight


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("sizes", [(4, 7), (7, 4), (3, 3), (1, 5), (16, 5)])
def test_matrix_equals_the_loop(sizes, antialias):
  old, new = sizes
  values = np.random.default_rng(old).normal(size=old)
  matrix = positions.interpolation_matrix(old, new, antialias=antialias)
  assert matrix.shape == (new, old) and matrix.dtype == np.float32
  np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-6)
  for i in range(new):
    place = (i + 0.5) * old / new - 0.5
    width = max(old / new, 1.0) if antialias else None
    want = sample(values, place, width, -0.5 if antialias else -0.75)
    np.testing.assert_allclose(matrix[i] @ values, want, atol=1e-5)


def test_equal_grids_are_left_alone():
  table = jnp.float32(np.random.default_rng(0).normal(size=(6, 2)))
  assert positions.interpolate_grid(table, (2, 3), (2, 3)) is table
  for antialias in (False, True):
    same = positions.interpolation_matrix(5, 5, antialias=antialias)
    np.testing.assert_allclose(same, np.eye(5), atol=1e-7)


def test_rows_and_columns_are_separate():
  """A table that rises along the rows only, and one along the columns."""
  rows, columns = np.mgrid[:3, :4].astype(np.float32)
  table = jnp.stack([rows.ravel(), columns.ravel()], axis=1)
  got = positions.interpolate_grid(table, (3, 4), (6, 2)).reshape(6, 2, 2)
  assert np.ptp(got[..., 0], axis=1).max() < 1e-5
  assert np.ptp(got[..., 1], axis=0).max() < 1e-5
  assert (np.diff(got[:, 0, 0]) > 0).all() and got[0, 1, 1] > got[0, 0, 1]


def test_errors():
  with pytest.raises(ValueError, match="table=5, cells_of_grid=6"):
    positions.interpolate_grid(jnp.zeros((5, 2)), (2, 3), (1, 1))
  with pytest.raises(ValueError, match="new_size must lie in 1"):
    positions.interpolation_matrix(2, 0)

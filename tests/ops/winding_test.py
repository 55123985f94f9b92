"""Winding numbers: closed surfaces, holes, and single triangles."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import run
from tokjax.ops import winding


def cube(half=0.5):
  """12 triangles round the cube, anticlockwise from outside."""
  triangles = []
  for axis, sign in itertools.product(range(3), (-1, 1)):
    u, v = np.eye(3)[(axis + 1) % 3], np.eye(3)[(axis + 2) % 3]
    centre = sign * np.eye(3)[axis]
    a, b, c, d = (centre + s * u + t * v
                  for s, t in [(-1, -1), (1, -1), (1, 1), (-1, 1)])  # fmt: skip
    quad = [(a, b, c), (a, c, d)]
    triangles += quad if sign > 0 else [t[::-1] for t in quad]
  return half * np.array(triangles)


def test_one_inside_and_zero_outside_of_a_closed_surface():
  points = np.random.default_rng(0).uniform(-1, 1, (200, 3))
  got = run(winding.winding_numbers, points, cube(), block_size=5)
  inside = np.abs(points).max(1) < 0.5
  np.testing.assert_allclose(got, inside, atol=1e-5)
  turned = run(winding.winding_numbers, points, cube()[:, ::-1])
  np.testing.assert_allclose(turned, -inside.astype(int), atol=1e-5)


def test_seen_from_the_middle_each_side_is_a_sixth():
  middle = np.zeros((1, 3))
  side = cube()[-2:]
  got = run(winding.winding_numbers, middle, side)
  assert float(got[0]) == pytest.approx(1 / 6, abs=1e-6)
  rest = run(winding.winding_numbers, middle, cube()[:-2])
  assert float(rest[0]) == pytest.approx(5 / 6, abs=1e-6)


def test_two_shells_count_twice_and_nothing_counts_nothing():
  both = np.concatenate([cube(0.5), cube(0.9)])
  got = run(winding.winding_numbers, np.array([[0.0, 0, 0], [0.7, 0, 0]]), both)
  np.testing.assert_allclose(got, [2, 1], atol=1e-5)
  none = run(winding.winding_numbers, np.zeros((2, 3)), np.zeros((0, 3, 3)))
  np.testing.assert_array_equal(none, [0, 0])


@pytest.mark.unchecked
def test_errors():
  with pytest.raises(ValueError, match="block_size must lie in"):
    winding.winding_numbers(
      jnp.zeros((1, 3)), jnp.zeros((1, 3, 3)), block_size=0
    )

"""Unions of parts whose surface and inside are known."""

import numpy as np
import pytest

from tokjax.data import solids
from tokjax.data.solids import KINDS, Solid


def one(kind, size, centre=(0.0, 0.0, 0.0)):
  kinds = np.array([KINDS.index(kind)])
  return Solid(kinds, np.array([centre]), np.array([size]))


SIZES = {
  "ball": (0.5, 9.0, 9.0),
  "box": (0.2, 0.3, 0.6),
  "torus": (0.5, 0.2, 9.0),
}
VOLUMES = {
  "ball": 4 / 3 * np.pi * 0.5**3,
  "box": 8 * 0.2 * 0.3 * 0.6,
  "torus": 2 * np.pi**2 * 0.5 * 0.2**2,
}


@pytest.mark.parametrize("kind", KINDS)
def test_volume_distance_and_surface_of_a_part(kind):
  solid, random = (
    one(kind, SIZES[kind], (0.1, -0.2, 0.0)),
    np.random.default_rng(0),
  )
  places = random.uniform(-1, 1, (40_000, 3))
  distance = solids.signed_distance(solid, places)
  assert 8 * (distance < 0).mean() == pytest.approx(VOLUMES[kind], rel=0.06)
  points, normals = solids.sample_surface(solid, 4000, random)
  np.testing.assert_allclose(
    solids.signed_distance(solid, points), 0, atol=1e-6
  )
  out = solids.signed_distance(solid, points + 0.01 * normals)
  np.testing.assert_allclose(out, 0.01, atol=1e-4)
  # Distances outside are those to the nearest sample, up to their spacing.
  far = places[distance > 0][:300]
  away = np.linalg.norm(far[:, None] - points[None], axis=-1).min(1)
  np.testing.assert_allclose(away, distance[distance > 0][:300], atol=0.06)


def test_samples_lie_evenly():
  random = np.random.default_rng(0)
  points, _ = solids.sample_surface(
    one("torus", SIZES["torus"]), 20_000, random
  )
  # Half the area lies beyond the circle, and more by 2 r / (pi R).
  beyond = np.hypot(points[:, 0], points[:, 1]) > 0.5
  want = 0.5 + 0.2 / (np.pi * 0.5)
  assert beyond.mean() == pytest.approx(want, abs=0.02)
  points, normals = solids.sample_surface(
    one("box", SIZES["box"]), 20_000, random
  )
  areas = np.array([0.3 * 0.6, 0.6 * 0.2, 0.2 * 0.3])
  np.testing.assert_allclose(
    np.abs(normals).mean(0), areas / areas.sum(), atol=0.02
  )


def test_unions_have_no_surface_inside():
  kinds = np.array([0, 0])
  both = Solid(
    kinds,
    np.array([[-0.2, 0, 0], [0.2, 0, 0]]),
    np.full((2, 3), 0.4),
  )
  points, _ = solids.sample_surface(both, 2000, np.random.default_rng(0))
  assert solids.signed_distance(both, points).min() > -1e-5
  assert np.all(points[:, 0] * np.sign(points[:, 0]) >= -1e-6)
  assert (points[:, 0] > 0).mean() == pytest.approx(0.5, abs=0.05)


def test_random_unions_stay_in_their_cube():
  random = np.random.default_rng(0)
  for _ in range(20):
    solid = solids.random_solid(random, num_parts=4, half_side=0.8)
    points, _ = solids.sample_surface(solid, 200, random)
    assert len(points) == 200 and np.abs(points).max() <= 0.8 + 1e-5


@pytest.mark.unchecked
def test_errors():
  with pytest.raises(ValueError, match="num_parts must lie in"):
    solids.random_solid(np.random.default_rng(0), num_parts=0)

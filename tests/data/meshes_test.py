"""Meshes: files, boxes, samples of surface and solid, and back from grids."""

import sys

import numpy as np
import pytest

from tokjax.data import meshes
from tokjax.data.meshes import Mesh

CUBE = """\
# a cube of quads
mtllib none.mtl
v 0 0 0
v 1 0 0 0.5 0.5 0.5
v 1 1 0
v 0 1 0
v 0 0 1
v 1 0 1
v 1 1 1
v 0 1 1
vt 0 0
vn 0 0 1
f 4 3 2 1
f 5//1 6//1 7//1 8//1
f 1/1 2/1 6/1 5/1
f 3/1/1 4/1/1 8/1/1 7/1/1   # a comment
f -7 -6 -2 \\
  -3
f 1 5 8 4
"""


def written(tmp_path, text, name="mesh.obj"):
  path = tmp_path / name
  path.write_text(text)
  return path


@pytest.fixture
def cube(tmp_path):
  return meshes.read(written(tmp_path, CUBE))


def test_reads_every_kind_of_corner(cube):
  assert cube.vertices.shape == (8, 3) and cube.faces.shape == (12, 3)
  assert cube.faces[:2].tolist() == [[3, 2, 1], [3, 1, 0]]
  # All triangles face outward: the volume of a closed surface.
  triangles = cube.triangles
  volume = np.linalg.det(triangles).sum() / 6
  assert volume == pytest.approx(1)


@pytest.mark.parametrize("text, message", [
  ("v 0 0\n", r"line 1: a vertex must have 3 finite coordinates, got \['0'"),
  ("v 0 0 nan\n", "line 1: a vertex must have 3 finite"),
  ("v 0 0 0\nf 1 1\n", "line 2: a face must have 3 corners or more, got 2"),
  ("v 0 0 0\n\nf 1 1 2\n", "line 3: a corner must be one of 1 vertices, got 2"),
  ("v 0 0 0\nf 1 1 0\n", "line 2: a corner must count from 1.*got '0'"),
  ("v 0 0 0\nf 1 1 -2\n", "line 2: a corner must count from 1.*got '-2'"),
  ("v 0 0 0\nf 1 1 x/1\n", "line 2: a corner must count .*got 'x/1'"),
  ("v 0 0 0\n", "must hold faces, got none"),
])  # fmt: skip
def test_damaged_files_name_the_line(tmp_path, text, message):
  with pytest.raises(ValueError, match=message):
    meshes.read(written(tmp_path, text))
  with pytest.raises(FileNotFoundError):
    meshes.read(tmp_path / "other.obj")


def test_real_files(shared_data):
  spot = meshes.read(shared_data / "meshes" / "spot.obj")
  assert len(spot.vertices) == 2930 and len(spot.faces) == 5856
  suzanne = meshes.read(shared_data / "meshes" / "suzanne.obj")  # has quads
  assert len(suzanne.vertices) == 507 and len(suzanne.faces) == 968


def test_box(cube):
  long = Mesh(cube.vertices * [1, 2, 4] + 7, cube.faces)
  found = meshes.to_box(long, side=2.0).vertices
  np.testing.assert_allclose(found.min(0), [-0.25, -0.5, -1])
  np.testing.assert_allclose(found.max(0), [0.25, 0.5, 1])
  # A vertex that no face uses does not count.
  more = Mesh(np.concatenate([long.vertices, [[99.0] * 3]]), long.faces)
  np.testing.assert_allclose(meshes.to_box(more, side=2.0).vertices[:8], found)
  with pytest.raises(ValueError, match="some extent, got one point"):
    meshes.to_box(Mesh(np.ones((3, 3)), cube.faces[:1] % 3))


def test_surface_samples_lie_evenly(cube):
  flat = Mesh(cube.vertices * [1, 1, 3], cube.faces)
  random = np.random.default_rng(0)
  points, normals = meshes.sample_surface(flat, 20_000, random)
  assert points.dtype == normals.dtype == np.float32
  x = points / [1, 1, 3]
  side = np.abs(x - np.round(x)) < 1e-6
  assert np.all(side.any(1)) and np.all((x > -1e-6) & (x < 1 + 1e-6))
  # Normals point out of the face that the point is in.
  out = points + 0.01 * normals
  assert np.all(((out < 0) | (out > [1, 1, 3])).any(1))
  np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1, rtol=1e-5)
  # The ends are 2 of 14, and points fill faces evenly.
  assert np.abs(normals[:, 2]).mean() == pytest.approx(2 / 14, abs=0.01)
  top = points[normals[:, 2] > 0.5]
  np.testing.assert_allclose(top[:, :2].mean(0), 0.5, atol=0.03)
  np.testing.assert_allclose(top[:, :2].var(0), 1 / 12, atol=0.01)
  with pytest.raises(ValueError, match="some area, got 0.0"):
    meshes.sample_surface(Mesh(np.ones((8, 3)), cube.faces), 2, random)


def test_what_is_inside(cube):
  box = meshes.to_box(cube)
  random = np.random.default_rng(0)
  points = random.uniform(-1, 1, (300, 3))
  want = np.abs(points).max(1) < 0.5
  np.testing.assert_array_equal(
    meshes.inside(box, points, block_size=128), want
  )
  inverted = Mesh(box.vertices, box.faces[:, ::-1])
  np.testing.assert_array_equal(
    meshes.inside(inverted, points, block_size=128), want
  )
  assert meshes.inside(box, np.zeros((0, 3)), block_size=128).shape == (0,)
  samples = meshes.sample_solid(box, 200, 100, random, half_side=0.6)
  assert samples.points.shape == (300, 3)
  assert np.abs(samples.points[:200]).max() < 0.6
  np.testing.assert_array_equal(
    samples.inside, np.abs(samples.points).max(1) < 0.5
  )
  away = np.abs(np.abs(samples.points[200:]).max(1) - 0.5)
  assert away.mean() < 0.06 and 0.2 < samples.inside[200:].mean() < 0.7


def test_a_ball_from_a_grid():
  pytest.importorskip("skimage")
  along = (np.arange(24) + 0.5) / 24 * 2 - 1
  grid = np.stack(np.meshgrid(along, along, along, indexing="ij"), -1)
  values = 0.6 - np.linalg.norm(grid - [0.1, 0, -0.2], axis=-1)
  mesh = meshes.from_grid(values)
  radius = np.linalg.norm(mesh.vertices - [0.1, 0, -0.2], axis=1)
  np.testing.assert_allclose(radius, 0.6, atol=0.01)
  volume = np.linalg.det(mesh.triangles).sum() / 6  # positive: turned outward
  assert volume == pytest.approx(4 / 3 * np.pi * 0.6**3, rel=0.02)
  smaller = meshes.from_grid(values, level=0.2)
  radius = np.linalg.norm(smaller.vertices - [0.1, 0, -0.2], axis=1)
  np.testing.assert_allclose(radius, 0.4, atol=0.01)
  full = meshes.from_grid(np.ones((4, 4, 4)), half_side=2.0)
  assert np.linalg.det(full.triangles).sum() / 6 == pytest.approx(64, rel=0.25)
  assert meshes.from_grid(-np.ones((4, 4, 4))).faces.shape == (0, 3)


def test_grids_need_scikit_image(monkeypatch):
  monkeypatch.setitem(sys.modules, "skimage", None)
  with pytest.raises(ImportError, match="pip install scikit-image"):
    meshes.from_grid(np.ones((2, 2, 2)))


@pytest.mark.unchecked
def test_grids_have_three_axes():
  with pytest.raises(ValueError, match="values must have 3 axes"):
    meshes.from_grid(np.ones((2, 2)))

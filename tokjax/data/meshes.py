"""Surfaces of triangles: read from files, sampled, asked what is inside.

    mesh = meshes.to_box(meshes.read("bunny.obj"), side=1.8)
    random = np.random.default_rng(0)
    surface = meshes.sample_surface(mesh, 2048, random)
    solid = meshes.sample_solid(mesh, 1024, 1024, random)

Everything is NumPy on the host but for `inside`, which runs on the device.
Coordinates of what is sampled are float32.
"""

import dataclasses
import os
import pathlib
from typing import NamedTuple

import jax
import numpy as np

from tokjax import checks
from tokjax.ops import winding
from tokjax.typing import Bool, Float, Int

__all__ = [
  "Mesh",
  "SolidSamples",
  "SurfaceSamples",
  "from_grid",
  "inside",
  "read",
  "sample_solid",
  "sample_surface",
  "to_box",
]


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Triangles in space; corners anticlockwise as seen from outside.

  Attributes:
    vertices: coordinates.
    faces: three rows of `vertices` for each triangle.
  """

  vertices: Float[np.ndarray, "V 3"]
  faces: Int[np.ndarray, "F 3"]

  @property
  def triangles(self) -> Float[np.ndarray, "F 3 3"]:
    """The corners of each triangle."""
    return self.vertices[self.faces]


class SurfaceSamples(NamedTuple):
  """Points on a surface and the unit vectors that leave it there."""

  points: Float[np.ndarray, "n 3"]
  normals: Float[np.ndarray, "n 3"]


class SolidSamples(NamedTuple):
  """Points in space and which of them a surface encloses."""

  points: Float[np.ndarray, "n 3"]
  inside: Bool[np.ndarray, " n"]


def read(path: str | os.PathLike) -> Mesh:
  """Reads a Wavefront `.obj`; polygons become fans of triangles.

  Of the file only vertices and faces are taken. Corners may be v, v/vt, v//vn
  or v/vt/vn, and count from the end where negative. Colours and weights behind
  coordinates, normals, textures, groups and materials are skipped.

  Args:
    path: the file.

  Returns:
    float64 vertices and int32 faces, in the order of the file.

  Raises:
    FileNotFoundError: if there is no file.
    ValueError: if a line is damaged, a corner is missing or there is no face;
      names file and line.

  Source: the format is that of Wavefront's Advanced Visualizer, appendix B1.
  """
  path = pathlib.Path(path).expanduser()
  vertices, faces = [], []
  with path.open(encoding="utf-8", errors="replace") as file:
    for number, words in _statements(file):
      place = f"{path}, line {number}"
      if words[0] == "v":
        vertices.append(_coordinates(words[1:], place))
      elif words[0] == "f":
        corners = [_corner(word, len(vertices), place) for word in words[1:]]
        if len(corners) < 3:
          raise ValueError(
            f"{place}: a face must have 3 corners or more, got {len(corners)}"
          )
        first = corners[0]
        faces += [
          (first, *pair, number)
          for pair in zip(corners[1:-1], corners[2:], strict=True)
        ]
  if not faces:
    raise ValueError(f"{path} must hold faces, got none")
  faces = np.array(faces, np.int64)
  beyond = np.max(faces[:, :3], axis=1) >= len(vertices)
  if beyond.any():
    row = faces[np.argmax(beyond)]
    raise ValueError(
      f"{path}, line {row[3]}: a corner must be one of {len(vertices)}"
      f" vertices, got {row[:3].max() + 1}"
    )
  return Mesh(np.array(vertices, np.float64), faces[:, :3].astype(np.int32))


def _statements(file):
  """Numbered lines as words; a line that ends in a backslash goes on."""
  words = []
  for number, line in enumerate(file, 1):
    line = line.partition("#")[0].rstrip()
    words += line.removesuffix("\\").split()
    if not line.endswith("\\") and words:
      yield number, words
      words = []
  if words:
    yield number, words


def _coordinates(words, place):
  try:
    found = [float(word) for word in words[:3]]
  except ValueError:
    found = []
  if len(found) < 3 or not np.isfinite(found).all():
    raise ValueError(
      f"{place}: a vertex must have 3 finite coordinates, got {words[:3]}"
    )
  return found


def _corner(word, num_vertices, place):
  try:
    index = int(word.split("/")[0])
  except ValueError:
    index = 0
  if index < 0:
    index += num_vertices + 1
  if index < 1:
    raise ValueError(
      f"{place}: a corner must count from 1, or from -1 back to the first"
      f" vertex, got {word!r}"
    )
  return index - 1


def to_box(mesh: Mesh, *, side: float = 1.0) -> Mesh:
  """Moves the middle of the bounding box to 0 and makes its longest side 1.

  Args:
    mesh: any, with some extent.
    side: the length that the longest side gets instead.

  Returns:
    The same triangles with other coordinates.

  Raises:
    ValueError: if all vertices in use are one point.

  Example:
    >>> mesh = Mesh(np.array([[0.0, 0, 0], [4, 0, 0], [0, 2, 0]]),
    ...             np.array([[0, 1, 2]]))
    >>> to_box(mesh).vertices.tolist()
    [[-0.5, -0.25, 0.0], [0.5, -0.25, 0.0], [-0.5, 0.25, 0.0]]
  """
  used = mesh.triangles.reshape(-1, 3)
  low, high = used.min(axis=0), used.max(axis=0)
  extent = (high - low).max()
  if not extent > 0:
    raise ValueError(f"mesh must have some extent, got one point, {low}")
  vertices = (mesh.vertices - (low + high) / 2) * (side / extent)
  return dataclasses.replace(mesh, vertices=vertices)


def sample_surface(
  mesh: Mesh, number: int, random: np.random.Generator
) -> SurfaceSamples:
  """Random points of a surface, evenly over its area.

  Args:
    mesh: with some area.
    number: n, how many.
    random: the source.

  Returns:
    float32 points, and the normals of the triangles they lie in.

  Raises:
    ValueError: if the mesh has no area.

  Example:
    >>> corners = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]])
    >>> mesh = Mesh(corners, np.array([[0, 1, 2]]))
    >>> sample_surface(mesh, 1, np.random.default_rng(0)).normals.tolist()
    [[0.0, 0.0, 1.0]]

  Source: Osada, Funkhouser, Chazelle and Dobkin (2002), "Shape
  Distributions", for the point in a triangle.
  """
  triangles = mesh.triangles.astype(np.float64)
  origin = triangles[:, 0]
  edges = triangles[:, 1] - origin, triangles[:, 2] - origin
  normals = np.cross(*edges)
  areas = np.linalg.norm(normals, axis=1)
  if not areas.sum() > 0:
    raise ValueError(f"mesh must have some area, got {areas.sum()}")
  which = random.choice(len(areas), number, p=areas / areas.sum())
  root, along = np.sqrt(random.random((number, 1))), random.random((number, 1))
  points = origin[which] + root * (1 - along) * edges[0][which]
  points = points + root * along * edges[1][which]
  normals = normals[which] / areas[which, None]
  return SurfaceSamples(points.astype(np.float32), normals.astype(np.float32))


def inside(
  mesh: Mesh, points: Float[np.ndarray, "n 3"], *, block_size: int = 4096
) -> Bool[np.ndarray, " n"]:
  """Which points a surface encloses; holes are closed in a smooth way.

  Args:
    mesh: may have holes and parts that cross; if most triangles are turned
      inside out, that does not matter.
    points: where to ask.
    block_size: points looked at at once.

  Returns:
    True where the surface goes round a point more than half a time.

  Cost: `winding.winding_numbers`; 70,000 triangles and 10,000 points take some
  ten seconds on one CPU core.

  Source: Jacobson, Kavan and Sorkine-Hornung (2013), "Robust Inside-Outside
  Segmentation using Generalized Winding Numbers"; the absolute value is ours.
  """
  checks.in_range(1, 1 << 30, block_size=block_size)
  triangles = mesh.triangles.astype(np.float32)
  missing = -len(points) % block_size
  padded = np.pad(np.asarray(points, np.float32), ((0, missing), (0, 0)))
  numbers = [
    jax.device_get(_winding_numbers(block, triangles))
    for block in padded.reshape(-1, block_size, 3)
  ]
  return np.abs(np.concatenate([*numbers, np.zeros(0)])[: len(points)]) > 0.5


_winding_numbers = jax.jit(winding.winding_numbers)


def sample_solid(
  mesh: Mesh,
  num_volume: int,
  num_near: int,
  random: np.random.Generator,
  *,
  half_side: float = 1.0,
  deviation: float = 0.05,
) -> SolidSamples:
  """Random points in a cube and near the surface, and which are inside.

  Args:
    mesh: lies in the cube.
    num_volume: points spread evenly over the cube; they come first.
    num_near: points of the surface, moved by normal noise.
    random: the source.
    half_side: the cube is -half_side..half_side on each axis.
    deviation: of the noise on each axis.

  Returns:
    `num_volume + num_near` float32 points and labels; those near the surface
    may lie a little outside of the cube.

  Raises:
    ValueError: if the mesh has no area.

  Source: points near the surface and in the volume as 3DShape2VecSet (Zhang et
  al., 2023) is trained; the deviation is ours.
  """
  volume = random.uniform(-half_side, half_side, (num_volume, 3))
  near = sample_surface(mesh, num_near, random).points
  near = near + deviation * random.standard_normal(near.shape)
  points = np.concatenate([volume, near]).astype(np.float32)
  return SolidSamples(points, inside(mesh, points))


def from_grid(
  values: Float[np.ndarray, "R R R"],
  *,
  level: float = 0.0,
  half_side: float = 1.0,
) -> Mesh:
  """The surface between values below a level and above it.

  Args:
    values: at the centres of R^3 cells of the cube; high means inside.
    level: the value at the surface.
    half_side: the cube is -half_side..half_side on each axis.

  Returns:
    A closed mesh: outside of the cube is outside of the surface. Without
    triangles if no value is above the level.

  Raises:
    ImportError: if scikit-image is not installed.
    ValueError: if `values` has not three axes.

  Source: marching cubes, Lorensen and Cline (1987), in the form of Lewiner et
  al. (2003) of scikit-image.
  """
  checks.has_rank(3, values=values)
  try:
    from skimage import measure
  except ImportError as error:
    raise ImportError(
      "from_grid needs scikit-image: pip install scikit-image"
    ) from error
  values = np.asarray(values, np.float64) - level
  low = min(values.min(), -np.abs(values).max(), -1e-6)
  padded = np.pad(values, 1, constant_values=low)
  if not (values > 0).any():
    return Mesh(np.zeros((0, 3)), np.zeros((0, 3), np.int32))
  vertices, faces, _, _ = measure.marching_cubes(padded, 0.0)
  # Index 1 is the centre of the first cell.
  cells = np.array(values.shape)
  vertices = ((vertices - 0.5) / cells[None] * 2 - 1) * half_side
  return Mesh(vertices, faces[:, ::-1].astype(np.int32))

"""Random solids of known formula: unions of balls, boxes and tori.

They never end, and what is inside is exact: a tokenizer of shapes can be tried
on solids that it has not seen.

    solid = random_solid(np.random.default_rng(0))
    surface = sample_surface(solid, 2048, random)
    inside = signed_distance(solid, places) < 0
"""

import dataclasses

import numpy as np

from tokjax import checks
from tokjax.data.meshes import SurfaceSamples
from tokjax.typing import Float, Int

__all__ = [
  "KINDS",
  "Solid",
  "random_solid",
  "sample_surface",
  "signed_distance",
]

KINDS = ("ball", "box", "torus")


@dataclasses.dataclass(frozen=True)
class Solid:
  """A union of parts.

  Attributes:
    kinds: of each part, a position in `KINDS`.
    centres: of each part.
    sizes: a ball has its radius in front; a box half its sides; a torus, which
      lies round the z axis, the radius of its circle and that of its tube.
  """

  kinds: Int[np.ndarray, " n"]
  centres: Float[np.ndarray, "n 3"]
  sizes: Float[np.ndarray, "n 3"]


def random_solid(
  random: np.random.Generator, *, num_parts: int = 3, half_side: float = 0.9
) -> Solid:
  """A union of parts of random kind, place and size.

  Args:
    random: the source.
    num_parts: n.
    half_side: everything lies within -half_side..half_side.

  Example:
    >>> len(random_solid(np.random.default_rng(0)).kinds)
    3
  """
  checks.in_range(1, 1 << 10, num_parts=num_parts)
  kinds = random.integers(0, len(KINDS), num_parts)
  sizes = random.uniform(0.15, 0.45, (num_parts, 3)) * half_side
  torus = kinds == KINDS.index("torus")
  sizes[torus, 1] = random.uniform(0.25, 0.5, torus.sum()) * sizes[torus, 0]
  reach = np.stack([_reach(*part) for part in zip(kinds, sizes, strict=True)])
  room = half_side - reach
  centres = random.uniform(-room, room)
  return Solid(kinds, centres, sizes)


def _reach(kind, size):
  """How far a part goes along each axis from its centre."""
  if KINDS[kind] == "ball":
    return np.full(3, size[0])
  if KINDS[kind] == "box":
    return size
  return np.array([size[0] + size[1], size[0] + size[1], size[1]])


def signed_distance(
  solid: Solid, points: Float[np.ndarray, "m 3"]
) -> Float[np.ndarray, " m"]:
  """Below 0 inside; outside, the distance to the surface.

  Inside of two parts it is the larger of their depths.

  Args:
    solid: the union.
    points: where to ask.

  Returns:
    float64.

  Example:
    >>> ball = Solid(np.array([0]), np.zeros((1, 3)), np.ones((1, 3)))
    >>> signed_distance(ball, np.array([[0.0, 0, 3], [0, 0, 0]])).tolist()
    [2.0, -1.0]

  Source: the formulas are those of Quilez, "Distance functions".
  """
  parts = zip(solid.kinds, solid.centres, solid.sizes, strict=True)
  return np.min(
    [_distance(kind, points - centre, size) for kind, centre, size in parts],
    axis=0,
  )


def _distance(kind, x, size):
  if KINDS[kind] == "ball":
    return np.linalg.norm(x, axis=-1) - size[0]
  if KINDS[kind] == "box":
    beyond = np.abs(x) - size
    outside = np.linalg.norm(np.maximum(beyond, 0), axis=-1)
    return outside + np.minimum(np.max(beyond, axis=-1), 0)
  ring = np.linalg.norm(x[:, :2], axis=-1) - size[0]
  return np.hypot(ring, x[:, 2]) - size[1]


def sample_surface(
  solid: Solid, number: int, random: np.random.Generator
) -> SurfaceSamples:
  """Random points of the surface, evenly over its area, with normals.

  Args:
    solid: the union.
    number: how many.
    random: the source.

  Returns:
    float32 points and unit normals; parts of the surface that lie inside of
    another part are left out.

  Example:
    >>> ball = Solid(np.array([0]), np.zeros((1, 3)), np.ones((1, 3)))
    >>> found = sample_surface(ball, 5, np.random.default_rng(0))
    >>> bool(np.allclose(found.points, found.normals))
    True
  """
  areas = np.array(
    [_area(*part) for part in zip(solid.kinds, solid.sizes, strict=True)]
  )
  points, normals, found = [], [], 0
  while found < number:
    counts = random.multinomial(2 * number, areas / areas.sum())
    drawn = [
      _on_surface(solid.kinds[i], solid.sizes[i], count, random)
      for i, count in enumerate(counts)
    ]
    x = np.concatenate([p + solid.centres[i] for i, (p, _) in enumerate(drawn)])
    n = np.concatenate([n for _, n in drawn])
    order = random.permutation(len(x))
    seen = order[signed_distance(solid, x[order]) > -1e-6]
    points.append(x[seen])
    normals.append(n[seen])
    found += len(seen)
  points = np.concatenate(points)[:number].astype(np.float32)
  return SurfaceSamples(
    points, np.concatenate(normals)[:number].astype(np.float32)
  )


def _area(kind, size):
  if KINDS[kind] == "ball":
    return 4 * np.pi * size[0] ** 2
  if KINDS[kind] == "box":
    return 8 * (size[0] * size[1] + size[1] * size[2] + size[2] * size[0])
  return 4 * np.pi**2 * size[0] * size[1]


def _on_surface(kind, size, number, random):
  """Points evenly over one part round 0, and their normals."""
  if KINDS[kind] == "ball":
    normals = random.standard_normal((number, 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    return size[0] * normals, normals
  if KINDS[kind] == "box":
    faces = np.array([size[1] * size[2], size[2] * size[0], size[0] * size[1]])
    axis = random.choice(3, number, p=faces / faces.sum())
    normals = np.eye(3)[axis] * random.choice((-1.0, 1.0), (number, 1))
    points = random.uniform(-1, 1, (number, 3)) * size
    return np.where(normals, normals * size, points), normals
  # Of the tube's circle, more lies outside: by the distance to the axis.
  angles = random.uniform(0, 2 * np.pi, (8 * number + 16, 2))
  round_axis = size[0] + size[1] * np.cos(angles[:, 1])
  kept = random.uniform(0, size[0] + size[1], len(angles)) < round_axis
  a, b = angles[kept][:number].T
  normals = np.stack(
    [np.cos(b) * np.cos(a), np.cos(b) * np.sin(a), np.sin(b)], axis=1
  )
  ring = size[0] * np.stack([np.cos(a), np.sin(a), 0 * a], axis=1)
  return ring + size[1] * normals, normals

"""Shapes as tokens: how well a tokenizer stores them in so many bytes.

A small VAT is trained on random unions of balls, boxes and tori and on a folder
of meshes, mirrored, turned and stretched, with Gaussians alone and then with
codes. It is measured on unions that it has not seen and on the meshes as they
are, which it has seen: there the decoder, whose bytes are not counted, may
remember them. Prefixes of the scales are compared with what the same bytes hold
without training: a grid of voxels of a bit each, and points of the surface of a
byte a coordinate.

    rows = measure(ShapeRun("meshes"))
    rows["vat 64"].metrics["iou"]
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokjax.benchmarks.trained_vit import Row
from tokjax.data import meshes, solids
from tokjax.eval import shapes
from tokjax.tokenizers import vat
from tokjax.tokenizers.codebook import CodebookConfig
from tokjax.tokenizers.multi_scale_quantizer import MultiScaleConfig
from tokjax.tokenizers.transformer import TransformerConfig
from tokjax.train import loop
from tokjax.train.optimizer import OptimizerConfig

__all__ = ["Shape", "ShapeRun", "lead", "load", "measure", "train"]

_SIDE = 1.8  # longest side of a mesh in the cube -1..1
_DEVIATION = 0.05  # of queries near the surface
_THRESHOLD = 0.02 * _SIDE  # of the F-score
_GRID = 32  # cells a side for marching cubes
_NUM_POINTS = 128  # that the encoder sees
_NUM_QUERIES = 384  # of a shape and a step, in the volume and near each
_NUM_SOLIDS = 24  # unseen ones to measure on
_BATCH = 16  # shapes of a step, half of them meshes


@dataclasses.dataclass(frozen=True)
class ShapeRun:
  """One training and what it is measured on.

  Attributes:
    dataset: folder of `.obj` files.
    seed: of weights, samples and draws.
    first_steps: of training with Gaussians alone.
    num_steps: of training with codes, after those.
    width: of all transformers.
    learning_rate: at its peak, in both.
    learning: of the codebook.
  """

  dataset: str
  seed: int = 0
  first_steps: int = 1500
  num_steps: int = 1500
  width: int = 64
  learning_rate: float = 1e-3
  learning: str = "ema"


@dataclasses.dataclass(frozen=True)
class Shape:
  """Samples of a shape in the cube -1..1.

  Attributes:
    surface: points and normals.
    volume: places all over the cube and whether they are inside.
    near: places near the surface and whether they are inside.
    inside: says of places whether they are inside; None for a pose of another.
  """

  surface: meshes.SurfaceSamples
  volume: meshes.SolidSamples
  near: meshes.SolidSamples
  inside: Callable[[np.ndarray], np.ndarray] | None = None


def load(run: ShapeRun, *, num_samples: int = 4096) -> list[Shape]:
  """Reads and samples the meshes of a run, in the order of their names.

  Args:
    run: which.
    num_samples: of each kind.

  Returns:
    One a file; some 26 nanoseconds of a core for each sample and triangle.

  Raises:
    ValueError: if there is no mesh.
  """
  paths = sorted(pathlib.Path(run.dataset).expanduser().glob("*.obj"))
  if not paths:
    raise ValueError(f"{run.dataset} must hold .obj files, got none")

  def one(number, path):
    random = np.random.default_rng((run.seed, number))
    mesh = meshes.to_box(meshes.read(path), side=_SIDE)
    surface = meshes.sample_surface(mesh, num_samples, random)
    found = meshes.sample_solid(
      mesh, num_samples, num_samples, random, deviation=_DEVIATION
    )
    parts = (
      meshes.SolidSamples(*(x[half] for x in found))
      for half in (slice(num_samples), slice(num_samples, None))
    )
    return Shape(surface, *parts, functools.partial(meshes.inside, mesh))

  return [one(number, path) for number, path in enumerate(paths)]


def _solid(random, num_points, num_queries):
  """A random union."""
  solid = solids.random_solid(random, half_side=_SIDE / 2)
  surface = solids.sample_surface(solid, num_points, random)
  volume = random.uniform(-1, 1, (num_queries, 3)).astype(np.float32)
  start = solids.sample_surface(solid, num_queries, random).points
  near = _moved(start, random)

  def inside(places):
    return solids.signed_distance(solid, places) < 0

  parts = (meshes.SolidSamples(x, inside(x)) for x in (volume, near))
  return Shape(surface, *parts, inside)


def _moved(points, random):
  noise = random.standard_normal(points.shape)
  return (points + _DEVIATION * noise).astype(np.float32)


def _posed(shape, random, num_points, num_queries):
  """Some samples of a mesh, mirrored, axes swapped, and stretched."""
  axes = random.permutation(3)
  scale = random.uniform(0.6, 1, 3).astype(np.float32)
  scale = scale / scale.max()
  signed = scale * random.choice((-1, 1), 3).astype(np.float32)

  def pick(samples, number):
    rows = random.integers(0, len(samples[0]), number)
    return [x[rows] for x in samples]

  points, normals = pick(shape.surface, num_points)
  normals = normals[:, axes] / signed
  normals /= np.linalg.norm(normals, axis=1, keepdims=True)
  surface = meshes.SurfaceSamples(points[:, axes] * signed, normals)
  near, near_inside = pick(shape.near, num_queries)
  near = meshes.SolidSamples(near[:, axes] * signed, near_inside)
  # Places over the whole cube: what lies beyond the stretched one is outside.
  places, inside = pick(shape.volume, num_queries)
  other = random.uniform(-1, 1, places.shape).astype(np.float32)
  within = np.all(np.abs(other) < scale, axis=1)
  places = np.where(within[:, None], places[:, axes] * signed, other)
  return Shape(surface, meshes.SolidSamples(places, inside & within), near)


def _batches(
  run: ShapeRun, examples: Sequence[Shape], stage: int
) -> Iterator[tuple]:
  """Half random unions, half meshes, always other ones."""
  random = np.random.default_rng((run.seed, stage, 1 << 20))
  number = _NUM_POINTS, _NUM_QUERIES
  while True:
    chosen = random.integers(0, len(examples), _BATCH // 2)
    drawn = [_posed(examples[i], random, *number) for i in chosen]
    drawn += [_solid(random, *number) for _ in range(_BATCH - len(drawn))]
    yield (
      np.stack([_points(shape) for shape in drawn]),
      *(
        np.stack([np.concatenate(x) for x in parts])
        for parts in zip(
          *(zip(s.volume, s.near, strict=True) for s in drawn), strict=True
        )
      ),
    )


def _points(shape):
  """What the encoder sees."""
  return np.concatenate(shape.surface, axis=1)[:_NUM_POINTS]


def _config(run):
  width = run.width
  stack = functools.partial(TransformerConfig, num_heads=4, init_scale=0.125)
  return vat.VATConfig(
    # One byte a token; prefixes of 1, 2, 4, ... 64 bytes.
    quantizer=MultiScaleConfig(
      CodebookConfig(
        256,
        16,
        learning=run.learning,
        decay=0.95,
        reset="batch" if run.learning == "ema" else "none",
        reset_threshold=0.25,
      ),
      (1, 1, 2, 4, 8, 16, 32),
      layout="row",
      up="linear",
      num_convolutions=0,
      code_deviation=0.3,
      dropout_from=1,
    ),
    encoder=stack(width, 2),
    decoder=stack(width, 2),
    planes=stack(width, 1, context_dim=width),
    num_frequencies=3,
    normals="raw",
    plane_tokens=8,
    plane_shuffle=4,
    plane_dim=16,
    head_width=64,
    num_volume=_NUM_QUERIES,
    near_weight=1.0,  # solids are small: few places of the volume are inside
  )


def train(
  run: ShapeRun, examples: list[Shape], *, log_every: int = 0
) -> tuple[vat.Vat, object]:
  """Trains a tokenizer on the shapes.

  Args:
    run: the settings.
    examples: the shapes.
    log_every: steps between lines of a log, 0 for none.

  Returns:
    The tokenizer and the state of its codebook.
  """
  model = jax.jit(lambda: _config(run).build(nnx.Rngs(run.seed)))()
  key = jax.random.key(run.seed)
  state = model.init_state(jax.random.fold_in(key, 0))
  stages = (False, run.first_steps), (True, run.num_steps)
  for number, (quantize, num_steps) in enumerate(stages, 1):
    if not num_steps:
      continue
    model.config = dataclasses.replace(model.config, quantize=quantize)
    optimizer = OptimizerConfig(
      learning_rate=run.learning_rate, warmup_steps=num_steps // 20
    )
    done = loop.train(
      model,
      _loss,
      _batches(run, examples, number),
      loop.TrainConfig(num_steps, optimizer, log_every=log_every),
      key=jax.random.fold_in(key, number),
      buffers=state,
    )
    model, state = done.state.model, done.state.buffers
  return model, state


def _loss(model, buffers, batch, key):
  found, buffers = model(*batch, buffers, train=True, key=key)
  return (
    sum(found.losses.values()),
    {**found.losses, **found.stats},
    buffers,
  )


def measure(run: ShapeRun, *, progress: bool = True) -> Mapping[str, Row]:
  """Overlap and F-score of each way to store shapes, by bytes.

  Args:
    run: the settings; trains its tokenizer.
    progress: show lines of the training.

  Returns:
    Rows "WAY BYTES" of the ways "vat", "voxels" and "points", means over
    shapes: "iou" of the volume, not of points, and "f_score" at .02 of the
    longest side of the cube that meshes fill, on unseen unions; the same with
    "mesh_" in front on the meshes.
  """
  known = load(run)
  model, state = train(run, known, log_every=100 if progress else 0)
  random = np.random.default_rng((run.seed, 1 << 21))
  unseen = [_solid(random, 4096, 4096) for _ in range(_NUM_SOLIDS)]
  examples = unseen + known
  points = np.stack([_points(shape) for shape in examples])
  indices = jax.jit(lambda m, x, s: m.encode(x, s).indices)(
    model, points, state
  )
  rows = {}
  for number in range(1, len(model.config.quantizer.sizes) + 1):
    size = round(vat.bytes_per_shape(model.config, num_scales=number))
    planes = _decode(model, indices, state, number)
    ways = {
      "vat": [
        _of_logits(functools.partial(_logits, model, planes[i : i + 1]), shape)
        for i, shape in enumerate(examples)
      ],
      "voxels": [_voxels(shape, size) for shape in examples],
      "points": [_of_points(shape, size) for shape in examples],
    }
    for way, found in ways.items():
      rows[f"{way} {size}"] = Row(
        {
          **_means(found[: len(unseen)], ""),
          **_means(found[len(unseen) :], "mesh_"),
        }
      )
  return rows


def _means(found, prefix):
  return {
    prefix + name: float(np.mean([one[name] for one in found]))
    for name in found[0]
  }


@functools.partial(jax.jit, static_argnums=3)
def _decode(model, indices, state, num_scales):
  return model.decode(indices, state, num_scales=num_scales)


@jax.jit
def _query(model, planes, places):
  return model.query(planes, places[None], block_size=4096)[0]


def _logits(model, planes, places):
  return np.asarray(_query(model, planes, jnp.asarray(places)))


def _centres(side):
  """Centres of side^3 cells of the cube, [side^3, 3]."""
  along = (np.arange(side, dtype=np.float32) + 0.5) / side * 2 - 1
  grid = np.meshgrid(along, along, along, indexing="ij")
  return np.stack(grid, axis=-1).reshape(-1, 3)


def _of_logits(logits, shape):
  """Overlap and F-score of what is inside where logits are high."""
  values = logits(_centres(_GRID)).reshape((_GRID,) * 3)
  mesh = meshes.from_grid(values)
  found = {"f_score": 0.0}
  if len(mesh.faces):
    number, random = len(shape.surface.points), np.random.default_rng(0)
    points = meshes.sample_surface(mesh, number, random).points
    found = {"f_score": _f_score(points, shape)}
  inside = jnp.asarray(logits(shape.volume.points) > 0)
  return {"iou": float(_iou(inside, shape.volume.inside)), **found}


def _f_score(points, shape):
  targets = shape.surface.points
  return float(_f(points, targets, threshold=_THRESHOLD).f_score)


_iou, _f = jax.jit(shapes.volume_iou), jax.jit(shapes.f_score)


def _voxels(shape, size):
  """A grid of a bit each: whether the middle of a cell is inside.

  The grid spans the bounding box of the shape, which costs nothing here.
  """
  side = int((8 * size) ** (1 / 3) + 1e-9)
  surface = shape.surface.points
  low, high = surface.min(axis=0), surface.max(axis=0)
  grid = shape.inside(low + (_centres(side) + 1) / 2 * (high - low))

  def logits(places):
    cell = np.floor((places - low) / (high - low) * side).astype(int)
    here = np.all((cell >= 0) & (cell < side), axis=1)
    cell = np.clip(cell, 0, side - 1)
    full = grid[np.ravel_multi_index(cell.T, (side,) * 3)]
    return np.where(here & full, 1.0, -1.0)

  return _of_logits(logits, shape)


def _of_points(shape, size):
  """Points of the surface, a byte for each coordinate."""
  number = size // 3
  if not number:
    return {"f_score": 0.0}
  points = shape.surface.points[-number:]
  points = np.round((points + 1) * 127.5) / 127.5 - 1
  return {"f_score": _f_score(points.astype(np.float32), shape)}


def lead(
  rows: Mapping[str, Row], *, sizes: tuple[int, ...], metric: str
) -> float:
  """How far the tokenizer is ahead of the best other way, where it is least.

  Args:
    rows: of `measure`.
    sizes: in bytes.
    metric: what is compared.

  Example:
    >>> rows = {"vat 8": Row({"iou": 0.5}), "voxels 8": Row({"iou": 0.25})}
    >>> lead(rows, sizes=(8,), metric="iou")
    0.25
  """

  def ahead(size):
    others = [
      rows[f"{way} {size}"].metrics.get(metric, 0.0)
      for way in ("voxels", "points")
      if f"{way} {size}" in rows
    ]
    return rows[f"vat {size}"].metrics[metric] - max(others)

  return min(ahead(size) for size in sizes)

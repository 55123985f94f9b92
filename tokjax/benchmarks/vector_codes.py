"""Search among vectors stored in a few bytes: residual, product, additive.

    python -m tokjax.benchmarks.vector_codes ../shared/data/images-kodak

The vectors are gradient histograms of windows of photographs, 128 numbers of
length one as SIFT has them, without its choice of windows: 4 x 4 cells of 4 x 4
pixels with 8 orientations, on a grid of cells. Training vectors, those stored
and the queries are different windows of the same photographs. A query is not
rounded. Its nearest stored vector by exact distance should be among the R best
by distance to the codes: recall@R.
"""

import argparse
import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.lib.stride_tricks import sliding_window_view

from tokjax import checks
from tokjax.models import images
from tokjax.ops import (
  additive_codes,
  additive_encoding,
  additive_training,
  product_codes,
  quantize,
)
from tokjax.tokenizers.codebook import CodebookConfig
from tokjax.tokenizers.residual_quantizer import ResidualQuantizer, RVQConfig

__all__ = [
  "Row",
  "VectorCodesRun",
  "gradient_histograms",
  "lead",
  "main",
  "measure",
  "recalls",
  "vectors",
]

_CELL, _ORIENTATIONS = 4, 8
_FLAT = 2.0  # mean gradient, in 8-bit grey levels a pixel, of a window to drop
_RANKS = (1, 10, 100)


@dataclasses.dataclass(frozen=True)
class VectorCodesRun:
  """One comparison.

  Attributes:
    dataset: folder of photographs.
    seed: of the choice of vectors and of all training.
    num_train: vectors to learn from.
    num_base: vectors stored.
    num_queries: vectors looked for.
    num_books: codes of a vector.
    num_codes: values of a code, 256 at most.
    num_iterations: of k-means (but residual books: 10), of the rotation, and
      of additive books and codes in turns.
    num_rounds: perturbed rounds of each of those turns.
    num_rounds_stored: perturbed rounds for the codes of stored vectors.
  """

  dataset: str
  seed: int = 0
  num_train: int = 20_000
  num_base: int = 20_000
  num_queries: int = 1000
  num_books: int = 8
  num_codes: int = 64
  num_iterations: int = 25
  num_rounds: int = 2
  num_rounds_stored: int = 16


@dataclasses.dataclass(frozen=True)
class Row:
  """What one kind of codes reached.

  Attributes:
    metrics: recalls and the mean squared error of stored vectors.
    bytes_per_document: codes, and the norm in float32 where one is stored.
  """

  metrics: dict[str, float]
  bytes_per_document: float


def gradient_histograms(pixels: np.ndarray) -> np.ndarray:
  """Histograms of gradients of all windows of 16 x 16 pixels, 4 apart.

  A pixel adds the size of its gradient to the two orientations next to its
  own, in the cell it is in. Histograms are scaled to length one, numbers above
  0.2 cut, and scaled again, as in SIFT. Windows without gradients are dropped.

  Args:
    pixels: uint8 [height, width, 3], at least 16 by 16.

  Returns:
    float32 [windows, 128], cell by cell.

  Example:
    >>> found = gradient_histograms(np.eye(64, dtype=np.uint8)[..., None]
    ...                             * np.full(3, 255, np.uint8))
    >>> found.shape[1], np.round(np.sum(found[0] ** 2), 3).item()
    (128, 1.0)
  """
  grey = pixels.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
  height, width = (size // _CELL * _CELL for size in grey.shape)
  checks.in_range(4 * _CELL, 1 << 20, height=height, width=width)
  dy, dx = (g[:height, :width] for g in np.gradient(grey))
  size = np.hypot(dx, dy)
  angle = np.arctan2(dy, dx) / (2 * np.pi) * _ORIENTATIONS % _ORIENTATIONS
  away = angle[..., None] - np.arange(_ORIENTATIONS, dtype=np.float32)
  away = np.abs((away + _ORIENTATIONS / 2) % _ORIENTATIONS - _ORIENTATIONS / 2)
  each = size[..., None] * np.maximum(1 - away, 0)  # [height, width, 8]
  cells = each.reshape(height // _CELL, _CELL, width // _CELL, _CELL, -1)
  cells = cells.sum(axis=(1, 3))
  windows = sliding_window_view(cells, (4, 4), axis=(0, 1))
  windows = np.moveaxis(windows, 2, -1).reshape(-1, 16 * _ORIENTATIONS)
  pixels_of_window = (4 * _CELL) ** 2
  windows = windows[windows.sum(axis=1) > _FLAT * pixels_of_window]
  windows = np.minimum(_unit(windows), 0.2)
  return _unit(windows).astype(np.float32)


def vectors(run: VectorCodesRun) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Vectors to learn from, to store and to look for.

  Args:
    run: how many of each, and where from.

  Returns:
    float32 [n, 128] each.

  Raises:
    ValueError: if the photographs have fewer windows.
  """
  numbers = run.num_train, run.num_base, run.num_queries
  found = np.concatenate([
    gradient_histograms(images.read(path))
    for path in images.in_folder(run.dataset)
  ])  # fmt: skip
  checks.in_range(1, len(found), vectors_wanted=sum(numbers))
  order = np.random.default_rng(run.seed).permutation(len(found))
  ends = np.cumsum(numbers)
  train, base, queries, _ = np.split(found[order[: ends[-1]]], ends)
  return train, base, queries


def recalls(distances: np.ndarray, nearest: np.ndarray) -> dict[str, float]:
  """How often the nearest vector is among the R best, for some R.

  Args:
    distances: [queries, stored], to the codes; ties go to the lower index.
    nearest: [queries], the index that should be found.

  Returns:
    Shares of the queries, by name.

  Example:
    >>> recalls(np.array([[3.0, 1.0, 2.0], [0.0, 0.0, 5.0]]), np.array([1, 1]))
    {'R@1': 0.5, 'R@10': 1.0, 'R@100': 1.0}
  """
  own = np.take_along_axis(distances, nearest[:, None], axis=1)
  before = np.arange(distances.shape[1])[None] < nearest[:, None]
  rank = np.sum((distances < own) | ((distances == own) & before), axis=1)
  return {f"R@{r}": float(np.mean(rank < r)) for r in _RANKS}


def measure(run: VectorCodesRun, *, progress: bool = True) -> dict[str, Row]:
  """Recall and distortion of all kinds of codes on the same vectors.

  Args:
    run: the comparison.
    progress: print each row when it is there.

  Returns:
    Rows by name: "PQ", "OPQ", "AQ" (from the start of OPQ), "RVQ" and "RVQ n"
    with its first n codes only.
  """
  train, base, queries = (jnp.asarray(x) for x in vectors(run))
  nearest = np.argmin(_exact(base, queries), axis=1)
  rows = {}

  def add(name, codes, decoded, distances, *, stores_norm):
    error = jnp.mean(jnp.sum(jnp.square(base - decoded), axis=1))
    metrics = recalls(np.asarray(distances), nearest)
    metrics["distortion"] = float(error)
    size = codes.shape[1] * np.log2(run.num_codes) / 8 + 4 * stores_norm
    rows[name] = Row(metrics, float(size))
    if progress:
      print(name, {k: round(v, 4) for k, v in metrics.items()}, flush=True)

  def add_sum(name, books, codes):
    norms = additive_codes.aq_squared_norms(books, codes)
    distances = additive_codes.aq_distances(books, codes, norms, queries)
    decoded = additive_codes.aq_decode(books, codes)
    add(name, codes, decoded, distances, stores_norm=True)

  keys = jax.random.split(jax.random.key(run.seed), 4)
  group_size = train.shape[1] // run.num_books
  sizes = dict(group_size=group_size, num_centroids=run.num_codes)
  book = quantize.pq_train(
    keys[0], train, num_iterations=run.num_iterations, **sizes
  )
  codes = quantize.pq_encode(book, base)
  distances = product_codes.pq_distances(book, codes, queries)
  decoded = quantize.pq_decode(book, codes)
  add("PQ", codes, decoded, distances, stores_norm=False)

  opq = product_codes.opq_train(
    keys[0], train, num_iterations=run.num_iterations, **sizes
  )
  codes = product_codes.opq_encode(opq, base)
  distances = product_codes.pq_distances(
    opq.codebook, codes, product_codes.opq_rotate(opq, queries)
  )
  decoded = product_codes.opq_decode(opq, codes)
  add("OPQ", codes, decoded, distances, stores_norm=False)

  fit = additive_training.aq_fit(
    keys[1],
    train,
    additive_codes.aq_from_pq(opq.codebook, opq.rotation),
    product_codes.opq_encode(opq, train).astype(jnp.int32),
    num_iterations=run.num_iterations,
    num_rounds=run.num_rounds,
  )
  codes = additive_encoding.aq_encode_icm(
    fit.codebooks, base, num_rounds=run.num_rounds_stored, key=keys[2]
  )
  add_sum("AQ", fit.codebooks, codes)

  books, codes = _residual(keys[3], run, train, base)
  for depth in range(2, run.num_books, 2):
    add_sum(f"RVQ {depth}", books[:depth], codes[:, :depth])
  add_sum("RVQ", books, codes)
  return rows


def lead(rows: Mapping[str, Row]) -> float:
  """How far additive codes are ahead of OPQ, OPQ of PQ, and deep of shallow.

  Args:
    rows: of `measure`.

  Returns:
    The smallest of the differences in recall, and of those in distortion as a
    share of the larger.

  Example:
    >>> better = {"R@1": 0.5, "R@10": 1.0, "R@100": 1.0, "distortion": 0.5}
    >>> worse = {"R@1": 0.25, "R@10": 1.0, "R@100": 1.0, "distortion": 1.0}
    >>> names = ("PQ", "RVQ 2"), ("OPQ", "AQ", "RVQ")
    >>> rows = {n: Row(worse, 8.0) for n in names[0]}
    >>> lead(rows | {n: Row(better, 8.0) for n in names[1]})
    0.0
  """
  depths = [name for name in rows if name.startswith("RVQ ")]
  stages = [*sorted(depths, key=lambda name: int(name[4:])), "RVQ"]
  pairs = [("OPQ", "AQ"), ("PQ", "OPQ"), *zip(stages, stages[1:], strict=False)]

  def ahead(worse, better):
    a, b = rows[worse].metrics, rows[better].metrics
    recall = [b[f"R@{r}"] - a[f"R@{r}"] for r in _RANKS]
    return min(*recall, 1 - b["distortion"] / a["distortion"])

  return min(ahead(*pair) for pair in pairs)


def _residual(key, run, train, base):
  """Books of residual quantisation and the codes of stored vectors."""
  book = CodebookConfig(run.num_codes, train.shape[1], learning="ema")
  quantizer = ResidualQuantizer(
    RVQConfig(book, run.num_books), rngs=nnx.Rngs(run.seed)
  )
  state = quantizer.init_from_data(key, train)
  found, _ = jax.jit(quantizer)(base, state)
  return quantizer.tables(state), found.indices


def _exact(base, queries):
  inner = jnp.matmul(queries, base.T, precision="highest")
  return np.asarray(jnp.sum(jnp.square(base), axis=1)[None] - 2 * inner)


def _unit(rows):
  return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def main(argv: list[str] | None = None) -> None:
  """Runs the comparison and prints its rows.

  Args:
    argv: command line; None for the process's own.
  """
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("folder", help="photographs")
  parser.add_argument("--seed", type=int, default=0)
  options = parser.parse_args(argv)
  rows = measure(VectorCodesRun(options.folder, options.seed))
  print(f"lead {lead(rows):+.4f}")


if __name__ == "__main__":
  main()

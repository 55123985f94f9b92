"""k-means: for a whole corpus of vectors, and for the tokens of one sequence.

`kmeans` and `assign` serve large codebooks: they walk over blocks of points
and of centroids, so that no [points, centroids] array exists. `masked_kmeans`
replaces each sequence of a batch by a few cluster means, inside a model.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.ops.rows import draw_rows
from tokjax.typing import Array, Bool, Float, Int, Key

__all__ = ["Clusters", "KMeans", "assign", "kmeans", "masked_kmeans"]

# Width of a block of scores. 1024 x 4096 float32 are 16 MiB, within reach of
# the last cache of a CPU, and wide enough to keep a matrix unit busy.
_CENTROID_BLOCK = 4096


class KMeans(NamedTuple):
  """Centroids of a corpus.

  Attributes:
    centroids: float32, of length one if the clustering was spherical.
    counts: valid points that were nearest to each centroid in the last
      iteration; 0 marks a centroid that no point chose.
  """

  centroids: Float[Array, "*batch K D"]
  counts: Int[Array, "*batch K"]


class Clusters(NamedTuple):
  """Cluster means of each sequence of a batch.

  Attributes:
    means: mean of the member tokens, in the dtype of the input; zero where
      `mask` is False.
    mask: True where the cluster has members.
    counts: number of members, int32.
    assignment: cluster of each token, int32; -1 for masked tokens.
  """

  means: Float[Array, "*batch K D"]
  mask: Bool[Array, "*batch K"]
  counts: Int[Array, "*batch K"]
  assignment: Int[Array, "*batch N"]


@functools.partial(jax.jit, static_argnames=("metric", "block_size"))
def assign(
  points: Float[Array, "n D"],
  centroids: Float[Array, "K D"],
  *,
  metric: Literal["euclidean", "inner"] = "euclidean",
  block_size: int = 1024,
) -> Int[Array, " n"]:
  """Index of the nearest centroid of every point, ties to the lowest.

  "euclidean" maximises x.c - |c|^2 / 2, which orders centroids as the distance
  does; "inner" maximises x.c. Products are of the input dtype, sums float32.
  Costs 2 n K D FLOPs and a scratch of `block_size` x 4096 floats.

  Args:
    points: vectors to assign.
    centroids: the choices.
    metric: what nearest means.
    block_size: points handled at a time.

  Returns:
    int32 in 0..K-1. No gradient flows.

  Raises:
    ValueError: for other ranks, widths that differ or an unknown metric.

  Example:
    >>> import jax.numpy as jnp
    >>> centroids = jnp.array([[0.0, 0.0], [4.0, 0.0]])
    >>> assign(jnp.array([[1.0, 1.0], [3.0, 0.0]]), centroids).tolist()
    [0, 1]
  """
  checks.has_rank(2, points=points, centroids=centroids)
  checks.same_size(
    points_width=points.shape[1], centroids_width=centroids.shape[1]
  )
  checks.one_of(("euclidean", "inner"), metric=metric)
  checks.in_range(1, 1 << 30, block_size=block_size)
  points, centroids = jax.lax.stop_gradient((points, centroids))
  offset = jnp.sum(jnp.square(centroids.astype(jnp.float32)), axis=1) / 2
  if metric == "inner":
    offset = jnp.zeros_like(offset)
  # Rows that only fill the last block must lose to every real centroid.
  blocks = _blocks(centroids.astype(points.dtype), _CENTROID_BLOCK)
  offsets = _blocks(offset, _CENTROID_BLOCK, fill=jnp.inf)

  def nearest(block):  # [b, D] -> [b]
    def step(carry, inputs):
      best, index = carry
      number, centroids, offset = inputs
      scores = jnp.matmul(
        block,
        centroids.T,
        precision="highest",
        preferred_element_type=jnp.float32,
      )  # [b, Kb]
      scores = scores - offset[None, :]
      local = jnp.argmax(scores, axis=1).astype(jnp.int32)
      score = jnp.max(scores, axis=1)
      better = score > best  # strict: the earlier block keeps a tie
      local = local + number * centroids.shape[0]
      best = jnp.where(better, score, best)
      return (best, jnp.where(better, local, index)), None

    start = (
      jnp.full_like(block[:, 0], -jnp.inf, dtype=jnp.float32),
      jnp.zeros_like(block[:, 0], dtype=jnp.int32),
    )
    numbers = jnp.arange(blocks.shape[0], dtype=jnp.int32)
    (_, index), _ = jax.lax.scan(step, start, (numbers, blocks, offsets))
    return index

  chosen = jax.lax.map(nearest, _blocks(points, block_size))
  return chosen.reshape(-1)[: points.shape[0]]


def _blocks(rows, size, fill=0):
  """[n, ...] -> [ceil(n / size), size, ...], the last block filled up."""
  size = min(size, rows.shape[0])
  missing = -rows.shape[0] % size
  widths = [(0, missing)] + [(0, 0)] * (rows.ndim - 1)
  rows = jnp.pad(rows, widths, constant_values=fill)
  return rows.reshape(-1, size, *rows.shape[1:])


@functools.partial(
  jax.jit,
  static_argnames=(
    "num_clusters",
    "num_iterations",
    "spherical",
    "block_size",
  ),
)
def kmeans(
  key: Key[Array, ""],
  points: Float[Array, "n D"],
  *,
  num_clusters: int,
  num_iterations: int = 10,
  mask: Bool[Array, " n"] | None = None,
  spherical: bool = False,
  block_size: int = 1024,
) -> KMeans:
  """Centroids of a corpus by Lloyd's iterations.

  Starts from distinct random valid points. Each iteration assigns every point
  to its nearest centroid and moves each centroid to the mean of its points; a
  centroid without points stays where it is. With fewer valid points than
  clusters, points repeat among the first centroids and the repeats stay empty.
  Costs 2 n K D FLOPs per iteration and no array of size n x K.

  Args:
    key: PRNG key of the first centroids.
    points: vectors to cluster; means are taken in float32.
    num_clusters: K, static, at most n.
    num_iterations: Lloyd steps, static.
    mask: True where the point counts; None means all. Masked points may hold
      anything.
    spherical: nearest by inner product, and centroids are scaled to length
      one after each step (for unit vectors compared by cosine).
    block_size: points assigned at a time.

  Returns:
    float32 centroids with their counts in the last iteration. No gradient
    flows (see `masked_kmeans` for means that pass one).

  Raises:
    ValueError: if sizes disagree or `num_clusters` is out of range.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> points = jnp.array([[0.0], [0.2], [5.0], [5.2]])
    >>> found = kmeans(jax.random.key(0), points, num_clusters=2)
    >>> [round(float(x), 2) for x in jnp.sort(found.centroids[:, 0])]
    [0.1, 5.1]
  """
  checks.has_rank(2, points=points)
  checks.has_rank(1, mask=mask)
  checks.in_range(1, points.shape[0], num_clusters=num_clusters)
  checks.in_range(1, 1 << 30, num_iterations=num_iterations)
  points = jax.lax.stop_gradient(points)
  if mask is None:
    mask = jnp.ones_like(points[:, 0], dtype=bool)
  checks.same_size(points=points.shape[0], mask=mask.shape[0])
  points = jnp.where(mask[:, None], points, 0)
  metric = "inner" if spherical else "euclidean"

  start = draw_rows(key, points, mask, number=num_clusters)
  start = start.astype(jnp.float32)

  def step(centroids, _):
    nearest = assign(points, centroids, metric=metric, block_size=block_size)
    nearest = jnp.where(mask, nearest, num_clusters)  # dropped by the sums
    sums = jax.ops.segment_sum(
      points.astype(jnp.float32), nearest, num_clusters
    )
    counts = jax.ops.segment_sum(jnp.ones_like(nearest), nearest, num_clusters)
    means = sums / jnp.maximum(counts, 1)[:, None]
    moved = jnp.where(counts[:, None] > 0, means, centroids)
    return _unit(moved) if spherical else moved, counts

  start = _unit(start) if spherical else start
  centroids, counts = jax.lax.scan(step, start, length=num_iterations)
  return KMeans(centroids=centroids, counts=counts[-1])


def _unit(rows):
  """Rows of length one; a zero row stays zero."""
  length = jnp.sqrt(jnp.sum(jnp.square(rows), axis=-1, keepdims=True))
  return rows / jnp.where(length > 0, length, 1)


def masked_kmeans(
  features: Float[Array, "B N D"],
  mask: Bool[Array, "B N"],
  limit: Int[Array, " B"] | None = None,
  *,
  num_clusters: int,
  num_iterations: int = 10,
  key: Key[Array, ""] | None = None,
) -> Clusters:
  """Cluster means of every sequence, each clustered on its own.

  Cluster k is live while k < min(limit, number of valid tokens). Lloyd's
  iterations start from evenly spaced valid tokens (cluster k takes the one of
  rank floor((k + 1/2) n / live)), or from random distinct ones if a key is
  given. A sequence with no more valid tokens than clusters keeps each token as
  a cluster of its own. Distances are float32, ties go to the lowest cluster.
  Costs 4 B N K D FLOPs per iteration.

  Gradients: assignments are constants; d means[k] / d features[n] is
  1 / counts[k] for the members of k and 0 otherwise.

  Args:
    features: tokens of each sequence; masked rows may hold anything.
    mask: True where the token is real.
    limit: clusters each sequence may have, 1..num_clusters, for budgets
      relative to its length; None means `num_clusters`.
    num_clusters: K, static, at most N.
    num_iterations: Lloyd steps, static.
    key: draws the first tokens of every sequence; None spaces them evenly.

  Returns:
    Means, mask, counts and assignment. A sequence without valid tokens has no
    live cluster and zero means.

  Raises:
    ValueError: if sizes disagree or `num_clusters` is out of range.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> x = jnp.array([[[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-0.6, 0.8]]])
    >>> cluster = jax.jit(masked_kmeans, static_argnames="num_clusters")
    >>> found = cluster(x, jnp.ones((1, 4), bool), num_clusters=2)
    >>> [[round(v, 2) for v in mean] for mean in found.means.tolist()[0]]
    [[0.9, 0.3], [-0.3, 0.9]]
  """
  checks.has_rank(3, features=features)
  checks.has_rank(2, mask=mask)
  checks.same_size(features_batch=features.shape[0], mask_batch=mask.shape[0])
  checks.same_size(features_tokens=features.shape[1], mask_tokens=mask.shape[1])
  checks.in_range(1, features.shape[1], num_clusters=num_clusters)
  checks.in_range(0, 1 << 30, num_iterations=num_iterations)
  if limit is None:
    limit = jnp.full_like(mask[:, 0], num_clusters, dtype=jnp.int32)
  checks.same_size(features_batch=features.shape[0], limit=limit.shape[0])
  # One draw per position: a sequence's start depends on its own tokens only.
  order = jnp.arange(features.shape[1], dtype=jnp.float32)
  if key is not None:
    order = jax.random.uniform(key, (features.shape[1],))
  one = functools.partial(
    _masked_kmeans,
    order=order,
    spaced=key is None,
    num_clusters=num_clusters,
    num_iterations=num_iterations,
  )
  return jax.vmap(one)(features, mask, limit)


def _masked_kmeans(
  x, mask, limit, *, order, spaced, num_clusters, num_iterations
):
  num_tokens = x.shape[0]
  points = jax.lax.stop_gradient(x).astype(jnp.float32)
  points = jnp.where(mask[:, None], points, 0)  # NaN padding must not spread
  valid = jnp.sum(mask, dtype=jnp.int32)
  live_count = jnp.minimum(jnp.minimum(limit, num_clusters), valid)
  slots = jnp.arange(num_clusters, dtype=jnp.int32)
  live = slots < live_count

  ranked = jnp.argsort(jnp.where(mask, order, jnp.inf))  # valid tokens first
  evenly = (2 * slots + 1) * valid // jnp.maximum(1, 2 * live_count)
  first = jnp.minimum(evenly if spaced else slots, num_tokens - 1)
  start = jnp.take_along_axis(points, ranked[first][:, None], axis=0)

  def nearest(centroids):  # [K, D] -> one-hot members [K, N]
    score = jnp.matmul(centroids, points.T, precision="highest")
    score = score - jnp.sum(jnp.square(centroids), axis=1)[:, None] / 2
    score = jnp.where(live[:, None], score, -jnp.inf)
    choice = jnp.argmax(score, axis=0).astype(jnp.int32)
    # Fewer tokens than clusters: the token of rank k is cluster k.
    rank = jnp.cumsum(mask, dtype=jnp.int32) - 1
    choice = jnp.where(valid <= live_count, rank, choice)
    return jnp.where(mask, choice, -1)

  def means_of(assignment, x):
    members = (assignment[None, :] == slots[:, None]).astype(jnp.float32)
    counts = jnp.sum(members, axis=1)  # [K]
    sums = jnp.matmul(members, x.astype(jnp.float32), precision="highest")
    return sums / jnp.maximum(counts, 1)[:, None], counts

  def step(centroids, _):
    means, counts = means_of(nearest(centroids), points)
    return jnp.where(counts[:, None] > 0, means, centroids), None

  centroids, _ = jax.lax.scan(step, start, length=num_iterations)
  assignment = nearest(centroids)
  means, counts = means_of(assignment, jnp.where(mask[:, None], x, 0))
  return Clusters(
    means=means.astype(x.dtype),
    mask=counts > 0,
    counts=counts.astype(jnp.int32),
    assignment=assignment,
  )

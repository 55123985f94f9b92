"""Product codes of rotated vectors (OPQ), and distances to product codes.

Product quantisation (`tokjax.ops.quantize.pq_*`) cuts a vector into groups of
dimensions. Which dimensions go together matters: OPQ learns a rotation that
makes the groups independent and equally hard, then cuts.

    opq = opq_train(key, sample, group_size=16)
    codes = opq_encode(opq, vectors)          # uint8, one byte a group
    distances = pq_distances(opq.codebook, codes, opq_rotate(opq, queries))

Only queries are rotated; inner products are those of `quantize.pq_scores`.

Nothing here passes a gradient. Source: Ge, He, Ke, Sun, 2013, "Optimized
Product Quantization for Approximate Nearest Neighbor Search".
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.ops import quantize
from tokjax.ops.rows import sum_rows
from tokjax.typing import Array, Float, Key, UInt8

__all__ = [
  "OPQ",
  "balanced_rotation",
  "opq_decode",
  "opq_encode",
  "opq_rotate",
  "opq_train",
  "pq_distances",
]


class OPQ(NamedTuple):
  """A rotation and the product codebook of what it gives.

  Attributes:
    rotation: R, orthogonal: a vector x is coded as R x.
    codebook: centroids of each group of R x.
    distortion: mean squared error of the training vectors after each
      iteration; it never rises.
  """

  rotation: Float[Array, "*batch D D"]
  codebook: Float[Array, "*batch G V g"]
  distortion: Float[Array, "*batch I"]


def opq_train(
  key: Key[Array, ""],
  points: Float[Array, "n D"],
  rotation: Float[Array, "D D"] | None = None,
  *,
  group_size: int,
  num_centroids: int = 256,
  num_iterations: int = 25,
) -> OPQ:
  """Rotation and codebook of product quantisation, learned in turns.

  An iteration assigns the groups of R x to their nearest centroids, moves the
  centroids to the means of their groups (one without members stays), and takes
  the rotation that brings the vectors closest to their codes (Procrustes):
  R = U V^T, where U S V^T = sum codes x^T. None of the three raises the
  distortion.

  Args:
    key: of the first centroids, which are k-means of the rotated points.
    points: a sample of the vectors to store.
    rotation: the first R. None: the identity, that is, plain product codes to
      start from; `balanced_rotation` is often better.
    group_size: g, dimensions per code, a divisor of D.
    num_centroids: V, 1..256, at most n.
    num_iterations: at least 1.

  Returns:
    float32 rotation and centroids, and the distortion by iteration.

  Raises:
    ValueError: if the groups do not fill D or a size is out of range.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> points = jnp.array([[1.0, 1.0], [2.0, 2.0], [5.0, 5.0], [9.0, 9.0]])
    >>> opq = opq_train(jax.random.key(0), points, group_size=1,
    ...                 num_centroids=2, num_iterations=5)
    >>> codes = opq_encode(opq, points)
    >>> error = jnp.sum(jnp.square(opq_decode(opq, codes) - points), axis=1)
    >>> bool(jnp.mean(error) <= opq.distortion[-1] + 1e-4)
    True

  Cost: an iteration takes 2 n D V + 4 n D^2 FLOPs and one singular value
  decomposition of D x D.

  Source: the alternation is the paper's non-parametric solution; ten k-means
  iterations before it, and 25 of it, are ours.
  """
  checks.has_rank(2, points=points, rotation=rotation)
  checks.in_range(1, 1 << 20, num_iterations=num_iterations)
  points = jax.lax.stop_gradient(points).astype(jnp.float32)
  if rotation is None:
    rotation = jnp.eye(points.shape[1])
  checks.same_size(
    points_width=points.shape[1], **_sides(rotation.astype(jnp.float32))
  )
  rotated = _rotate(points, rotation)
  codebook = quantize.pq_train(
    key, rotated, group_size=group_size, num_centroids=num_centroids
  )

  def step(carry, _):
    rotation, codebook = carry
    rotated = _rotate(points, rotation)
    codes = quantize.pq_encode(codebook, rotated)
    codebook = _group_means(codebook, codes, rotated)
    decoded = quantize.pq_decode(codebook, codes)
    rotation = _procrustes(points, decoded)
    left = _rotate(points, rotation) - decoded
    return (rotation, codebook), jnp.mean(jnp.sum(jnp.square(left), axis=1))

  start = rotation.astype(jnp.float32), codebook
  (rotation, codebook), distortion = jax.lax.scan(
    step, start, length=num_iterations
  )
  return OPQ(rotation, codebook, distortion)


def balanced_rotation(
  points: Float[Array, "n D"], *, num_groups: int
) -> Float[Array, "D D"]:
  """The rotation that makes groups independent and their variances alike.

  Principal axes, the widest first, each given to the group with room whose
  variances so far have the smallest product (ties: lowest group). This is the
  best rotation for vectors of a normal distribution.

  Args:
    points: a sample of the vectors to store, at least two.
    num_groups: G, a divisor of D.

  Returns:
    float32 R for `opq_train`; its rows are principal axes.

  Raises:
    ValueError: if the groups do not divide D.

  Example:
    >>> import jax.numpy as jnp
    >>> x = jnp.array([[8.0, 0, 0, 0], [0, 4.0, 0, 0], [0, 0, 2.0, 0],
    ...                [0, 0, 0, 1.0]])
    >>> balanced = jax.jit(balanced_rotation, static_argnames="num_groups")
    >>> rotation = balanced(jnp.concatenate([x, -x]), num_groups=2)
    >>> jnp.argmax(jnp.abs(rotation), axis=1).tolist()
    [0, 3, 1, 2]

  Cost: 2 n D^2 FLOPs and an eigendecomposition of D x D.

  Source: the paper's parametric solution (eigenvalue allocation).
  """
  checks.has_rank(2, points=points)
  width = points.shape[1]
  checks.in_range(1, width, num_groups=num_groups)
  checks.divisible(num_groups, points_width=width)
  x = jax.lax.stop_gradient(points).astype(jnp.float32)
  x = x - jnp.mean(x, axis=0, keepdims=True)
  covariance = jnp.matmul(x.T, x, precision="highest") / x.shape[0]
  values, axes = jnp.linalg.eigh(covariance)  # ascending, columns
  floor = 1e-6 * jnp.maximum(jnp.max(values), 1e-30)
  # Relative to the floor every logarithm is positive: a group only grows.
  logs = jnp.log(jnp.maximum(values, floor) / floor)[::-1]
  group_size = width // num_groups

  def give(carry, log):
    product, count = carry
    room = jnp.where(count < group_size, product, jnp.inf)
    group = jnp.argmin(room)
    place = group * group_size + count[group]
    return (product.at[group].add(log), count.at[group].add(1)), place

  product = jnp.zeros_like(logs, shape=(num_groups,))
  start = product, jnp.zeros_like(product, jnp.int32)
  _, places = jax.lax.scan(give, start, logs)
  return jnp.zeros_like(axes).at[places].set(axes.T[::-1])


def opq_rotate(opq: OPQ, x: Float[Array, "n D"]) -> Float[Array, "n D"]:
  """R x, the form in which the codebook takes vectors and queries.

  Args:
    opq: from `opq_train`.
    x: vectors.

  Returns:
    float32 vectors of the same lengths and distances.

  Raises:
    ValueError: if the widths disagree.

  Example:
    >>> import jax.numpy as jnp
    >>> turn = jnp.array([[0.0, 1.0], [-1.0, 0.0]])
    >>> opq = OPQ(turn, jnp.zeros((1, 1, 2)), jnp.zeros(1))
    >>> opq_rotate(opq, jnp.array([[3.0, 4.0]])).tolist()
    [[4.0, -3.0]]

  Cost: 2 n D^2 FLOPs.
  """
  checks.has_rank(2, x=x)
  checks.same_size(x_width=x.shape[1], **_sides(opq.rotation))
  return _rotate(x, opq.rotation)


def opq_encode(
  opq: OPQ, points: Float[Array, "n D"], *, block_size: int = 4096
) -> UInt8[Array, "n G"]:
  """Nearest centroids of the groups of R x.

  Args:
    opq: from `opq_train`.
    points: vectors to store.
    block_size: points handled at a time, as in `quantize.pq_encode`.

  Returns:
    uint8 codes, one byte per group.

  Raises:
    ValueError: if the widths disagree.

  Example:
    >>> import jax.numpy as jnp
    >>> turn = jnp.array([[0.0, 1.0], [-1.0, 0.0]])
    >>> book = jnp.array([[[0.0], [4.0]], [[-1.0], [-3.0]]])
    >>> opq = OPQ(turn, book, jnp.zeros(1))
    >>> codes = opq_encode(opq, jnp.array([[2.9, 4.1]]))
    >>> codes.tolist(), opq_decode(opq, codes).tolist()
    ([[1, 1]], [[3.0, 4.0]])

  Cost: 2 n D (V + D) FLOPs.
  """
  rotated = opq_rotate(opq, points)
  return quantize.pq_encode(opq.codebook, rotated, block_size=block_size)


def opq_decode(opq: OPQ, codes: UInt8[Array, "n G"]) -> Float[Array, "n D"]:
  """The vectors that codes stand for: R^T of the centroids side by side.

  Args:
    opq: from `opq_train`.
    codes: from `opq_encode`; whole on a mesh of Explicit axes.

  Returns:
    float32 vectors.

  Raises:
    ValueError: if the number of groups disagrees.

  Example:
    >>> import jax.numpy as jnp
    >>> opq = OPQ(jnp.eye(1), jnp.array([[[1.0], [5.0]]]), jnp.zeros(1))
    >>> opq_decode(opq, jnp.array([[1]], jnp.uint8)).tolist()
    [[5.0]]
  """
  rotated = quantize.pq_decode(opq.codebook, codes)
  return jnp.matmul(rotated, opq.rotation, precision="highest")


def pq_distances(
  codebook: Float[Array, "G V g"],
  codes: UInt8[Array, "Nd G"],
  queries: Float[Array, "Nq D"],
  *,
  block_size: int = 256,
) -> Float[Array, "Nq Nd"]:
  """Squared distances of float queries to product-coded documents.

  |q - x|^2 = |q|^2 - 2 sum_g (q_g.e_g - |e_g|^2 / 2). The sum is the inner
  product of `quantize.pq_scores` with one more dimension in every group, -|e|^2
  / 2 in the centroids and 1 in the queries. Rounding is relative to |q|^2:
  centre vectors that lie far from zero.

  Args:
    codebook: centroids from `quantize.pq_train`.
    codes: one byte per group of every document.
    queries: float queries.
    block_size: documents decoded at a time, with 16 queries or more.

  Returns:
    float32, not negative; the nearest document has the smallest.

  Raises:
    ValueError: if groups or widths disagree.

  Example:
    >>> import jax.numpy as jnp
    >>> codebook = jnp.array([[[0.0], [4.0]], [[1.0], [3.0]]])
    >>> codes = jnp.array([[1, 0], [0, 1]], jnp.uint8)
    >>> pq_distances(codebook, codes, jnp.array([[1.0, 2.0]])).tolist()
    [[10.0, 2.0]]

  Cost: as `quantize.pq_scores` with groups of g + 1.

  Source: Jegou, Douze, Schmid, 2011, "Product Quantization for Nearest
  Neighbor Search" (asymmetric distances).
  """
  checks.has_rank(3, codebook=codebook)
  checks.has_rank(2, queries=queries)
  num_groups, _, group_size = codebook.shape
  checks.same_size(
    queries_width=queries.shape[1], codebook_width=num_groups * group_size
  )
  codebook = jax.lax.stop_gradient(codebook).astype(jnp.float32)
  queries = jax.lax.stop_gradient(queries).astype(jnp.float32)
  half = jnp.sum(jnp.square(codebook), axis=-1, keepdims=True) / 2
  codebook = jnp.concatenate([codebook, -half], axis=-1)
  grouped = queries.reshape(-1, num_groups, group_size)
  grouped = jnp.concatenate([grouped, jnp.ones_like(grouped[..., :1])], axis=-1)
  grouped = grouped.reshape(queries.shape[0], -1)
  scores = quantize.pq_scores(codebook, codes, grouped, block_size=block_size)
  squares = jnp.sum(jnp.square(queries), axis=1, keepdims=True)
  return jnp.maximum(jnp.broadcast_to(squares, scores.shape) - 2 * scores, 0)


def _sides(rotation):
  rows, columns = rotation.shape
  return {"rotation_rows": rows, "rotation_columns": columns}


def _rotate(x, rotation):
  x = jax.lax.stop_gradient(x).astype(jnp.float32)
  return jnp.matmul(x, rotation.T, precision="highest")


def _procrustes(points, decoded):
  """The orthogonal R with the smallest sum of |R x - decoded|^2."""
  cross = jnp.matmul(decoded.T, points, precision="highest")
  u, _, vt = jnp.linalg.svd(cross, full_matrices=False)
  return jnp.matmul(u, vt, precision="highest")


def _group_means(codebook, codes, rotated):
  """Means of the members of each centroid; without any it stays."""
  num_groups, num_centroids, group_size = codebook.shape
  grouped = rotated.reshape(-1, num_groups, group_size).swapaxes(0, 1)

  def means(inputs):
    centroids, code, group = inputs
    rows = jnp.concatenate([group, jnp.ones_like(group[:, :1])], axis=1)
    sums = sum_rows(rows, code.astype(jnp.int32), num_rows=num_centroids)
    counts = sums[:, -1:]
    found = sums[:, :-1] / jnp.maximum(counts, 1)
    return jnp.where(counts > 0, found, centroids)

  return jax.lax.map(means, (codebook, codes.T, grouped))

"""Fewer bits per number: packed bits, bucket tables, int8 rows, product codes.

Product quantisation (`pq_*`) cuts a vector into groups of consecutive
dimensions and stores, per group, the number of the nearest of 256 centroids.
Nothing here passes a gradient.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.ops import clustering
from tokjax.typing import Array, Float, Int, Key, UInt8

__all__ = [
  "Int8Rows",
  "bucket_cutoffs",
  "bucket_weights",
  "bucketize",
  "dequantize_rows",
  "pack_bits",
  "pq_decode",
  "pq_encode",
  "pq_scores",
  "pq_train",
  "quantize_rows",
  "unpack_bits",
]


class Int8Rows(NamedTuple):
  """Rows as int8 with one scale each.

  Attributes:
    values: integers in -127..127.
    scale: float32, what one unit of the row stands for; 0 for a zero row.
  """

  values: Int[Array, "*batch D"]
  scale: Float[Array, "*batch"]


def pack_bits(
  values: UInt8[Array, "*batch D"], *, num_bits: int
) -> UInt8[Array, "*batch W"]:
  """Small integers side by side in bytes, the first in the highest bits.

  Args:
    values: integers below 2^num_bits; higher bits are dropped.
    num_bits: 1, 2, 4 or 8.

  Returns:
    uint8 of width D * num_bits / 8.

  Raises:
    ValueError: if `num_bits` is another number or the values do not fill
      whole bytes.

  Example:
    >>> import jax.numpy as jnp
    >>> pack_bits(jnp.array([0, 1, 2, 3], jnp.uint8), num_bits=2).tolist()
    [27]
  """
  checks.one_of((1, 2, 4, 8), num_bits=num_bits)
  per_byte = 8 // num_bits
  checks.divisible(per_byte, values_width=values.shape[-1])
  grouped = values.astype(jnp.uint8).reshape(*values.shape[:-1], -1, per_byte)
  packed = jnp.zeros_like(grouped[..., 0])
  for i in range(per_byte):
    value = grouped[..., i] & jnp.uint8(2**num_bits - 1)
    packed = packed | (value << jnp.uint8(8 - num_bits * (i + 1)))
  return packed


def unpack_bits(
  packed: UInt8[Array, "*batch W"], *, num_bits: int
) -> UInt8[Array, "*batch D"]:
  """The integers that `pack_bits` put into bytes.

  Args:
    packed: bytes, the first value in the highest bits.
    num_bits: 1, 2, 4 or 8, as when packing.

  Returns:
    uint8 in 0..2^num_bits - 1, of width W * 8 / num_bits.

  Raises:
    ValueError: if `num_bits` is another number.

  Example:
    >>> import jax.numpy as jnp
    >>> unpack_bits(jnp.array([27], jnp.uint8), num_bits=2).tolist()
    [0, 1, 2, 3]
  """
  checks.one_of((1, 2, 4, 8), num_bits=num_bits)
  shifts = range(8 - num_bits, -1, -num_bits)
  parts = [packed >> jnp.uint8(shift) for shift in shifts]
  values = jnp.stack(parts, axis=-1) & jnp.uint8(2**num_bits - 1)
  return values.reshape(*packed.shape[:-1], -1)


def bucket_cutoffs(
  sample: Float[Array, "..."], *, num_bits: int
) -> Float[Array, " C"]:
  """Borders of 2^num_bits equally filled buckets of a sample of numbers.

  The quantiles j / 2^n for j = 1..2^n - 1, linearly interpolated.

  Args:
    sample: numbers of any shape; cap it at some millions, it is sorted.
    num_bits: n, 1..8.

  Returns:
    2^n - 1 ascending float32.

  Raises:
    ValueError: if `num_bits` is out of range.

  Example:
    >>> import jax.numpy as jnp
    >>> sample = jnp.array([-0.3, -0.1, -0.02, 0, 0.05, 0.12, 0.2, 0.4])
    >>> [round(float(x), 3) for x in bucket_cutoffs(sample, num_bits=2)]
    [-0.04, 0.025, 0.14]

  Source: Santhanam et al., 2022, "ColBERTv2", residual codec.
  """
  checks.in_range(1, 8, num_bits=num_bits)
  levels = jnp.arange(1, 2**num_bits) / 2**num_bits
  return jnp.quantile(sample.astype(jnp.float32).reshape(-1), levels)


def bucket_weights(
  sample: Float[Array, "..."], *, num_bits: int
) -> Float[Array, " V"]:
  """The number that stands for each bucket: its median in the sample.

  The quantiles (j + 1/2) / 2^n for j = 0..2^n - 1, linearly interpolated.

  Args:
    sample: numbers of any shape, the ones given to `bucket_cutoffs`.
    num_bits: n, 1..8.

  Returns:
    2^n ascending float32.

  Raises:
    ValueError: if `num_bits` is out of range.

  Example:
    >>> import jax.numpy as jnp
    >>> sample = jnp.array([-0.3, -0.1, -0.02, 0, 0.05, 0.12, 0.2, 0.4])
    >>> weights = bucket_weights(sample, num_bits=2)
    >>> [round(1000 * float(weights[i])) for i in (0, 3)]
    [-125, 225]

  Source: Santhanam et al., 2022, "ColBERTv2", residual codec.
  """
  checks.in_range(1, 8, num_bits=num_bits)
  levels = (jnp.arange(2**num_bits) + 0.5) / 2**num_bits
  return jnp.quantile(sample.astype(jnp.float32).reshape(-1), levels)


def bucketize(
  values: Float[Array, "..."], cutoffs: Float[Array, " C"]
) -> UInt8[Array, "..."]:
  """Bucket of each number: how many cutoffs lie strictly below it.

  Args:
    values: numbers of any shape.
    cutoffs: ascending borders, at most 255.

  Returns:
    uint8 of the same shape, in 0..C.

  Raises:
    ValueError: if there are more cutoffs than a byte can count.

  Example:
    >>> import jax.numpy as jnp
    >>> cutoffs = jnp.array([-0.04, 0.025, 0.14])
    >>> bucketize(jnp.array([-0.3, -0.02, 0.14, 0.2]), cutoffs).tolist()
    [0, 1, 2, 3]
  """
  checks.in_range(1, 255, num_cutoffs=cutoffs.shape[0])
  bucket = jnp.zeros_like(values, dtype=jnp.uint8)
  for i in range(cutoffs.shape[0]):  # one vector compare each, no gather
    bucket = bucket + (values > cutoffs[i]).astype(jnp.uint8)
  return bucket


def quantize_rows(x: Float[Array, "*batch D"]) -> Int8Rows:
  """Rows as int8 by their largest absolute value: x ~ values * scale.

  scale = max|x| / 127, values = round(x / scale) (half to even). The error is
  at most scale / 2 per number.

  Args:
    x: rows of any float dtype.

  Returns:
    int8 values and one float32 scale per row.

  Example:
    >>> import jax.numpy as jnp
    >>> rows = quantize_rows(jnp.array([[1.0, -0.5, 0.0]]))
    >>> rows.values.tolist()
    [[127, -64, 0]]
  """
  x = jax.lax.stop_gradient(x).astype(jnp.float32)
  scale = jnp.max(jnp.abs(x), axis=-1) / 127
  divisor = jnp.where(scale > 0, scale, 1)[..., None]
  values = jnp.clip(jnp.round(x / divisor), -127, 127)
  return Int8Rows(values=values.astype(jnp.int8), scale=scale)


def dequantize_rows(rows: Int8Rows) -> Float[Array, "*batch D"]:
  """float32 rows from `quantize_rows`.

  Args:
    rows: int8 values and their scales.

  Returns:
    values * scale, float32.

  Example:
    >>> import jax.numpy as jnp
    >>> rows = quantize_rows(jnp.array([[2.0, -2.0]]))
    >>> [round(float(x), 3) for x in dequantize_rows(rows)[0]]
    [2.0, -2.0]
  """
  return rows.values.astype(jnp.float32) * rows.scale[..., None]


def pq_train(
  key: Key[Array, ""],
  points: Float[Array, "n D"],
  *,
  group_size: int,
  num_centroids: int = 256,
  num_iterations: int = 10,
) -> Float[Array, "G V g"]:
  """Codebook of product quantisation: one k-means per group of dimensions.

  Group i holds the dimensions i * g..(i + 1) * g - 1 and has its own
  centroids. One group is clustered at a time. Costs 2 n D V FLOPs per
  iteration; 256 x 64 sampled points are usually enough.

  Args:
    key: PRNG key of the first centroids.
    points: a sample of the vectors to store.
    group_size: g, dimensions per code, a divisor of D.
    num_centroids: V, 1..256, at most n.
    num_iterations: Lloyd steps.

  Returns:
    float32 centroids of every group.

  Raises:
    ValueError: if the groups do not fill D or a size is out of range.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> points = jnp.array([[0.0, 1.0], [2.0, 3.0]])
    >>> key = jax.random.key(0)
    >>> book = pq_train(key, points, group_size=1, num_centroids=2)
    >>> sorted(book[1, :, 0].tolist())
    [1.0, 3.0]

  Source: Jegou, Douze, Schmid, 2011, "Product Quantization for Nearest
  Neighbor Search"; groups of 8 with 256 centroids as in Dhulipala et al.,
  2024, "MUVERA".
  """
  checks.has_rank(2, points=points)
  checks.in_range(1, points.shape[1], group_size=group_size)
  checks.divisible(group_size, points_width=points.shape[1])
  checks.in_range(1, min(256, points.shape[0]), num_centroids=num_centroids)
  grouped = points.reshape(points.shape[0], -1, group_size)
  keys = jax.random.split(key, grouped.shape[1])

  def train(inputs):
    key, group = inputs
    return clustering.kmeans(
      key,
      group,
      num_clusters=num_centroids,
      num_iterations=num_iterations,
      block_size=4096,
    ).centroids

  return jax.lax.map(train, (keys, grouped.swapaxes(0, 1)))


@functools.partial(jax.jit, static_argnames=("block_size",))
def pq_encode(
  codebook: Float[Array, "G V g"],
  points: Float[Array, "n D"],
  *,
  block_size: int = 4096,
) -> UInt8[Array, "n G"]:
  """Nearest centroid of every group of every vector (ties: lowest).

  Costs 2 n D V FLOPs, with a scratch of `block_size` x V floats.

  Args:
    codebook: centroids from `pq_train`.
    points: vectors to store.
    block_size: points handled at a time.

  Returns:
    uint8 codes, one byte per group.

  Raises:
    ValueError: if the widths disagree.

  Example:
    >>> import jax.numpy as jnp
    >>> codebook = jnp.array([[[0.0], [4.0]], [[1.0], [3.0]]])
    >>> pq_encode(codebook, jnp.array([[3.5, 1.1], [0.2, 9.0]])).tolist()
    [[1, 0], [0, 1]]
  """
  _check_codebook(codebook, points=points)
  grouped = points.reshape(points.shape[0], -1, codebook.shape[2])

  def encode(inputs):
    centroids, group = inputs  # [V, g], [n, g]
    chosen = clustering.assign(group, centroids, block_size=block_size)
    return chosen.astype(jnp.uint8)

  return jax.lax.map(encode, (codebook, grouped.swapaxes(0, 1))).T


def pq_decode(
  codebook: Float[Array, "G V g"], codes: UInt8[Array, "n G"]
) -> Float[Array, "n D"]:
  """The vectors that product codes stand for, in the codebook's dtype.

  Codes must be whole on a mesh of Explicit axes (call it within `shard_map`).

  Args:
    codebook: centroids from `pq_train`.
    codes: one byte per group.

  Returns:
    The centroids of each row side by side.

  Raises:
    ValueError: if the number of groups disagrees.

  Example:
    >>> import jax.numpy as jnp
    >>> codebook = jnp.array([[[0.0], [4.0]], [[1.0], [3.0]]])
    >>> pq_decode(codebook, jnp.array([[1, 0]], jnp.uint8)).tolist()
    [[4.0, 1.0]]
  """
  _check_codes(codebook, codes)
  num_groups, num_centroids, group_size = codebook.shape
  rows = codebook.reshape(-1, group_size)  # [G * V, g]
  first = jnp.arange(num_groups, dtype=jnp.int32) * num_centroids
  index = codes.astype(jnp.int32) + first[None, :]  # [n, G]
  return rows[index].reshape(codes.shape[0], -1)


@functools.partial(jax.jit, static_argnames=("block_size",))
def pq_scores(
  codebook: Float[Array, "G V g"],
  codes: UInt8[Array, "Nd G"],
  queries: Float[Array, "Nq D"],
  *,
  block_size: int = 256,
) -> Float[Array, "Nq Nd"]:
  """Inner products of float queries with product-coded documents.

  Equals queries @ pq_decode(codebook, codes).T without the decoded matrix: the
  queries stay exact, only documents are rounded. Few queries (under 16) look
  their scores up, group by group, in tables of <query group, centroid>: Nd G
  reads of Nq numbers. More queries share the work of decoding a block of
  documents, which one matmul then scores: 2 Nq Nd D FLOPs. The border was
  measured on a CPU.

  Args:
    codebook: centroids from `pq_train`.
    codes: one byte per group of every document.
    queries: float queries.
    block_size: documents decoded at a time.

  Returns:
    float32 scores.

  Raises:
    ValueError: if groups or widths disagree.

  Example:
    >>> import jax.numpy as jnp
    >>> codebook = jnp.array([[[0.0], [4.0]], [[1.0], [3.0]]])
    >>> codes = jnp.array([[1, 0], [0, 1]], jnp.uint8)
    >>> pq_scores(codebook, codes, jnp.array([[1.0, 2.0]])).tolist()
    [[6.0, 6.0]]

  Source: Jegou, Douze, Schmid, 2011 (asymmetric distance computation).
  """
  _check_codebook(codebook, queries=queries)
  _check_codes(codebook, codes)
  codebook = codebook.astype(jnp.float32)
  queries = queries.astype(jnp.float32)
  if queries.shape[0] < 16:
    return _scores_by_table(codebook, codes, queries)
  return _scores_by_decoding(codebook, codes, queries, block_size)


def _scores_by_table(codebook, codes, queries):
  grouped = queries.reshape(queries.shape[0], codebook.shape[0], -1)
  tables = jnp.einsum("gvd,qgd->gvq", codebook, grouped, precision="highest")

  def step(scores, inputs):
    table, code = inputs  # [V, Nq], [Nd]
    return scores + table[code.astype(jnp.int32)], None

  start = jnp.zeros_like(queries, shape=(codes.shape[0], queries.shape[0]))
  scores, _ = jax.lax.scan(step, start, (tables, codes.T))
  return scores.T


def _scores_by_decoding(codebook, codes, queries, block_size):
  def score(block):  # [b, G] -> [b, Nq]
    rows = pq_decode(codebook, block)
    return jnp.matmul(rows, queries.T, precision="highest")

  size = min(block_size, codes.shape[0])
  blocks = jnp.pad(codes, [(0, -codes.shape[0] % size), (0, 0)])
  blocks = blocks.reshape(-1, size, codes.shape[1])
  scores = jax.lax.map(score, blocks)  # [blocks, b, Nq]
  return scores.reshape(-1, queries.shape[0])[: codes.shape[0]].T


def _check_codebook(codebook, **vectors):
  checks.has_rank(3, codebook=codebook)
  checks.has_rank(2, **vectors)
  (name,) = vectors
  width = codebook.shape[0] * codebook.shape[2]
  checks.same_size(
    **{f"{name}_width": vectors[name].shape[1], "codebook_width": width}
  )


def _check_codes(codebook, codes):
  checks.has_rank(2, codes=codes)
  checks.same_size(
    codes_groups=codes.shape[1], codebook_groups=codebook.shape[0]
  )

"""Token codecs: how the vectors of a corpus are stored, and read back.

A codec is a frozen dataclass of arrays and static settings, registered as a
pytree. `encode` turns rows into a payload, a dict of arrays whose leading axis
counts rows, so that any range of rows can be kept, moved and decoded alone;
`decode` gives float32 rows. `NAMES` lists what `train` accepts, with 384
dimensions:

| name | bytes per token | what is stored |
|---|---|---|
| float32 | 1536 | the vector |
| bfloat16, float16 | 768 | the rounded vector |
| int8 | 388 | round(127 x / max abs x) and the scale |
| residual4, 2, 1 | 196, 100, 52 | nearest centroid, quantised difference |
| pq8 | 48 | one of 256 centroids for each 8 dimensions |
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokjax import checks
from tokjax.ops import clustering, quantize
from tokjax.typing import Array, Float, Key

__all__ = [
  "NAMES",
  "FloatCodec",
  "Int8Codec",
  "PQCodec",
  "ResidualCodec",
  "encode_corpus",
  "from_arrays",
  "num_residual_centroids",
  "to_arrays",
  "train",
]

NAMES = (
  "float32",
  "bfloat16",
  "float16",
  "int8",
  "residual4",
  "residual2",
  "residual1",
  "pq8",
)

# Rows by name; jax arrays, or NumPy ones when they come from disk. Fields of
# the codecs are not annotated as arrays: a pytree is rebuilt with tracers,
# shardings or None in their place.
Payload = dict[str, Any]

# Values that set the residual buckets: enough for 16 stable quantiles, and
# few enough to sort in a second.
_MAX_BUCKET_VALUES = 1 << 22


def _pytree(*data_fields: str, meta_fields: tuple[str, ...]):
  """Class decorator: frozen dataclass whose arrays are pytree leaves."""
  return lambda cls: jax.tree_util.register_dataclass(
    dataclasses.dataclass(frozen=True)(cls), data_fields, meta_fields
  )


@_pytree(meta_fields=("dim", "dtype"))
class FloatCodec:
  """Rows rounded to a float type (nearest, ties to even).

  bfloat16 is kept as the uint16 of its bits: XLA's CPU compiler reads
  bfloat16 arrays one element at a time, while shifting integers is a vector
  operation, 2.5 times faster in a scan on AVX2, and the value is the same.

  Attributes:
    dim: width of a row.
    dtype: "float32", "bfloat16" or "float16".
  """

  dim: int
  dtype: str = "float32"

  def encode(self, tokens: Float[Array, "T D"]) -> Payload:
    """Payload {"values": [T, D]}."""
    checks.one_of(("float32", "bfloat16", "float16"), dtype=self.dtype)
    _check_rows(self, tokens)
    values = tokens.astype(self.dtype)
    if self.dtype == "bfloat16":
      values = jax.lax.bitcast_convert_type(values, jnp.uint16)
    return {"values": values}

  def decode(self, payload: Payload) -> Float[Array, "T D"]:
    """float32 rows."""
    values = jnp.asarray(payload["values"])
    if self.dtype == "bfloat16":
      bits = values.astype(jnp.uint32) << jnp.uint32(16)
      return jax.lax.bitcast_convert_type(bits, jnp.float32)
    return values.astype(jnp.float32)

  @property
  def bytes_per_token(self) -> int:
    return self.dim * jnp.dtype(self.dtype).itemsize


@_pytree(meta_fields=("dim",))
class Int8Codec:
  """Rows as int8 with one float32 scale each (ops/quantize.py).

  Attributes:
    dim: width of a row.
  """

  dim: int

  def encode(self, tokens: Float[Array, "T D"]) -> Payload:
    """Payload {"values": int8[T, D], "scale": f32[T]}."""
    _check_rows(self, tokens)
    return dict(quantize.quantize_rows(tokens)._asdict())

  def decode(self, payload: Payload) -> Float[Array, "T D"]:
    """values * scale, float32."""
    return quantize.dequantize_rows(quantize.Int8Rows(**payload))

  @property
  def bytes_per_token(self) -> int:
    return self.dim + 4


@_pytree("centroids", "cutoffs", "weights", meta_fields=("dim", "num_bits"))
class ResidualCodec:
  """Nearest corpus centroid, and the difference in 1, 2 or 4 bits a number.

  code = argmax_c <centroid_c, x>; each number of x - centroid is replaced by
  its bucket in one table of quantiles. Decoding adds the bucket's weight to
  the centroid and scales the row to length one, so rows must be unit vectors.

  Bits are packed by planes: byte i of a row holds the dimensions i, i + W,
  i + 2W, ... of W bytes, so that unpacking is vector shifts without a shuffle.

  Attributes:
    centroids: unit vectors, f32[V, D].
    cutoffs: ascending borders of the buckets, f32[2^num_bits - 1].
    weights: what stands for each bucket, f32[2^num_bits].
    dim: width of a row, a multiple of 8 / num_bits.
    num_bits: 1, 2 or 4.

  Source: Santhanam et al., 2022, "ColBERTv2"; the order of packed bits is
  ours.
  """

  centroids: Any
  cutoffs: Any
  weights: Any
  dim: int
  num_bits: int

  def encode(self, tokens: Float[Array, "T D"]) -> Payload:
    """Payload {"code": int32[T], "packed": uint8[T, D * num_bits / 8]}."""
    _check_rows(self, tokens)
    tokens = tokens.astype(jnp.float32)
    code = clustering.assign(tokens, self.centroids, metric="inner")
    residual = tokens - self.centroids[code]
    bucket = quantize.bucketize(residual, self.cutoffs)
    planes = bucket.reshape(tokens.shape[0], 8 // self.num_bits, -1)
    packed = quantize.pack_bits(
      planes.swapaxes(1, 2).reshape(bucket.shape), num_bits=self.num_bits
    )
    return {"code": code, "packed": packed}

  def decode(self, payload: Payload) -> Float[Array, "T D"]:
    """float32 unit rows."""
    packed, num_bits = payload["packed"], self.num_bits
    shifts = jnp.arange(8 - num_bits, -1, -num_bits, dtype=jnp.uint8)
    planes = packed[:, None, :] >> shifts[None, :, None]
    bucket = planes & jnp.uint8(2**num_bits - 1)  # [T, 8 / num_bits, W]
    # A chain of selects is vector code; a table look-up is a scalar gather.
    residual = jnp.full_like(bucket, self.weights[0], dtype=jnp.float32)
    for j in range(1, 2**num_bits):
      residual = jnp.where(bucket >= j, self.weights[j], residual)
    residual = residual.reshape(packed.shape[0], self.dim)
    rows = self.centroids[payload["code"]] + residual
    square = jnp.sum(jnp.square(rows), axis=1, keepdims=True)
    return rows * jax.lax.rsqrt(jnp.maximum(square, 1e-24))

  @property
  def bytes_per_token(self) -> int:
    return 4 + self.dim * self.num_bits // 8


@_pytree("codebook", meta_fields=("dim",))
class PQCodec:
  """Product quantisation: one byte for each group of dimensions.

  Attributes:
    codebook: 256 or fewer centroids of every group, f32[G, V, g].
    dim: width of a row, groups times group size.
  """

  codebook: Any
  dim: int

  def encode(self, tokens: Float[Array, "T D"]) -> Payload:
    """Payload {"codes": uint8[T, G]}."""
    _check_rows(self, tokens)
    return {"codes": quantize.pq_encode(self.codebook, tokens)}

  def decode(self, payload: Payload) -> Float[Array, "T D"]:
    """float32 rows."""
    return quantize.pq_decode(self.codebook, payload["codes"])

  @property
  def bytes_per_token(self) -> int:
    return self.codebook.shape[0]


# What `train` returns: `encode`, `decode`, `dim` and `bytes_per_token`.
Codec = FloatCodec | Int8Codec | ResidualCodec | PQCodec


def num_residual_centroids(num_tokens: int) -> int:
  """2^floor(log2(16 sqrt(num_tokens))), at least 1.

  Args:
    num_tokens: tokens of the corpus.

  Example:
    >>> num_residual_centroids(1_000_000)
    8192

  Source: Santhanam et al., 2022, "ColBERTv2".
  """
  checks.in_range(1, 1 << 62, num_tokens=num_tokens)
  return 1 << math.floor(math.log2(16 * math.sqrt(num_tokens)))


def train(
  name: str,
  key: Key[Array, ""] | None,
  sample: Any,
  *,
  num_tokens: int | None = None,
  num_centroids: int | None = None,
  num_iterations: int = 4,
) -> Codec:
  """A codec for rows like those of a sample.

  float and int8 codecs need no training. The residual codec clusters the
  sample (spherical k-means) and takes the bucket quantiles from the residuals
  of at most 50,000 rows; product quantisation clusters groups of 8 dimensions
  of at most 65,536 rows.

  Args:
    name: one of `NAMES`.
    key: PRNG key of the first centroids; None where nothing is trained.
    sample: token vectors [n, D]; unit vectors for the residual codecs.
    num_tokens: tokens of the whole corpus, which sets the number of
      centroids; None for the size of the sample.
    num_centroids: centroids of the residual codec; None for the rule of
      `num_residual_centroids`, at most a quarter of the sample.
    num_iterations: k-means steps; 4 as in ColBERTv2.

  Returns:
    The codec.

  Raises:
    ValueError: for an unknown name, a missing key, or a width that the codec
      cannot pack.

  Example:
    >>> import jax.numpy as jnp
    >>> codec = train("int8", None, jnp.eye(4))
    >>> codec.bytes_per_token
    8

  Source: Santhanam et al., 2022, "ColBERTv2" (residual); the cap on centroids
  for small samples is ours.
  """
  checks.one_of(NAMES, name=name)
  checks.has_rank(2, sample=sample)
  size, dim = sample.shape
  if name in ("float32", "bfloat16", "float16"):
    return FloatCodec(dim=dim, dtype=name)
  if name == "int8":
    return Int8Codec(dim=dim)
  if key is None:
    raise ValueError(f"key must be given to train the codec {name!r}")
  sample = jnp.asarray(sample).astype(jnp.float32)
  if name == "pq8":
    checks.divisible(8, sample_width=dim)
    book = quantize.pq_train(
      key,
      sample[:65536],
      group_size=8,
      num_centroids=min(256, size),
      num_iterations=num_iterations,
    )
    return PQCodec(codebook=book, dim=dim)
  num_bits = int(name[-1])
  checks.divisible(8 // num_bits, sample_width=dim)
  if num_centroids is None:
    wanted = num_residual_centroids(num_tokens or size)
    num_centroids = min(wanted, max(1, size // 4))
  centroids = clustering.kmeans(
    key,
    sample,
    num_clusters=num_centroids,
    num_iterations=num_iterations,
    spherical=True,
  ).centroids
  # Every s-th row, so that the quantiles see the whole sample.
  step = -(-size // min(50_000, max(1, _MAX_BUCKET_VALUES // dim)))
  held = sample[::step]
  code = clustering.assign(held, centroids, metric="inner")
  residual = held - centroids[code]
  return ResidualCodec(
    centroids=centroids,
    cutoffs=quantize.bucket_cutoffs(residual, num_bits=num_bits),
    weights=quantize.bucket_weights(residual, num_bits=num_bits),
    dim=dim,
    num_bits=num_bits,
  )


def encode_corpus(
  codec: Codec, tokens: Any, *, block_size: int = 65536
) -> dict[str, np.ndarray]:
  """Payload of a corpus that need not fit on the device.

  Encodes `block_size` rows at a time (one compiled program; the last block is
  padded) and collects the results on the host.

  Args:
    codec: the codec.
    tokens: float rows [T, D], NumPy or anything that slices to it.
    block_size: rows on the device at a time.

  Returns:
    NumPy arrays of leading size T.

  Raises:
    ValueError: if the width is not the codec's.
  """
  total = tokens.shape[0]
  size = max(1, min(block_size, total))
  shapes = jax.eval_shape(
    codec.encode, jax.ShapeDtypeStruct((size, tokens.shape[1]), jnp.float32)
  )
  payload = {
    name: np.empty((total, *shape.shape[1:]), shape.dtype)
    for name, shape in shapes.items()
  }
  for start in range(0, total, size):
    block = np.asarray(tokens[start : start + size])
    rows = block.shape[0]
    padded = np.pad(block, ((0, size - rows), (0, 0)))
    for name, values in _encode(codec, padded).items():
      payload[name][start : start + rows] = np.asarray(values)[:rows]
  return payload


@jax.jit
def _encode(codec, rows):
  return codec.encode(rows.astype(jnp.float32))


def to_arrays(codec: Codec) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """A codec as JSON-ready settings and named arrays; see `from_arrays`.

  Example:
    >>> to_arrays(Int8Codec(dim=4))
    ({'kind': 'Int8Codec', 'dim': 4}, {})
  """
  settings, arrays = {"kind": type(codec).__name__}, {}
  for field in dataclasses.fields(codec):
    value = getattr(codec, field.name)
    if isinstance(value, (int, str)):
      settings[field.name] = value
    else:
      arrays[field.name] = np.asarray(value)
  return settings, arrays


def from_arrays(
  settings: dict[str, Any], arrays: dict[str, np.ndarray]
) -> Codec:
  """The codec that `to_arrays` took apart.

  Args:
    settings: its kind and static fields.
    arrays: its array fields.

  Raises:
    ValueError: for an unknown kind.

  Example:
    >>> from_arrays({"kind": "Int8Codec", "dim": 4}, {})
    Int8Codec(dim=4)
  """
  kinds = {
    kind.__name__: kind
    for kind in (FloatCodec, Int8Codec, PQCodec, ResidualCodec)
  }
  settings = dict(settings)
  kind = settings.pop("kind")
  checks.one_of(tuple(kinds), kind=kind)
  arrays = {name: jnp.asarray(value) for name, value in arrays.items()}
  return kinds[kind](**settings, **arrays)


def _check_rows(codec, tokens):
  checks.has_rank(2, tokens=tokens)
  checks.same_size(tokens_width=tokens.shape[1], codec_dim=codec.dim)

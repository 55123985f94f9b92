"""Embeddings that are pictures of the tokens, made once and never trained.

    tokenizer = UnicodeTokenizer(ngrams)
    bits = glyph_bitmaps(tokenizer.tokens, "unifont.otf")  # {0, 1}[V, 1024]
    table = frozen_embedding(bits, 1024)                   # unit rows [V, 1024]
    x = embed(table, ids)                                  # no gradient

or, in a thirtieth of the memory, `table = packed_embedding(bits, 1024)`. The
tokenizer is in `tokjax.tokenizers.unicode_tokens`, the language model that
reads the rows in `glyph_language_model`.

Source: Bochkov, 2025, "Emergent Semantics Beyond Token Embeddings: Transformer
LMs with Frozen Visual Unicode Representations". Drawing, augmentation,
projection and unit rows follow its notebooks; the packed form, random
projections and the rule for equal variances are ours.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from tokjax import checks
from tokjax.ops import quantize, rows, similarity
from tokjax.typing import Array, Float, Int, Key, UInt8

__all__ = [
  "Augmentation",
  "GlyphEmbedding",
  "collisions",
  "embed",
  "frozen_embedding",
  "glyph_bitmaps",
  "packed_embedding",
]

Method = Literal["pca", "random_projection"]

# Blocks whose glyphs stay readable when they are turned and moved a little:
# Latin, Greek, Cyrillic, Armenian.
_SIMPLE = (range(0x250), range(0x370, 0x590))
_DARK = 128  # grey below is ink
_PIVOT = 1e-4  # entries this close to the largest count as large


@dataclasses.dataclass(unsafe_hash=True)
class Augmentation:
  """How the pictures are disturbed; the defaults are published."""

  rotation: float = 4.0  # degrees at most; simple scripts only
  shift: int = 2  # pixels at most, each way; simple scripts only
  noise: float = 0.01  # share of pixels that turn to ink
  blur: float = 0.5  # standard deviation in pixels; simple scripts only
  complex_noise: float = 0.001  # the noise of other scripts
  seed: int = 42
  per_token: bool = False  # draws of its own for each token; published: False,
  # so that glyphs that look alike stay alike


class GlyphEmbedding(NamedTuple):
  """A table of unit rows as the bitmaps it is made of.

  Attributes:
    packed: bitmap of each token, the first pixel in the highest bit.
    projection: from pixels to the width.
    offset: the mean bitmap, projected.
  """

  packed: UInt8[Array, "V W"]
  projection: Float[Array, "P D"]
  offset: Float[Array, " D"]


def glyph_bitmaps(
  tokens: Sequence[str],
  font: str | os.PathLike,
  *,
  size: int = 32,
  augmentation: Augmentation | None = None,
  resample: Literal["nearest", "bilinear"] = "nearest",
) -> UInt8[np.ndarray, "V P"]:
  """Draws tokens, each as a square picture of ink and paper.

  Every character gets a cell of size x size, its ink in the middle; the cells
  stand side by side, are disturbed, cut at half grey and squeezed into one
  cell. What the font cannot draw gets its sign for missing glyphs.

  Args:
    tokens: texts; an empty one is blank.
    font: a TrueType, OpenType or bitmap font file; published: GNU Unifont 14.
    size: side of a cell, and of the font, in pixels.
    augmentation: None disturbs nothing; `Augmentation()` is published.
    resample: how cells are squeezed. The published code asks for "bilinear" of
      a picture of one bit, for which Pillow takes "nearest"; "bilinear"
      here squeezes before it cuts.

  Returns:
    uint8, 1 for ink, rows of the picture one after the other. The same
    arguments give the same bits. (The published code reads the pixels in a
    spiral, which changes no row of the embedding but for a rotation.)

  Raises:
    ValueError: for settings out of range.
    OSError: if there is no such font.

  Cost: about 50 microseconds a token.

  Example:
    >>> from matplotlib import font_manager
    >>> font = font_manager.findfont("DejaVu Sans")
    >>> bits = glyph_bitmaps(["A", "\\u0391", "B"], font)  # Latin, Greek, Latin
    >>> bits.shape, collisions(bits)
    ((3, 1024), [[0, 1]])
  """
  checks.in_range(4, 256, size=size)
  checks.one_of(("nearest", "bilinear"), resample=resample)
  if augmentation is not None:
    _check(augmentation)
  face = ImageFont.truetype(
    os.fspath(font), size, layout_engine=ImageFont.Layout.BASIC
  )
  bits = np.zeros((len(tokens), size * size), np.uint8)
  for row, token in zip(bits, tokens, strict=True):
    picture = _drawn(token, face, size)
    if augmentation is not None:
      picture = _disturbed(picture, token, augmentation)
    row[:] = _squeezed(picture, size, resample).ravel()
  return bits


def frozen_embedding(
  bits: UInt8[Array, "V P"] | UInt8[np.ndarray, "V P"],
  dim: int,
  *,
  method: Method = "pca",
  key: Key[Array, ""] | None = None,
  tie_break: float = 1e-6,
) -> Float[Array, "V D"]:
  """Bitmaps, centred, projected and scaled to length one.

  "pca" projects on the eigenvectors of the covariance, largest variance first.
  At dim = P that is a rotation: cosines of rows are cosines of centred bitmaps.
  Its signs make the largest entry of each eigenvector positive (the first of
  about equal ones). Equal variances leave a choice of axes, which would hang
  on the machine: a ramp on the diagonal prefers earlier pixels.

  Args:
    bits: {0, 1} for each pixel, as of `glyph_bitmaps`.
    dim: D, at most P.
    method: or "random_projection", normal over sqrt(dim).
    key: of the random projection.
    tie_break: height of the ramp, as a share of the norm of the covariance;
      far below the variances that matter, above rounding.

  Returns:
    float32; a bitmap that equals the mean gives zeros. Without a gradient.

  Raises:
    ValueError: for settings that do not fit.

  Example:
    >>> bits = jnp.array([[1, 0], [0, 1], [1, 1], [0, 0]], jnp.uint8)
    >>> rows = jax.jit(frozen_embedding, static_argnums=1)(bits, 2)
    >>> np.asarray(rows > 0).astype(int).tolist()  # all entries are +-.7071
    [[1, 0], [0, 1], [1, 1], [0, 0]]

  Cost: 2 V P (P + D) FLOPs and about 20 P^3 for the eigenvectors; 4 V P bytes.
  """
  projection, mean = _fit(bits, dim, method, key, tie_break)
  offset = _project(mean[None], projection)[0]
  return _unit(jnp.asarray(bits), projection, offset)


def packed_embedding(
  bits: UInt8[Array, "V P"] | UInt8[np.ndarray, "V P"],
  dim: int,
  *,
  method: Method = "pca",
  key: Key[Array, ""] | None = None,
  tie_break: float = 1e-6,
) -> GlyphEmbedding:
  """`frozen_embedding` as P / 8 bytes a token, made anew where it is read.

  Args:
    bits: as there; P a multiple of 8.
    dim: as there.
    method: as there.
    key: as there.
    tie_break: as there.

  Returns:
    What `embed` reads; for 65,536 tokens of 32 x 32 pixels and width 1024, 8 MB
    and 4 MB of projection against 268 MB.

  Raises:
    ValueError: for settings that do not fit.

  Example:
    >>> bits = jnp.eye(8, dtype=jnp.uint8)
    >>> packed = jax.jit(packed_embedding, static_argnums=1)(bits, 4).packed
    >>> packed[:, 0].tolist()
    [128, 64, 32, 16, 8, 4, 2, 1]
  """
  projection, mean = _fit(bits, dim, method, key, tie_break)
  offset = _project(mean[None], projection)[0]
  packed = quantize.pack_bits(jnp.asarray(bits), num_bits=1)
  return GlyphEmbedding(packed, projection, offset)


def embed(
  table: Float[Array, "V D"] | GlyphEmbedding, ids: Int[Array, "*batch"]
) -> Float[Array, "*batch D"]:
  """The rows of tokens; neither the table nor anything before it learns.

  Args:
    table: of `frozen_embedding` or `packed_embedding`.
    ids: rows of the table; negative ones give zeros.

  Returns:
    Rows in the dtype of the table (of its projection), laid out as the ids.

  Example:
    >>> jax.jit(embed)(jnp.eye(3), jnp.array([2, -1])).tolist()
    [[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]

  Cost: of a packed table, 2 P D FLOPs a token.
  """
  table = jax.lax.stop_gradient(table)
  if not isinstance(table, GlyphEmbedding):
    return rows.take_rows(table, ids)
  bits = quantize.unpack_bits(rows.take_rows(table.packed, ids), num_bits=1)
  found = _unit(bits, table.projection, table.offset)
  found = jnp.where((ids >= 0)[..., None], found, 0)
  return found.astype(table.projection.dtype)


def collisions(table: np.ndarray) -> list[list[int]]:
  """Tokens that a model cannot tell apart except by what is around them.

  Args:
    table: [V, ...], bitmaps or rows of an embedding.

  Returns:
    Groups of two or more ids whose rows are equal, by their first id.

  Example:
    >>> collisions(np.array([[0, 1], [1, 1], [0, 1]]))
    [[0, 2]]
  """
  table = np.ascontiguousarray(table)
  groups = {}
  for i, row in enumerate(table):
    groups.setdefault(row.tobytes(), []).append(i)
  return [group for group in groups.values() if len(group) > 1]


def _drawn(token, face, size):
  """Black on white, one cell a character."""
  picture = Image.new("L", (size * max(1, len(token)), size), 255)
  draw = ImageDraw.Draw(picture)
  for i, character in enumerate(token):
    left, top, right, bottom = face.getbbox(character)
    x = i * size + (size - (right - left)) // 2
    y = (size - (bottom - top)) // 2 - top
    draw.text((x, y), character, fill=0, font=face)
  return picture


def _disturbed(picture, token, augmentation):
  """Turned, moved, speckled and blurred."""
  places = [ord(c) for c in token] if augmentation.per_token else []
  random = np.random.default_rng([augmentation.seed, *places])
  simple = all(any(ord(c) in block for block in _SIMPLE) for c in token)
  noise = augmentation.noise if simple else augmentation.complex_noise
  if simple:
    angle = random.uniform(-augmentation.rotation, augmentation.rotation)
    shift = random.integers(-augmentation.shift, augmentation.shift + 1, 2)
    turned = picture.rotate(angle, fillcolor=255)
    picture = Image.new("L", turned.size, 255)
    picture.paste(turned, tuple(shift.tolist()))
  pixels = np.array(picture)
  pixels[random.random(pixels.shape) < noise] = 0
  picture = Image.fromarray(pixels)
  if simple and augmentation.blur:
    picture = picture.filter(ImageFilter.GaussianBlur(augmentation.blur))
  return picture


def _squeezed(picture, size, resample):
  """Ink of one cell."""
  if resample == "nearest":
    picture = picture.point(lambda grey: 0 if grey < _DARK else 255)
  ways = {"nearest": Image.Resampling.NEAREST}
  way = ways.get(resample, Image.Resampling.BILINEAR)
  if picture.size != (size, size):
    picture = picture.resize((size, size), way)
  return np.asarray(picture) < _DARK


def _fit(bits, dim, method, key, tie_break):
  """The projection [P, D] and the mean bitmap [P], without a gradient."""
  bits = jnp.asarray(bits)
  checks.has_rank(2, bits=bits)
  checks.one_of(get_args(Method), method=method)
  num_tokens, num_pixels = bits.shape
  checks.in_range(1, 1 << 24, num_tokens=num_tokens)
  checks.in_range(1, num_pixels, dim=dim)
  if (key is None) == (method == "random_projection"):
    raise ValueError(f"key must come exactly with a random projection: {key}")
  counts = _counts(bits)
  mean = jnp.diagonal(counts) / num_tokens
  if key is not None:
    projection = jax.random.normal(key, (num_pixels, dim)) * dim**-0.5
    return projection, mean
  covariance = counts / num_tokens - mean[:, None] * mean[None]
  return _axes(covariance, tie_break)[:, :dim], mean


def _counts(bits):
  """How often two pixels are both ink, [P, P].

  Whole numbers below 2^24: float32 sums them exactly, in any order, and any
  precision of the product will do.
  """

  def count(bits):
    ink = bits.astype(jnp.float32)
    return jnp.matmul(ink.T, ink)

  if any(axis is not None for axis in jax.typeof(bits).sharding.spec):
    count = jax.sharding.auto_axes(count, out_sharding=jax.P())
  return count(bits)


def _axes(covariance, tie_break):
  """Eigenvectors as columns, the largest eigenvalue first, signs fixed."""
  ramp = jnp.linspace(1.0, 0.0, len(covariance), dtype=jnp.float32)
  ramp = tie_break * jnp.linalg.norm(covariance) * ramp
  _, axes = jnp.linalg.eigh(covariance + jnp.diag(ramp))
  axes = axes[:, ::-1]
  size = jnp.abs(axes)
  large = size >= (1 - _PIVOT) * jnp.max(size, axis=0, keepdims=True)
  first = jnp.argmax(large, axis=0)[None]
  pivot = jnp.take_along_axis(axes, first, axis=0)
  return axes * jnp.sign(pivot)


def _unit(bits, projection, offset):
  """Unit rows of bitmaps, float32."""
  shape = (1,) * (bits.ndim - 1) + offset.shape
  x = _project(bits, projection) - offset.astype(jnp.float32).reshape(shape)
  return jax.lax.stop_gradient(similarity.safe_normalize(x))


def _project(x, projection):
  wide = x.astype(jnp.float32), projection.astype(jnp.float32)
  return jnp.matmul(*wide, precision="highest")


def _check(augmentation):
  checks.in_range(0, 180, rotation=augmentation.rotation)
  checks.in_range(0, 256, shift=augmentation.shift)
  checks.in_range(0, 100, blur=augmentation.blur)
  checks.in_range(
    0, 1, noise=augmentation.noise, complex_noise=augmentation.complex_noise
  )

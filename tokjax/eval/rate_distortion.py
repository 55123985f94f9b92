"""Bytes against quality: tokens beside JPEG and WebP on the same images.

    curve = rate_distortion.rate_distortion(images, "webp", range(0, 100, 10))
    fitted = rate_distortion.at_budget(images, "jpeg", num_bytes=192)

A file of a codec has a header of 280 to 630 bytes (JPEG) or 44 (WebP), which is
most of the file of a 32 x 32 image. So both counts are given, those of the
whole file and of its payload: without the header, which is what the file of a
single grey pixel takes at the same quality. State which one you compare with.
"""

import functools
import io
import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from tokjax import checks
from tokjax.eval import batching, image_quality
from tokjax.typing import Float, Int, UInt8

__all__ = [
  "Coded",
  "Fitted",
  "RatePoint",
  "at_budget",
  "bits_per_pixel",
  "code",
  "rate_distortion",
  "token_bytes",
]

# Small files rather than fast ones. The ways of a codec differ in how the same
# coefficients are written: with the standard Huffman tables, with those of the
# image, and with those of each of several scans.
_WAYS = {
  "jpeg": ({}, {"optimize": True}, {"optimize": True, "progressive": True}),
  "webp": ({"method": 6},),
}
_BATCH = 64  # images compared at once


class Coded(NamedTuple):
  """An image that was written and read again.

  Attributes:
    file_bytes: of the smallest file.
    payload_bytes: of the file that is smallest without its header.
    image: the pixels in it, uint8.
  """

  file_bytes: int
  payload_bytes: int
  image: UInt8[np.ndarray, "H W 3"]


class RatePoint(NamedTuple):
  """A codec at one quality, means over the images of a set.

  Attributes:
    codec: "jpeg" or "webp".
    quality: of the codec.
    file_bytes: of the whole file.
    payload_bytes: of the file without its header.
    bits_per_pixel: of the whole file.
    payload_bits_per_pixel: of the file without its header.
    psnr: decibels, mean over images.
    ssim: mean over images.
  """

  codec: str
  quality: int
  file_bytes: float
  payload_bytes: float
  bits_per_pixel: float
  payload_bits_per_pixel: float
  psnr: float
  ssim: float


class Fitted(NamedTuple):
  """The best of each image that a number of bytes holds.

  Attributes:
    quality: of the codec; -1 where even the lowest takes more bytes.
    num_bytes: counted as asked, with or without the header; 0 there.
    psnr: decibels; NaN there, so that a mean over the images that happen to
      fit is not taken for one over the set.
    ssim: the same.
  """

  quality: Int[np.ndarray, " N"]
  num_bytes: Int[np.ndarray, " N"]
  psnr: Float[np.ndarray, " N"]
  ssim: Float[np.ndarray, " N"]


def bits_per_pixel(
  num_tokens: int | float, num_codes: int, height: int, width: int
) -> float:
  """Rate of tokens of a fixed length: num_tokens log2(num_codes) / pixels.

  Args:
    num_tokens: per image; a mean where the length varies (what it takes to
      tell the length is not counted).
    num_codes: size of the codebook.
    height: of the image in pixels.
    width: the same.

  Returns:
    Bits per pixel.

  Raises:
    ValueError: if a number is out of range.

  Example:
    >>> round(bits_per_pixel(256, 16384, 256, 256), 5)
    0.05469
  """
  checks.in_range(1, float("inf"), num_codes=num_codes)
  checks.in_range(0, float("inf"), num_tokens=num_tokens)
  checks.in_range(1, float("inf"), height=height, width=width)
  return num_tokens * math.log2(num_codes) / (height * width)


def token_bytes(num_tokens: int, num_codes: int) -> int:
  """Bytes of the tokens of an image, packed bit to bit.

  Args:
    num_tokens: per image.
    num_codes: size of the codebook.

  Returns:
    ceil(num_tokens log2(num_codes) / 8), the budget to give a codec.

  Raises:
    ValueError: if a number is out of range.

  Example:
    >>> token_bytes(32, 8192)
    52
  """
  return math.ceil(bits_per_pixel(num_tokens, num_codes, 1, 1) / 8)


def code(image: UInt8[np.ndarray, "H W 3"], codec: str, quality: int) -> Coded:
  """Writes an image and reads it again, in memory.

  Args:
    image: red, green, blue.
    codec: "jpeg" (colour at half the resolution; baseline with the standard
      tables, with those of the image, and progressive: the smallest counts)
      or "webp" (lossy, its most thorough search).
    quality: 0..100 of the codec.

  Returns:
    Sizes, and the image.

  Raises:
    ValueError: for another kind of array, codec or quality.

  Example:
    >>> found = code(np.zeros((8, 8, 3), np.uint8), "webp", 50)
    >>> found.payload_bytes < found.file_bytes < 100, found.image.shape
    (True, (8, 8, 3))
  """
  checks.one_of(tuple(_WAYS), codec=codec)
  checks.in_range(0, 100, quality=quality)
  _check_kind("image", image, "[height, width, 3]", 3)
  files = [_written(image, codec, quality, way) for way in _WAYS[codec]]
  headers = _header_bytes(codec, quality)
  with PIL.Image.open(io.BytesIO(files[0])) as found:
    return Coded(
      min(map(len, files)),
      min(len(f) - h for f, h in zip(files, headers, strict=True)),
      np.asarray(found.convert("RGB")),
    )


def rate_distortion(
  images: UInt8[np.ndarray, "N H W 3"], codec: str, qualities: Iterable[int]
) -> list[RatePoint]:
  """The curve of a codec over a set of images.

  Args:
    images: at least 11 pixels a side, for SSIM.
    codec: as in `code`.
    qualities: 0..100 each, in any order.

  Returns:
    A point for each quality.

  Raises:
    ValueError: for another kind of array, codec or quality.

  Example:
    >>> images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3))
    >>> low, high = rate_distortion(images.astype(np.uint8), "jpeg", (10, 90))
    >>> low.file_bytes < high.file_bytes, low.psnr < high.psnr
    (True, True)
  """
  _check_kind("images", images, "[n, height, width, 3]", 4)
  height, width = images.shape[1:3]
  points = []
  for quality in qualities:
    coded = [code(image, codec, quality) for image in images]
    file_bytes = float(np.mean([one.file_bytes for one in coded]))
    payload_bytes = float(np.mean([one.payload_bytes for one in coded]))
    psnr, ssim = _quality(images, np.stack([one.image for one in coded]))
    points.append(
      RatePoint(
        codec,
        quality,
        file_bytes,
        payload_bytes,
        bits_per_pixel=8 * file_bytes / (height * width),
        payload_bits_per_pixel=8 * payload_bytes / (height * width),
        psnr=float(psnr.mean()),
        ssim=float(ssim.mean()),
      )
    )
  return points


def at_budget(
  images: UInt8[np.ndarray, "N H W 3"],
  codec: str,
  num_bytes: int,
  *,
  count_header: bool = True,
  qualities: Iterable[int] = range(101),
) -> Fitted:
  """Each image at the highest quality whose file fits into a budget.

  Args:
    images: at least 11 pixels a side.
    codec: as in `code`.
    num_bytes: of an image, such as `token_bytes` of a tokenizer.
    count_header: whether the whole file must fit, or its payload only, as if
      all images shared one header.
    qualities: those to try. Every image is written at one quality after the
      other, the highest first, until it fits: files need not grow with the
      quality from one to the next.

  Returns:
    One row per image, those that fit at no quality included.

  Raises:
    ValueError: for another kind of array, codec, quality or budget.

  Example:
    >>> images = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3))
    >>> images = images.astype(np.uint8)
    >>> at_budget(images, "jpeg", 200).quality.tolist()  # less than a header
    [-1]
    >>> found = at_budget(images, "jpeg", 200, count_header=False)
    >>> bool(found.num_bytes <= 200), bool(found.psnr > 10)
    (True, True)
  """
  _check_kind("images", images, "[n, height, width, 3]", 4)
  checks.in_range(1, float("inf"), num_bytes=num_bytes)
  quality = np.full(len(images), -1)
  sizes = np.zeros(len(images), int)
  coded = images.copy()
  for level in sorted(qualities, reverse=True):
    for row in np.flatnonzero(quality < 0):
      one = code(images[row], codec, level)
      size = one.file_bytes if count_header else one.payload_bytes
      if size <= num_bytes:
        quality[row], sizes[row], coded[row] = level, size, one.image
  psnr, ssim = _quality(images, coded)
  fits = quality >= 0
  return Fitted(
    quality,
    sizes,
    psnr=np.where(fits, psnr, np.nan),
    ssim=np.where(fits, ssim, np.nan),
  )


def _written(image, codec, quality, way):
  file = io.BytesIO()
  PIL.Image.fromarray(image).save(file, codec, quality=quality, **way)
  return file.getvalue()


@functools.cache
def _header_bytes(codec, quality):
  """Bytes of the file of one grey pixel, for each way of the codec."""
  pixel = np.full((1, 1, 3), 128, np.uint8)
  return [len(_written(pixel, codec, quality, way)) for way in _WAYS[codec]]


def _quality(images, coded):
  """PSNR and SSIM of each image, [N] each."""
  rows = batching.in_batches(_both, images, coded, batch_size=_BATCH)
  return np.concatenate(list(rows)).T


@jax.jit
def _both(x, y):
  x, y = x.astype(jnp.float32) / 255, y.astype(jnp.float32) / 255
  return jnp.stack([image_quality.psnr(x, y), image_quality.ssim(x, y)], axis=1)


def _check_kind(name, x, shape, rank):
  if x.dtype != np.uint8 or x.ndim != rank or x.shape[-1] != 3:
    raise ValueError(
      f"{name} must be uint8 {shape}, got {x.dtype} {list(x.shape)}"
    )

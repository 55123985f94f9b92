"""One report of how well a tokenizer reconstructs a set of images.

    found = reconstruction.report(
      images, reconstruction.to_bytes(decoded), indices=indices, num_codes=4096)
    print(found._asdict())

Scores are those of the 8-bit images, per image and then averaged, as papers
report them. State the set beside them, how it was resized and cropped, and
whether the weights were a moving average.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tokjax import checks
from tokjax.eval import (
  batching,
  frechet,
  image_quality,
  lpips,
  rate_distortion,
)
from tokjax.eval.frechet import FeatureFrechet
from tokjax.ops import code_usage
from tokjax.typing import Array, Float, Int, UInt8

__all__ = ["ReconstructionReport", "report", "to_bytes"]


class ReconstructionReport(NamedTuple):
  """Numbers of one set; None where the report was not given what it takes.

  Attributes:
    num_images: images of the set.
    height: of an image in pixels.
    width: the same.
    psnr: decibels, mean over images; inf if one of them is exact.
    ssim: mean over images.
    ms_ssim: five scales, mean over images; None below 161 pixels a side.
    lpips: mean over images.
    lpips_backbone: "vgg16" or "alexnet".
    fid: of the reconstructions against the images, which is rFID on the
      50,000 validation images of ImageNet.
    frechet: the same with other features, which it names.
    num_tokens: mean over images, without padding.
    bits_per_pixel: num_tokens log2(num_codes) / pixels.
    usage: share of the codes that occur in the set.
    perplexity: of the codes in the set.
  """

  num_images: int
  height: int
  width: int
  psnr: float
  ssim: float
  ms_ssim: float | None = None
  lpips: float | None = None
  lpips_backbone: str | None = None
  fid: float | None = None
  frechet: FeatureFrechet | None = None
  num_tokens: float | None = None
  bits_per_pixel: float | None = None
  usage: float | None = None
  perplexity: float | None = None


def report(
  images: UInt8[np.ndarray, "N H W C"],
  reconstructions: UInt8[np.ndarray, "N H W C"],
  *,
  indices: Int[np.ndarray, "N ..."] | None = None,
  num_codes: int | None = None,
  lpips_weights: lpips.LpipsWeights | None = None,
  inception_pool3: Callable[[np.ndarray], Any] | None = None,
  features: Mapping[str, Callable[[np.ndarray], Any]] | None = None,
  batch_size: int = 64,
) -> ReconstructionReport:
  """Scores the reconstructions of a whole set.

  Args:
    images: the originals.
    reconstructions: of them, row by row, 8 bits (`to_bytes`).
    indices: the codes of each image, any number of axes; -1 is padding.
    num_codes: size of the codebook; goes with `indices`.
    lpips_weights: for LPIPS, of colour images.
    inception_pool3: for FID; `frechet.fid` says what it must be.
    features: name and function of the network for `frechet.feature_frechet`,
      one entry.
    batch_size: images at once.

  Returns:
    The numbers.

  Raises:
    ValueError: if sizes disagree, the images are smaller than 11 pixels a
      side, or one of `indices` and `num_codes` comes without the other.

  Example:
    >>> images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3))
    >>> images = images.astype(np.uint8)
    >>> found = report(images, images ^ 16, indices=np.arange(8).reshape(4, 2),
    ...                num_codes=16)
    >>> round(found.psnr, 2), found.bits_per_pixel, found.usage
    (24.05, 0.03125, 0.5)
  """
  _check(images, reconstructions)
  if (indices is None) != (num_codes is None):
    raise ValueError("indices and num_codes must come together")
  if features is not None:
    checks.in_range(1, 1, num_features=len(features))
  num_images, height, width = images.shape[:3]

  def mean(metric, *weights):
    rows = batching.in_batches(
      lambda x, y: _scores(x, y, weights, metric=metric),
      images,
      reconstructions,
      batch_size=batch_size,
    )
    return float(np.concatenate(list(rows)).mean(dtype=np.float64))

  found = ReconstructionReport(
    num_images,
    height,
    width,
    psnr=mean(image_quality.psnr),
    ssim=mean(image_quality.ssim),
  )
  if min(height, width) >= image_quality.smallest_side(num_scales=5):
    found = found._replace(ms_ssim=mean(image_quality.ms_ssim))
  if lpips_weights is not None:
    found = found._replace(
      lpips=mean(lpips.lpips, lpips_weights),
      lpips_backbone=lpips_weights.backbone,
    )
  if inception_pool3 is not None:
    found = found._replace(
      fid=frechet.fid(
        reconstructions, images, inception_pool3, batch_size=batch_size
      )
    )
  for name, function in (features or {}).items():
    distance = frechet.feature_frechet(
      reconstructions, images, function, features=name, batch_size=batch_size
    )
    found = found._replace(frechet=distance)
  if indices is not None:
    checks.same_size(images=num_images, indices=len(indices))
    usage, perplexity = _usage(jnp.asarray(indices), num_codes=num_codes)
    num_tokens = float((np.asarray(indices) >= 0).sum() / num_images)
    found = found._replace(
      num_tokens=num_tokens,
      bits_per_pixel=rate_distortion.bits_per_pixel(
        num_tokens, num_codes, height, width
      ),
      usage=float(usage),
      perplexity=float(perplexity),
    )
  return found


def to_bytes(
  images: Float[Array, "*batch H W C"], *, low: float = 0.0, high: float = 1.0
) -> UInt8[Array, "*batch H W C"]:
  """Float images as 8-bit ones: clipped, scaled, rounded to the nearest.

  Args:
    images: what a decoder returns.
    low: the value of black; -1 for decoders of -1..1.
    high: the value of white.

  Returns:
    uint8; NaN becomes 0.

  Raises:
    ValueError: if `low` is not below `high`.

  Example:
    >>> print(to_bytes(jnp.array([[[-1.2, 0.0, 1.0]]]), low=-1.0))
    [[[  0 128 255]]]
  """
  if not low < high:
    raise ValueError(f"low must be below high, got {low} and {high}")
  unit = (images.astype(jnp.float32) - low) / (high - low)
  unit = jnp.clip(jnp.nan_to_num(unit), 0, 1)
  return jnp.round(255 * unit).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnames="metric")
def _scores(x, y, weights, *, metric):
  """A metric of 8-bit images, one number each."""
  x, y = x.astype(jnp.float32) / 255, y.astype(jnp.float32) / 255
  return metric(*weights, x, y)


@functools.partial(jax.jit, static_argnames="num_codes")
def _usage(indices, *, num_codes):
  counts = code_usage.code_histogram(indices, num_codes=num_codes)
  return code_usage.usage(counts), code_usage.perplexity(counts)


def _check(images, reconstructions) -> None:
  checks.has_rank(4, images=images, reconstructions=reconstructions)
  checks.in_range(1, float("inf"), num_images=len(images))
  for name, x in (("images", images), ("reconstructions", reconstructions)):
    if x.dtype != np.uint8:
      raise ValueError(
        f"{name} must be uint8 (to_bytes makes it so), got {x.dtype}"
      )
  if images.shape != reconstructions.shape:
    raise ValueError(
      f"reconstructions must have the shape of images, {images.shape}, got "
      f"{reconstructions.shape}"
    )

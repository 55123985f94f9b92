"""How near an image comes to another: PSNR, SSIM and MS-SSIM.

    quality = image_quality.ssim(images, reconstructions).mean()

Images are batches [B, H, W, C] of floats in 0..1, any float dtype; nothing is
clipped or rounded, which is the caller's to do and to state (papers score the
8-bit images, `tokjax.eval.reconstruction` does so). All give one float32 per
image, of which papers report the mean. Gradients flow to both images, so 1 -
SSIM can be a loss.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from tokjax import checks
from tokjax.typing import Array, Float

__all__ = ["ms_ssim", "psnr", "smallest_side", "ssim"]

_WINDOW = 11  # pixels a side of the Gaussian window
_SIGMA = 1.5
# (K1 L)^2 and (K2 L)^2 of the paper, L = 1 being the range of the values.
_C1, _C2 = 0.01**2, 0.03**2
# Of the five scales, finest first; they add up to 1.
_SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def psnr(
  images: Float[Array, "B H W C"], reconstructions: Float[Array, "B H W C"]
) -> Float[Array, " B"]:
  """Peak signal-to-noise ratio in decibels, per image.

  -10 log10(mean((images - reconstructions)^2)), the mean over pixels and
  channels. The mean of these over images is what papers call PSNR; it is not
  the PSNR of the mean error, which is lower.

  Args:
    images: values in 0..1.
    reconstructions: the same.

  Returns:
    float32; +inf with zero gradient where both are equal.

  Raises:
    ValueError: if the shapes differ.

  Example:
    >>> grey = jnp.full((1, 4, 4, 3), 0.5)
    >>> print(jax.jit(psnr)(grey, grey + 0.1).round(3))
    [20.]

  Cost: reads both batches once.
  """
  _check(images, reconstructions)
  difference = images.astype(jnp.float32) - reconstructions.astype(jnp.float32)
  error = jnp.mean(jnp.square(difference), axis=(1, 2, 3))
  differs = error > 0
  # The inner `where` keeps the gradient of the logarithm away from 0.
  decibels = -10 * jnp.log10(jnp.where(differs, error, 1.0))
  return jnp.where(differs, decibels, jnp.inf)


def ssim(
  images: Float[Array, "B H W C"], reconstructions: Float[Array, "B H W C"]
) -> Float[Array, " B"]:
  """Structural similarity, per image.

  At every place where an 11 x 11 Gaussian window (sigma 1.5) fits, with the
  means m, variances v and covariance c of both images in it,

    (2 m_x m_y + C1) (2 c + C2) / ((m_x^2 + m_y^2 + C1) (v_x + v_y + C2)),

  C1 = 0.01^2, C2 = 0.03^2; averaged over places and channels. Channels are
  compared one by one; some codes compare the luminance only.

  Args:
    images: values in 0..1, at least 11 pixels a side.
    reconstructions: the same.

  Returns:
    float32 in -1..1; 1 where both are equal.

  Raises:
    ValueError: if the shapes differ or the images are too small.

  Example:
    >>> images = jax.random.uniform(jax.random.key(0), (2, 16, 16, 3))
    >>> print(ssim(images, images))
    [1. 1.]

  Cost: 88 multiply-adds a value, two passes of 11 over four maps.

  Source: Wang et al. (2004), "Image quality assessment: from error visibility
    to structural similarity": its window and constants, variances of the
    population (no n - 1), no scaling of the image beforehand.
  """
  _check(images, reconstructions)
  _check_size(images, 1)
  return _ssim(images, reconstructions)


def ms_ssim(
  images: Float[Array, "B H W C"],
  reconstructions: Float[Array, "B H W C"],
  *,
  num_scales: int = 5,
) -> Float[Array, " B"]:
  """Multi-scale structural similarity, per image.

  The images are halved num_scales - 1 times by the mean of 2 x 2 pixels (a
  last odd row or column counts twice). With s_j the mean over places of the
  second factor of SSIM at scale j and S that of SSIM at the coarsest one,

    s_1^w_1 ... s_(M-1)^w_(M-1) S^w_M,  w = .0448 .2856 .3001 .2363 .1333,

  per channel; then the mean over channels. A negative factor counts as 0 and
  passes no gradient.

  Args:
    images: values in 0..1; the coarsest scale must have 11 pixels a side: 161
      for five scales, 81 for four, 41 for three.
    reconstructions: the same.
    num_scales: 1 to 5. Fewer than 5 take the first weights, scaled to add up
      to 1: say so beside the number, which is not comparable.

  Returns:
    float32 in 0..1; 1 where both are equal.

  Raises:
    ValueError: if the shapes differ, `num_scales` is out of range or the
      images are too small for it.

  Example:
    >>> images = jax.random.uniform(jax.random.key(0), (1, 24, 24, 1))
    >>> print(ms_ssim(images, images, num_scales=2))
    [1.]

  Cost: 4/3 of that of `ssim`.

  Source: Wang, Simoncelli and Bovik (2003), "Multiscale structural similarity
    for image quality assessment". Odd sizes, the mean over channels and
    negative factors as in TensorFlow's `image.ssim_multiscale`; fewer scales
    are ours.
  """
  _check(images, reconstructions)
  _check_size(images, num_scales)
  return _ms_ssim(images, reconstructions, num_scales)


def smallest_side(*, num_scales: int) -> int:
  """Pixels a side that leave room for the window at the coarsest scale.

  Args:
    num_scales: of `ms_ssim`; 1 for `ssim`.

  Returns:
    Pixels.

  Example:
    >>> smallest_side(num_scales=5)
    161
  """
  checks.in_range(1, len(_SCALE_WEIGHTS), num_scales=num_scales)
  # Halving rounds up, so one pixel more than twice ten leaves eleven.
  return ((_WINDOW - 1) << (num_scales - 1)) + 1


@jax.jit
def _ssim(x, y):
  luminance, structure = _factors(x.astype(jnp.float32), y.astype(jnp.float32))
  return jnp.mean(luminance * structure, axis=(1, 2, 3))


@functools.partial(jax.jit, static_argnames="num_scales")
def _ms_ssim(x, y, num_scales):
  x, y = x.astype(jnp.float32), y.astype(jnp.float32)
  weights = _SCALE_WEIGHTS[:num_scales]
  product = 1.0
  for scale, weight in enumerate(weights):
    luminance, factor = _factors(x, y)
    if scale < num_scales - 1:
      x, y = _halved(x), _halved(y)
    else:
      factor = luminance * factor
    mean = jnp.mean(factor, axis=(1, 2))  # [B, C]
    positive = mean > 0
    # The inner `where` keeps the gradient of the power away from 0.
    power = jnp.where(positive, mean, 1.0) ** (weight / math.fsum(weights))
    product = product * jnp.where(positive, power, 0)
  return jnp.mean(product, axis=1)


def _factors(x, y):
  """Both factors of SSIM at every place, [B, H - 10, W - 10, C]."""
  # Variances are differences of squares: near 0 they lose the least of their
  # digits, which count in flat parts of an image.
  centre_x, centre_y = _centre(x), _centre(y)
  x, y = x - centre_x, y - centre_y
  mean_x, mean_y = _windowed(x), _windowed(y)
  variances = _windowed(x * x + y * y) - (mean_x * mean_x + mean_y * mean_y)
  covariance = _windowed(x * y) - mean_x * mean_y
  structure = (2 * covariance + _C2) / (variances + _C2)
  mean_x, mean_y = mean_x + centre_x, mean_y + centre_y
  squares = mean_x * mean_x + mean_y * mean_y
  return (2 * mean_x * mean_y + _C1) / (squares + _C1), structure


def _centre(x):
  mean = jnp.mean(x, axis=(1, 2), keepdims=True)
  return jax.lax.stop_gradient(mean)  # cancels out


def _windowed(x):
  """Gaussian mean round every place where the window fits."""
  distance = np.arange(_WINDOW) - _WINDOW // 2
  window = np.exp(-(distance**2) / (2 * _SIGMA**2))
  window /= window.sum()
  for axis in (1, 2):
    size = x.shape[axis] - _WINDOW + 1
    x = sum(
      float(weight) * jax.lax.slice_in_dim(x, start, start + size, axis=axis)
      for start, weight in enumerate(window)
    )
  return x


def _halved(x):
  """Means of 2 x 2 pixels."""
  for axis in (1, 2):
    even = jax.lax.slice_in_dim(x, 0, None, 2, axis)
    odd = jax.lax.slice_in_dim(x, 1, None, 2, axis)
    if x.shape[axis] % 2:
      last = jax.lax.slice_in_dim(x, -1, None, axis=axis)
      odd = jnp.concatenate([odd, last], axis=axis)
    x = (even + odd) / 2
  return x


def _check(images, reconstructions) -> None:
  checks.has_rank(4, images=images, reconstructions=reconstructions)
  if images.shape != reconstructions.shape:
    raise ValueError(
      f"reconstructions must have the shape of images, {images.shape}, got "
      f"{reconstructions.shape}"
    )


def _check_size(images, num_scales) -> None:
  height, width = images.shape[1:3]
  need = smallest_side(num_scales=num_scales)
  if min(height, width) < need:
    raise ValueError(
      f"images must be at least {need} pixels a side for {num_scales} "
      f"scale(s), got {height} x {width}"
    )

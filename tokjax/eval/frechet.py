"""Frechet distance between two sets of images, by the features of a network.

    statistics = frechet.collect(images, features, batch_size=64)
    distance = frechet.frechet_distance(statistics, reference)

Only features of the published Inception-v3 make it an FID (`fid`). No such
weights are shipped; what the features of another network give is a
`feature_frechet`, which carries their name and compares with nothing but
itself.

An FID means little without its protocol. Beside every number: the reference
set, how both sets were resized (filter, antialias) and rounded to 8 bits, the
weights (moving average or not), and how many images each set has, for the
distance is biased upwards in small sets. rFID (reconstructions of the 50,000
validation images of ImageNet against those images) and gFID (50,000 samples
against statistics of the training set) are two measures.

Everything here is float64 on the host.
"""

import os
import pathlib
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tokjax import checks
from tokjax.eval import batching
from tokjax.typing import Float, UInt8

__all__ = [
  "FeatureFrechet",
  "FeatureStatistics",
  "collect",
  "feature_frechet",
  "fid",
  "frechet_distance",
  "read_statistics",
]

_POOL3 = 2048  # channels of the last pooling of Inception-v3


class FeatureStatistics(NamedTuple):
  """What the distance needs of a set.

  Attributes:
    mean: float64 [D].
    covariance: float64 [D, D], divided by n - 1.
    num: n, vectors they were taken over; 0 if that is not known.
  """

  mean: Float[np.ndarray, " D"]
  covariance: Float[np.ndarray, "D D"]
  num: int


class FeatureFrechet(NamedTuple):
  """A Frechet distance that is no FID.

  Attributes:
    features: name of the network and layer.
    distance: not negative.
    num_images: images of the set that is judged.
    num_reference: images of the reference.
  """

  features: str
  distance: float
  num_images: int
  num_reference: int


def frechet_distance(
  features_a: Float[np.ndarray, "Na D"] | FeatureStatistics,
  features_b: Float[np.ndarray, "Nb D"] | FeatureStatistics,
) -> float:
  """Squared Frechet (2-Wasserstein) distance of two fitted Gaussians.

    |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2)

  The last root is the sum of the roots of the eigenvalues of a symmetric
  matrix, so that nothing complex can appear; eigenvalues that rounding made
  negative count as 0.

  Args:
    features_a: one vector per image, at least two, or their statistics.
    features_b: the same of the other set.

  Returns:
    A number >= 0.

  Raises:
    ValueError: if the widths disagree, a set has fewer than two vectors or
      anything is not finite.

  Example:
    >>> one = np.array([[-1.0], [1.0]]) / np.sqrt(2)  # mean 0, variance 1
    >>> round(frechet_distance(one, 1 + 2 * one), 6)  # mean 1, variance 4
    2.0

  Cost: two eigendecompositions of D x D: some ten seconds for D = 2048.

  Source: Dowson and Landau (1982); Heusel et al. (2017), "GANs trained by a
    two time-scale update rule", whose code takes the root of the unsymmetric
    product S_a S_b: the same trace.
  """
  a, b = (
    _statistics("features_a", features_a),
    _statistics("features_b", features_b),
  )
  checks.same_size(features_a_width=len(a.mean), features_b_width=len(b.mean))
  values, vectors = np.linalg.eigh(a.covariance)
  root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
  product = root @ b.covariance @ root
  values = np.linalg.eigvalsh((product + product.T) / 2)
  overlap = np.sqrt(np.maximum(values, 0)).sum()
  spread = np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap
  return max(float(np.square(a.mean - b.mean).sum() + spread), 0.0)


def collect(
  images: UInt8[np.ndarray, "N H W C"],
  function: Callable[[np.ndarray], Any],
  *,
  batch_size: int,
) -> FeatureStatistics:
  """Statistics of a set's features, which are never held all at once.

  Args:
    images: at least two.
    function: takes uint8 [batch_size, H, W, C], returns features
      [batch_size, D]; resizing and normalising belong to it.
    batch_size: images at once.

  Returns:
    float64 statistics.

  Raises:
    ValueError: for fewer than two images or features that are not finite.

  Example:
    >>> images = np.arange(8, dtype=np.uint8).reshape(4, 1, 2, 1)
    >>> found = collect(images, lambda x: x.reshape(len(x), -1), batch_size=3)
    >>> found.mean.tolist(), found.num
    ([3.0, 4.0], 4)
  """
  num, mean, square = 0, 0.0, 0.0
  for rows in batching.in_batches(function, images, batch_size=batch_size):
    part = _checked("features", rows)
    shift = part.mean(0) - mean
    centred = part - part.mean(0)
    total = num + len(part)
    # Sums of squares about a moving mean, which do not cancel.
    square = (
      square
      + centred.T @ centred
      + np.outer(shift, shift) * (num * len(part) / total)
    )
    mean = mean + shift * (len(part) / total)
    num = total
  checks.in_range(2, float("inf"), num_images=num)
  return FeatureStatistics(mean, square / (num - 1), num)


def fid(
  images: UInt8[np.ndarray, "N H W 3"],
  reference: UInt8[np.ndarray, "M H W 3"] | FeatureStatistics,
  inception_pool3: Callable[[np.ndarray], Any],
  *,
  batch_size: int = 64,
) -> float:
  """Frechet Inception distance.

  Args:
    images: 8-bit images that are judged: 50,000 for a number to publish.
    reference: the images, or the statistics, that they should look like.
    inception_pool3: features uint8 [B, H, W, 3] -> [B, 2048]. By passing it
      here you declare it to be the last pooling of the Inception-v3 that was
      ported from TensorFlow for FID, with its resizing to 299 x 299 and its
      scaling; nothing else gives numbers that compare with published ones.
    batch_size: images at once.

  Returns:
    The distance.

  Raises:
    ValueError: if the features are not 2048 wide, and as `collect`.

  Source: Heusel et al. (2017), "GANs trained by a two time-scale update rule
    converge to a local Nash equilibrium".
  """
  found = collect(images, inception_pool3, batch_size=batch_size)
  checks.in_range(_POOL3, _POOL3, inception_pool3_width=len(found.mean))
  if not isinstance(reference, FeatureStatistics):
    reference = collect(reference, inception_pool3, batch_size=batch_size)
  return frechet_distance(found, reference)


def feature_frechet(
  images: UInt8[np.ndarray, "N H W C"],
  reference: UInt8[np.ndarray, "M H W C"] | FeatureStatistics,
  function: Callable[[np.ndarray], Any],
  *,
  features: str,
  batch_size: int = 64,
) -> FeatureFrechet:
  """Frechet distance by the features of any network: the stand-in for FID.

  Args:
    images: 8-bit images that are judged.
    reference: the images, or the statistics, that they should look like.
    function: features uint8 [B, H, W, C] -> [B, D].
    features: what they are, network, weights and layer, to stand beside the
      number.
    batch_size: images at once.

  Returns:
    The distance with the name of its features.

  Raises:
    ValueError: if `features` is empty, and as `collect`.

  Example:
    >>> images = np.arange(8, dtype=np.uint8).reshape(4, 1, 2, 1)
    >>> found = feature_frechet(images, images, lambda x: x.mean((1, 2)),
    ...                         features="mean colour")
    >>> found.features, round(found.distance, 6)
    ('mean colour', 0.0)
  """
  if not features.strip():
    raise ValueError("features must name the network and the layer")
  found = collect(images, function, batch_size=batch_size)
  if not isinstance(reference, FeatureStatistics):
    reference = collect(reference, function, batch_size=batch_size)
  distance = frechet_distance(found, reference)
  return FeatureFrechet(features, distance, found.num, reference.num)


def read_statistics(path: str | os.PathLike) -> FeatureStatistics:
  """Reads published statistics: an `.npz` with `mu` and `sigma`.

  Args:
    path: such as the reference batches of guided-diffusion, against which
      gFID is taken.

  Returns:
    float64 statistics; `num` is 0, as the file does not say.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is damaged or holds something else; names it.
  """
  path = pathlib.Path(path).expanduser()
  try:
    with np.load(path, allow_pickle=False) as file:
      found = FeatureStatistics(
        file["mu"].astype(np.float64), file["sigma"].astype(np.float64), 0
      )
    return _statistics("statistics", found)
  except FileNotFoundError:
    raise
  except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
    raise ValueError(f"{path} is no .npz with mu and sigma: {error}") from error


def _statistics(name, x):
  if isinstance(x, FeatureStatistics):
    checks.has_rank(1, **{f"{name}_mean": x.mean})
    width = len(x.mean)
    if x.covariance.shape != (width, width):
      raise ValueError(
        f"{name} must have a covariance [{width}, {width}], got "
        f"{list(x.covariance.shape)}"
      )
    if not (np.isfinite(x.mean).all() and np.isfinite(x.covariance).all()):
      raise ValueError(f"{name} must be finite")
    return x
  x = _checked(name, x)
  checks.in_range(2, float("inf"), **{f"{name}_rows": len(x)})
  covariance = np.cov(x, rowvar=False).reshape(x.shape[1], x.shape[1])
  return FeatureStatistics(x.mean(0), covariance, len(x))


def _checked(name, rows):
  rows = np.asarray(rows, np.float64)
  checks.has_rank(2, **{name: rows})
  if not np.isfinite(rows).all():
    raise ValueError(f"{name} must be finite")
  return rows

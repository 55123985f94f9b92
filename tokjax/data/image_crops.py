"""Squares cut out of images of any size: from the centre, or at random.

`RandomResizedCrop` is a grain transformation: what it cuts depends on the
generator that grain hands it, which is made of the seed and the index.

    crop = RandomResizedCrop(256, area=(0.64, 1.0), aspect=(1.0, 1.0))
    data = grain.MapDataset.source(images).seed(0).random_map(crop)
"""

import dataclasses
import math

import grain
import numpy as np
import PIL.Image

from tokjax import checks
from tokjax.typing import UInt8

__all__ = ["RandomResizedCrop", "centre_crop"]

_FILTERS = {
  "bicubic": PIL.Image.Resampling.BICUBIC,
  "bilinear": PIL.Image.Resampling.BILINEAR,
  "box": PIL.Image.Resampling.BOX,
  "lanczos": PIL.Image.Resampling.LANCZOS,
}
_TRIES = 10


def centre_crop(
  image: UInt8[np.ndarray, "H W 3"], size: int, *, resample: str = "bicubic"
) -> UInt8[np.ndarray, "size size 3"]:
  """The centre square of an image whose shorter side is resized to `size`.

  Args:
    image: red, green, blue.
    size: pixels a side of the result.
    resample: filter of Pillow, antialiased: bicubic, bilinear, box or lanczos.
      A part of the protocol of every metric on such images.

  Returns:
    uint8; the image itself if it is such a square already.

  Raises:
    ValueError: for another kind of array, a size below 1 or another filter.

  Example:
    >>> centre_crop(np.zeros((30, 40, 3), np.uint8), 16).shape
    (16, 16, 3)
  """
  _check(image, size, resample)
  height, width = image.shape[:2]
  shorter = min(height, width)
  height, width = height * size // shorter, width * size // shorter
  resized = _resized(image, height, width, resample)
  top, left = (height - size) // 2, (width - size) // 2
  return resized[top : top + size, left : left + size]


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop(grain.transforms.RandomMap):
  """Cuts a rectangle of random area and shape and resizes it to a square.

  The area is uniform, the logarithm of width / height too. A rectangle that
  does not fit into the image is drawn again, ten times at most; then it is the
  largest one in the centre whose shape is allowed.

  Attributes:
    size: pixels a side of the result.
    area: smallest and largest share of the image's area, in 0..1. The default
      is that of classifiers; tokenizers want most of the image.
    aspect: smallest and largest width / height.
    resample: filter, as in `centre_crop`.

  Example:
    >>> crop = RandomResizedCrop(16)
    >>> image = np.zeros((30, 40, 3), np.uint8)
    >>> crop.random_map(image, np.random.default_rng(0)).shape
    (16, 16, 3)

  Source: Szegedy et al. (2015), "Going deeper with convolutions"; the tries
    and what comes after them as in torchvision, which draws other numbers.
  """

  size: int
  area: tuple[float, float] = (0.08, 1.0)
  aspect: tuple[float, float] = (3 / 4, 4 / 3)
  resample: str = "bicubic"

  def __post_init__(self):
    checks.in_range(1, float("inf"), size=self.size)
    checks.one_of(tuple(_FILTERS), resample=self.resample)
    checks.in_range(0, 1, area_low=self.area[0], area_high=self.area[1])
    for name in ("area", "aspect"):
      low, high = getattr(self, name)
      if not 0 < low <= high:
        raise ValueError(f"{name} must rise from above 0, got {low}, {high}")

  def random_map(
    self, element: UInt8[np.ndarray, "H W 3"], rng: np.random.Generator
  ) -> UInt8[np.ndarray, "size size 3"]:
    """Cuts one square.

    Args:
      element: an image of any size.
      rng: generator of this element.

    Returns:
      uint8.

    Raises:
      ValueError: for another kind of array.
    """
    _check(element, self.size, self.resample)
    top, left, height, width = self._rectangle(*element.shape[:2], rng)
    cut = element[top : top + height, left : left + width]
    return _resized(cut, self.size, self.size, self.resample)

  def _rectangle(self, height, width, rng):
    """Top, left, height and width of what is cut."""
    for _ in range(_TRIES):
      area = height * width * rng.uniform(*self.area)
      aspect = math.exp(rng.uniform(*map(math.log, self.aspect)))
      wide = max(round(math.sqrt(area * aspect)), 1)
      high = max(round(math.sqrt(area / aspect)), 1)
      if wide <= width and high <= height:
        top = rng.integers(height - high, endpoint=True)
        return top, rng.integers(width - wide, endpoint=True), high, wide
    low, high = self.aspect
    wide = min(width, max(round(height * high), 1))
    high = min(height, max(round(width / low), 1))
    return (height - high) // 2, (width - wide) // 2, high, wide


def _resized(image, height, width, resample):
  if image.shape[:2] == (height, width):
    return image
  picture = PIL.Image.fromarray(np.ascontiguousarray(image))
  return np.asarray(picture.resize((width, height), _FILTERS[resample]))


def _check(image, size, resample) -> None:
  checks.in_range(1, float("inf"), size=size)
  checks.one_of(tuple(_FILTERS), resample=resample)
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
    raise ValueError(
      "image must be uint8 [height, width, 3], got "
      f"{image.dtype} {list(image.shape)}"
    )

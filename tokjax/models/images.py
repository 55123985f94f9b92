"""Images as vision encoders take them: read, resize, crop, normalise.

Runs on the host with Pillow and NumPy and does what the published processors
do, in their order: resize the 8-bit image, cut its centre, scale to 0..1,
subtract a mean and divide by a deviation per channel.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image

from tokjax import checks

__all__ = [
  "PREPARATIONS",
  "Preparation",
  "in_folder",
  "normalize",
  "preparation_from_json",
  "prepare",
  "read",
]

_FILTERS = {
  "bicubic": PIL.Image.Resampling.BICUBIC,
  "bilinear": PIL.Image.Resampling.BILINEAR,
  "lanczos": PIL.Image.Resampling.LANCZOS,
  "nearest": PIL.Image.Resampling.NEAREST,
}
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_HALF = (0.5, 0.5, 0.5)


@dataclasses.dataclass(unsafe_hash=True)
class Preparation:
  """How an image becomes pixels; the defaults are those of CLIP at 224."""

  size: int = 224  # pixels of the shorter side, or of both, after resizing
  whole: bool = False  # True squeezes the image into a square of that size
  resample: str = "bicubic"  # bicubic, bilinear, lanczos or nearest
  crop: int | None = 224  # pixels a side of the centre that is cut out
  mean: tuple[float, float, float] = _CLIP_MEAN  # of values in 0..1
  std: tuple[float, float, float] = _CLIP_STD  # the same


# By family; for another size, `dataclasses.replace` size and crop.
PREPARATIONS: dict[str, Preparation] = {
  "clip": Preparation(),
  "clip_336": Preparation(size=336, crop=336),
  "siglip": Preparation(whole=True, crop=None, mean=_HALF, std=_HALF),
  "siglip_384": Preparation(
    size=384, whole=True, crop=None, mean=_HALF, std=_HALF
  ),
  "dinov2": Preparation(size=256, mean=_IMAGENET_MEAN, std=_IMAGENET_STD),
  "deit": Preparation(
    size=256, whole=True, mean=_IMAGENET_MEAN, std=_IMAGENET_STD
  ),
  "vit": Preparation(
    whole=True, resample="bilinear", crop=None, mean=_HALF, std=_HALF
  ),
}


def read(path: str | os.PathLike) -> np.ndarray:
  """Reads an image file as RGB.

  Args:
    path: any format that Pillow knows; other colour spaces are converted, and
      transparency is dropped.

  Returns:
    uint8 [height, width, 3].

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is not an image or cut short.

  Example:
    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.png"
    >>> PIL.Image.new("L", (5, 4)).save(path)
    >>> read(path).shape
    (4, 5, 3)
  """
  try:
    with PIL.Image.open(path) as image:
      return np.asarray(image.convert("RGB"))
  except FileNotFoundError:
    raise
  except (OSError, SyntaxError) as error:  # Pillow's names for damage
    raise ValueError(f"{path} is not a whole image: {error}") from error


def in_folder(folder: str | os.PathLike) -> list[pathlib.Path]:
  """The .png, .jpg and .jpeg files of a folder in the order of their names.

  Args:
    folder: folders in it are not searched.

  Returns:
    At least one path.

  Raises:
    ValueError: if there is none.
  """
  paths = sorted(
    path
    for path in pathlib.Path(folder).glob("*")
    if path.suffix.lower() in (".png", ".jpg", ".jpeg")
  )
  if not paths:
    raise ValueError(f"no .png or .jpg image in {folder}")
  return paths


def prepare(
  images: Sequence[np.ndarray], preparation: Preparation
) -> np.ndarray:
  """Resizes, crops and normalises images of any size.

  Args:
    images: uint8 [height, width, 3] each.
    preparation: how.

  Returns:
    float32 [B, side, side, 3], what `Vit.encode` takes.

  Raises:
    ValueError: for another kind of array, an unknown filter, no image, or
      images that do not come out alike: without a square (`whole`) or a crop.

  Example:
    >>> image = np.zeros((30, 40, 3), np.uint8)
    >>> prepare([image], PREPARATIONS["siglip"]).shape
    (1, 224, 224, 3)

  Source: the image processors of transformers 4.48 for CLIP, SigLIP, DINOv2
    (BiT), DeiT and ViT. An image smaller than the crop, which those pad with
    zeros, is an error here.
  """
  checks.one_of(tuple(_FILTERS), resample=preparation.resample)
  if not len(images):
    raise ValueError("images must hold at least one image")
  return np.stack([_prepare(image, preparation) for image in images])


def normalize(images: np.ndarray, preparation: Preparation) -> np.ndarray:
  """8-bit pixels as an encoder takes them, their size left alone.

  Args:
    images: uint8 [*batch, height, width, 3].
    preparation: names mean and deviation of values in 0..1.

  Returns:
    float32 of the same shape.

  Example:
    >>> white = np.full((1, 1, 3), 255, np.uint8)
    >>> normalize(white, PREPARATIONS["vit"]).tolist()
    [[[1.0, 1.0, 1.0]]]
  """
  scaled = (images * (1 / 255)).astype(np.float32)
  mean = np.asarray(preparation.mean, np.float32)
  return (scaled - mean) / np.asarray(preparation.std, np.float32)


def preparation_from_json(config: Mapping[str, Any]) -> Preparation:
  """Reads the `preprocessor_config.json` of transformers.

  Args:
    config: the parsed file.

  Returns:
    How its processor prepares images.

  Raises:
    ValueError: for a step left out, another scale than 1/255, a size or crop
      that is no square, or a filter that is not known.

  Example:
    >>> preparation_from_json({"size": {"shortest_edge": 256}, "resample": 3,
    ...   "crop_size": {"height": 224, "width": 224}, "do_center_crop": True,
    ...   "image_mean": [0.5] * 3, "image_std": [0.5] * 3}).size
    256
  """
  for step in ("do_resize", "do_rescale", "do_normalize"):
    checks.one_of((True,), **{step: config.get(step, True)})
  factor = config.get("rescale_factor", 1 / 255)
  if abs(factor * 255 - 1) > 1e-6:
    raise ValueError(f"rescale_factor must be 1/255, got {factor}")
  numbers = {int(number): name for name, number in _FILTERS.items()}
  checks.one_of(tuple(numbers), resample=config.get("resample", 3))
  size = config["size"]
  crops = config.get("do_center_crop", "crop_size" in config)
  if isinstance(size, Mapping):
    whole = "shortest_edge" not in size
  else:  # an old file: one number, which families read differently
    kind = config.get("image_processor_type", "")
    kind = (kind or config.get("feature_extractor_type", "")).lower()
    family = re.match("clip|bit|siglip|deit|vit", kind)
    if family is None:
      raise ValueError(f"size {size} needs image_processor_type, got {kind!r}")
    whole = family.group() not in ("clip", "bit")
  return Preparation(
    size=_side("size", size),
    whole=whole,
    resample=numbers[config.get("resample", 3)],
    crop=_side("crop_size", config["crop_size"]) if crops else None,
    mean=tuple(config["image_mean"]),
    std=tuple(config["image_std"]),
  )


def _side(name, size):
  """The one number of a size: 224, or {height: 224, width: 224}."""
  sides = set(size.values()) if isinstance(size, Mapping) else {size}
  if len(sides) != 1:
    raise ValueError(f"{name} must have equal sides, got {size}")
  return int(sides.pop())


def _prepare(image, preparation):
  image = np.asarray(image)
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
    raise ValueError(
      "images must be uint8 [height, width, 3], got "
      f"{image.dtype} {list(image.shape)}"
    )
  height, width = image.shape[:2]
  size = preparation.size
  if preparation.whole:
    new_height = new_width = size
  elif width <= height:
    new_height, new_width = int(size * height / width), size
  else:
    new_height, new_width = size, int(size * width / height)
  resized = np.asarray(
    PIL.Image.fromarray(image).resize(
      (new_width, new_height), _FILTERS[preparation.resample]
    )
  )
  if preparation.crop is not None:
    checks.in_range(1, min(new_height, new_width), crop=preparation.crop)
    top = (new_height - preparation.crop) // 2
    left = (new_width - preparation.crop) // 2
    resized = resized[top:, left:][: preparation.crop, : preparation.crop]
  elif new_height != new_width:
    raise ValueError(
      "images must come out as squares: set crop, or whole=True; got "
      f"{new_height} x {new_width}"
    )
  return normalize(resized, preparation)

"""Images to tokenize: a folder, an archive of arrays, or a TFDS data set.

    images = image_sets.load("photos/", size=256)            # folder
    images = image_sets.load("cifar10.npz", split="test")    # arrays
    images = image_sets.load("tfds:imagenet2012", 256, split="validation")

`load` makes one array of them. `open_images` reads an image when it is asked
for, which is for sets that do not fit into memory:

    images = image_sets.open_images("tfds:imagenet2012", split="train")
    batches = image_batches.build(
      ImageSet(images), batch_size=256, seed=0, crop=RandomResizedCrop(256))

Labels are left out; `tokjax.data.cifar10` reads a labelled set.
"""

import os
import pathlib
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tokjax import checks
from tokjax.data import image_crops
from tokjax.models import images
from tokjax.typing import UInt8

__all__ = ["load", "open_images"]

_TFDS = "tfds:"


class _Read(Sequence):
  """Images that are read one by one when they are asked for."""

  def __init__(
    self,
    source: Sequence[Any] | np.ndarray,
    read: Callable[[Any], np.ndarray],
  ):
    self._source, self._read = source, read

  def __len__(self):
    return len(self._source)

  def __getitem__(self, row):
    if not 0 <= row < len(self):
      raise IndexError(f"row must lie in 0..{len(self) - 1}, got {row}")
    return self._read(self._source[int(row)])


def load(
  name: str | os.PathLike,
  size: int | None = None,
  *,
  split: str | None = None,
  num_images: int | None = None,
  at_most: bool = False,
  resample: str = "bicubic",
  data_dir: str | os.PathLike = "~/tensorflow_datasets",
) -> UInt8[np.ndarray, "N H W 3"]:
  """Reads images into one array.

  Args:
    name: as in `open_images`.
    size: resizes the shorter side to this many pixels and cuts out the centre
      square; None leaves images as they are.
    split: as in `open_images`.
    num_images: how many, evenly spaced in the set, so that one that is sorted
      by class gives of all classes; None for all.
    at_most: take all of a smaller set, instead of an error.
    resample: filter of the resizing; state it beside metrics.
    data_dir: as in `open_images`.

  Returns:
    uint8.

  Raises:
    FileNotFoundError: if there is no such set.
    ValueError: if it is damaged, holds something else or fewer images, or
      images of several shapes come without a `size`.

  Example:
    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.npz"
    >>> np.savez(path, images=np.zeros((5, 8, 6, 3), np.uint8))
    >>> load(path).shape, load(path, size=4, num_images=2).shape
    ((5, 8, 6, 3), (2, 4, 4, 3))
  """
  found = open_images(name, split=split, data_dir=data_dir)
  rows = np.arange(len(found))
  if num_images is not None and not (at_most and num_images > len(found)):
    checks.in_range(1, len(found), num_images=num_images)
    rows = np.arange(num_images) * len(found) // num_images
  if size is not None:
    parts = [
      image_crops.centre_crop(found[row], size, resample=resample)
      for row in rows
    ]
  else:
    parts = [found[row] for row in rows]
  shapes = sorted({part.shape[:2] for part in parts})
  if len(shapes) > 1:
    raise ValueError(
      f"{name} holds images of {len(shapes)} shapes, such as {shapes[0]} and "
      f"{shapes[-1]}: set size, or take them one by one from open_images"
    )
  return np.stack(parts)


def open_images(
  name: str | os.PathLike,
  *,
  split: str | None = None,
  data_dir: str | os.PathLike = "~/tensorflow_datasets",
) -> Sequence:
  """Random access to the images of a set, for loops and for grain.

  Args:
    name: one of
      - a folder of .png and .jpg files, or of folders of them (a class each),
        in the order of their names;
      - an `.npz` file with uint8 [n, height, width, 3 or 1] under `images`, or
        under `<split>_x` with a split;
      - `tfds:NAME`, `tfds:NAME/CONFIG` or with a version behind it: a set that
        TFDS has prepared under `data_dir` as ArrayRecord.
    split: of TFDS, which needs one, or of an `.npz`; of a folder the name of a
      folder in it. None for none.
    data_dir: where TFDS keeps its sets.

  Returns:
    A sequence of uint8 [height, width, 3]; grey images come with their channel
    three times, and files of other colour spaces as red, green, blue.

  Raises:
    FileNotFoundError: if there is no such set.
    ValueError: if it holds something else. A damaged file of a folder is one
      when it is read.

  Example:
    >>> import PIL.Image, tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> PIL.Image.new("L", (5, 4)).save(folder / "a.png")
    >>> [image.shape for image in open_images(folder)]
    [(4, 5, 3)]
  """
  if os.fspath(name).startswith(_TFDS):
    return _open_tfds(os.fspath(name)[len(_TFDS) :], split, data_dir)
  path = pathlib.Path(name).expanduser()
  if path.is_file():
    return _open_npz(path, split)
  if split is not None:
    path = path / split
  if not path.is_dir():
    raise FileNotFoundError(f"no images at {path}: neither folder nor file")
  try:
    paths = images.in_folder(path)
  except ValueError:
    folders = sorted(part for part in path.iterdir() if part.is_dir())
    if not folders:
      raise
    paths = [file for folder in folders for file in images.in_folder(folder)]
  return _Read(paths, images.read)


def _open_npz(path, split):
  key = "images" if split is None else f"{split}_x"
  try:
    with np.load(path, allow_pickle=False) as file:
      checks.one_of(tuple(file.files), key=key)
      found = file[key]
    if found.dtype != np.uint8 or found.ndim != 4 or not found.size:
      raise ValueError(
        f"{key} must be uint8 [n, height, width, channels], got "
        f"{found.dtype} {list(found.shape)}"
      )
    _coloured(found[0])
  except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
    raise ValueError(f"{path} holds no images: {error}") from error
  return _Read(found, _coloured)


def _open_tfds(name, split, data_dir):
  folder = pathlib.Path(data_dir).expanduser() / name.replace(":", "/")
  # TFDS asks the network about a name, even of a set that is on disk: it is
  # given the folder instead.
  found = sorted(p.parent for p in folder.glob("**/dataset_info.json"))
  if not found:
    raise FileNotFoundError(
      f"no data set at {folder}: prepare it where there is a network with "
      f"`tfds build {name} --file_format=array_record` (pip install "
      "tensorflow-datasets tensorflow), or name another data_dir"
    )
  if len(found) > 1:
    several = [str(p.relative_to(folder)) for p in found]
    raise ValueError(f"{folder} holds {several}: name one of them")
  import tensorflow_datasets as tfds  # seconds, and not for the other sets

  builder = tfds.builder_from_directory(found[0])
  checks.one_of(tuple(builder.info.splits), split=split)
  checks.one_of(tuple(builder.info.features), feature="image")
  try:
    source = builder.as_data_source(split)
  except NotImplementedError as error:
    raise ValueError(
      f"{found[0]} is not ArrayRecord, which reading at random needs: prepare "
      f"it with `tfds build {name} --file_format=array_record`"
    ) from error
  return _Read(source, lambda record: _coloured(record["image"]))


def _coloured(image):
  """One channel three times; three as they are."""
  image = np.asarray(image)
  checks.one_of((1, 3), channels=image.shape[-1])
  return np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image

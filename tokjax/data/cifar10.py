"""CIFAR-10 from files: one `.npz` of arrays, or the binary batches.

Both are plain numbers; the pickled "python version" is never read.

- an `.npz` with `train_x` uint8 [n, 32, 32, 3], `train_y` in 0..9, `test_x`,
  `test_y`, which may be a subset;
- a folder with `data_batch_1.bin` ... `data_batch_5.bin` and `test_batch.bin`,
  as in `cifar-10-binary.tar.gz`: one byte of label and 3 x 32 x 32 of pixels
  an image.
"""

import os
import pathlib
import zipfile

import numpy as np

from tokjax.data.image_batches import ImageSet

__all__ = ["CLASSES", "load"]

CLASSES = (
  "airplane",
  "automobile",
  "bird",
  "cat",
  "deer",
  "dog",
  "frog",
  "horse",
  "ship",
  "truck",
)
_SIDE = 32
_RECORD = 1 + 3 * _SIDE**2  # bytes of label and pixels


def load(path: str | os.PathLike) -> tuple[ImageSet, ImageSet]:
  """Reads the training and the test images.

  Args:
    path: the `.npz`, a folder that holds `cifar10.npz`, or one that holds the
      binary batches.

  Returns:
    Training set and test set.

  Raises:
    FileNotFoundError: if there is neither.
    ValueError: if a file is damaged or holds something else; names it.

  Source: Krizhevsky (2009), "Learning multiple layers of features from tiny
    images".
  """
  path = pathlib.Path(path).expanduser()
  if path.is_dir() and (path / "cifar10.npz").is_file():
    path = path / "cifar10.npz"
  if path.is_file():
    return _read_npz(path)
  if not (path / "test_batch.bin").is_file():
    raise FileNotFoundError(
      f"{path} must be an .npz file or a folder with cifar10.npz or "
      "test_batch.bin"
    )
  names = sorted(path.glob("data_batch_*.bin"))
  if not names:
    raise FileNotFoundError(f"{path} has no data_batch_1.bin")
  parts = [_read_binary(name) for name in names]
  train = ImageSet(
    np.concatenate([part.images for part in parts]),
    np.concatenate([part.labels for part in parts]),
    CLASSES,
  )
  return train, _read_binary(path / "test_batch.bin")


def _read_npz(path):
  needed = ("train_x", "train_y", "test_x", "test_y")
  try:
    with np.load(path, allow_pickle=False) as file:
      missing = sorted(set(needed) - set(file.files))
      if missing:
        raise ValueError(f"lacks {missing}")
      arrays = {name: file[name] for name in needed}
      if "classes" in file.files:
        found = tuple(file["classes"].tolist())
        if found != CLASSES:
          raise ValueError(f"classes must be those of CIFAR-10, got {found}")
    return tuple(
      _checked(arrays[f"{part}_x"], arrays[f"{part}_y"])
      for part in ("train", "test")
    )
  except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
    raise ValueError(f"{path} is not CIFAR-10: {error}") from error


def _read_binary(path):
  data = np.fromfile(path, np.uint8)
  if not data.size or data.size % _RECORD:
    raise ValueError(
      f"{path} must hold records of {_RECORD} bytes, got {data.size} bytes"
    )
  rows = data.reshape(-1, _RECORD)
  images = rows[:, 1:].reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)
  try:
    return _checked(np.ascontiguousarray(images), rows[:, 0])
  except ValueError as error:
    raise ValueError(f"{path} is not CIFAR-10: {error}") from error


def _checked(images, labels):
  if images.shape[1:] != (_SIDE, _SIDE, 3):
    raise ValueError(f"images must be [n, 32, 32, 3], got {images.shape}")
  return ImageSet(images, labels.astype(np.int32), CLASSES)

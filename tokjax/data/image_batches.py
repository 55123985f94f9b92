"""Images, with or without labels, and the augmented batches of all steps.

What a step sees depends on the seed and the step alone: a resumed run goes on
with the images, crops and flips that the uninterrupted one would have had.
"""

import dataclasses
import sys
from collections.abc import Sequence

import grain
import numpy as np

from tokjax import checks
from tokjax.data.image_crops import RandomResizedCrop

__all__ = ["ImageSet", "build"]


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
  """Images, and a class for each or for none. Checked when it is made.

  Attributes:
    images: uint8 [n, height, width, C]; or a sequence of uint8 [height, width,
      3] of any size, read when they are asked for, which only crops make a
      batch of.
    labels: integers [n], rows of `classes`; None for images without a class.
    classes: their names.

  Raises:
    ValueError: for another dtype, sizes that disagree or labels out of range.

  Example:
    >>> few = ImageSet(np.zeros((2, 4, 4, 3), np.uint8), np.array([0, 1]),
    ...                ("cat", "dog"))
    >>> few.num_images
    2
  """

  images: np.ndarray | Sequence[np.ndarray]
  labels: np.ndarray | None = None
  classes: tuple[str, ...] = ()

  def __post_init__(self):
    if not len(self.images):
      raise ValueError("images must hold at least one image")
    if isinstance(self.images, np.ndarray):
      checks.has_rank(4, images=self.images)
      if self.images.dtype != np.uint8:
        raise ValueError(f"images must be uint8, got {self.images.dtype}")
    if self.labels is None:
      return
    checks.has_rank(1, labels=self.labels)
    checks.same_size(images=len(self.images), labels=len(self.labels))
    if not np.issubdtype(self.labels.dtype, np.integer):
      raise ValueError(f"labels must be integers, got {self.labels.dtype}")
    last = len(self.classes) - 1
    checks.in_range(0, last, smallest_label=int(self.labels.min()))
    checks.in_range(0, last, largest_label=int(self.labels.max()))

  @property
  def num_images(self) -> int:
    """Number of images."""
    return len(self.images)


def build(
  data: ImageSet,
  *,
  batch_size: int,
  seed: int,
  crop: RandomResizedCrop | None = None,
  shift: int = 0,
  flip: bool = False,
  num_epochs: int | None = None,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.MapDataset:
  """The batches of all steps, made when they are asked for.

  Item `step` holds `images` uint8 [B, height, width, C] and, of a set that has
  them, `labels` int32 [B]. An epoch is images // batch_size steps in a new
  order; what does not fill a batch is left out of it.

  Args:
    data: the images.
    batch_size: images of a step over all processes, a multiple of
      `process_count`.
    seed: of all orders and draws.
    crop: what is cut out of each image, before it is moved or mirrored; None
      takes images whole, which must be an array then.
    shift: each image is moved by up to so many pixels along both axes, the
      same as padding with black and cutting at random; 0 does not move.
    flip: mirror every other image, at random.
    num_epochs: length of the result; None for no end.
    process_index: which process this is, `jax.process_index()`.
    process_count: how many there are; each gets its rows of each batch.

  Returns:
    A `grain.MapDataset` of batch_size / process_count rows per batch.

  Raises:
    ValueError: for settings out of range, or images of any size without
      `crop`.

  Example:
    >>> few = ImageSet(np.zeros((6, 4, 4, 3), np.uint8), np.arange(6) % 2,
    ...                ("cat", "dog"))
    >>> build(few, batch_size=2, seed=0, num_epochs=2)[5]["images"].shape
    (2, 4, 4, 3)

  Source: shifts and flips as in He et al. (2016), "Deep residual learning".
  """
  checks.in_range(1, data.num_images, batch_size=batch_size)
  checks.in_range(0, float("inf"), seed=seed)
  if crop is not None:
    checks.in_range(0, crop.size - 1, shift=shift)
  elif isinstance(data.images, np.ndarray):
    checks.in_range(0, min(data.images.shape[1:3]) - 1, shift=shift)
  else:
    raise ValueError("crop must be set for images that are no array")
  checks.in_range(0, process_count - 1, process_index=process_index)
  checks.divisible(process_count, batch_size=batch_size)
  per_epoch = data.num_images // batch_size
  if num_epochs is not None:
    checks.in_range(1, sys.maxsize // per_epoch, num_epochs=num_epochs)
  share = batch_size // process_count
  first = process_index * share

  def make(step):
    epoch, place = divmod(step, per_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(data.num_images)
    start = place * batch_size + first
    rows = order[start : start + share]
    if crop is None:
      images = data.images[rows]
    else:
      images = np.stack(
        [
          crop.random_map(
            data.images[row],
            np.random.default_rng([seed, epoch, place + 1, first + i + 1]),
          )
          for i, row in enumerate(rows)
        ]
      )
    # All processes draw for the whole batch and take their own.
    rng = np.random.default_rng([seed, epoch, place + 1])
    mirrored = rng.random(batch_size)[first : first + share] < 0.5
    moves = rng.integers(-shift, shift + 1, (batch_size, 2))
    if flip:
      images = np.where(
        mirrored[:, None, None, None], images[:, :, ::-1], images
      )
    if shift:
      images = _moved(images, moves[first : first + share], shift)
    batch = {"images": images}
    if data.labels is not None:
      batch["labels"] = data.labels[rows].astype(np.int32)
    return batch

  num_steps = sys.maxsize if num_epochs is None else num_epochs * per_epoch
  return grain.MapDataset.range(num_steps).map(make)


def _moved(images, moves, shift):
  """Each image moved by its own rows and columns, black at the border."""
  height, width = images.shape[1:3]
  border = ((0, 0), (shift, shift), (shift, shift), (0, 0))
  padded = np.pad(images, border)
  rows = shift + moves[:, :1] + np.arange(height)  # [B, height]
  columns = shift + moves[:, 1:] + np.arange(width)
  batch = np.arange(len(images))[:, None, None]
  return padded[batch, rows[:, :, None], columns[:, None, :]]

"""Large pictures in which one small thing matters, and a reader of tokens.

For the claims of GlobalCom² (an overview and crops) and CATP (prompts of many
images), whose language models are not here. A scene is four squares of the
encoder's image size: three are blurred pieces of photographs, one is an image
of CIFAR-10 in full detail.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
import PIL.Image

from tokjax.benchmarks import reduction_methods
from tokjax.data import image_batches
from tokjax.models import vit
from tokjax.models.reducing import Taps
from tokjax.reduction import types
from tokjax.train import image_classification

__all__ = ["Scenes", "Seen", "compose", "reader", "see"]


class Scenes(NamedTuple):
  """Pictures of 2 x 2 squares.

  Attributes:
    squares: uint8 [B, 4, side, side, 3], in raster order.
    place: int [B], which of them holds the object.
    labels: int [B], its class.
  """

  squares: np.ndarray
  place: np.ndarray
  labels: np.ndarray


def compose(
  objects: image_batches.ImageSet,
  photographs: Sequence[np.ndarray],
  *,
  num_scenes: int,
  seed: int,
) -> Scenes:
  """Sets images among blurred pieces of photographs.

  Args:
    objects: drawn from, each at most once; all of them in their order where
      there are as many as scenes.
    photographs: uint8 [height, width, 3], at least as large as the images.
    num_scenes: B.
    seed: of pieces and places.

  Returns:
    The scenes.
  """
  side = objects.images.shape[1]
  draw = np.random.default_rng(seed)
  chosen = np.arange(num_scenes)
  if num_scenes < objects.num_images:
    chosen = draw.choice(objects.num_images, num_scenes, replace=False)
  squares = np.empty((num_scenes, 4, side, side, 3), np.uint8)
  place = draw.integers(4, size=num_scenes)
  for scene in squares:
    for i in range(4):
      photo = photographs[draw.integers(len(photographs))]
      top, left = (draw.integers(x - side + 1) for x in photo.shape[:2])
      scene[i] = _blurred(photo[top : top + side, left : left + side])
  squares[np.arange(num_scenes), place] = objects.images[chosen]
  return Scenes(squares, place, objects.labels[chosen])


def _blurred(piece):
  image = PIL.Image.fromarray(piece)
  few = image.resize((4, 4), PIL.Image.Resampling.BOX)
  return np.asarray(few.resize(image.size, PIL.Image.Resampling.BICUBIC))


class Seen(NamedTuple):
  """What an encoder makes of images.

  Attributes:
    patches: [B, P, D] as the second last block leaves them.
    before: attention of that block.
    last: attention of the last block.
  """

  patches: jax.Array
  before: reduction_methods.Attention
  last: reduction_methods.Attention


@jax.jit
def see(model: vit.Vit, raw: np.ndarray | jax.Array) -> Seen:
  """Encodes images.

  Args:
    model: an encoder with a class token.
    raw: uint8 [*batch, side, side, 3].

  Returns:
    Patches and attention, batch axes as one.
  """
  last = model.config.num_layers - 1
  both = (last - 1, last)
  taps = Taps(queries=both, keys=both, hidden=(last - 1,))
  raw = raw.reshape(-1, *raw.shape[-3:])
  found = model.encode(image_classification.pixels(raw), taps=taps).taps
  attention = (
    reduction_methods.Attention(found[i].queries, found[i].keys) for i in both
  )
  return Seen(found[last - 1].hidden[:, 1:], *attention)


def reader(
  model: vit.Vit, data: image_batches.ImageSet, num_images: int = 2000
) -> tuple[Callable[[types.Reduced, np.ndarray], float], np.ndarray]:
  """A linear classifier of the mean of tokens, fitted to whole images.

  It stands in for a language model that reads the tokens: it sees no more than
  the mean of those that are kept.

  Args:
    model: an encoder with a class token.
    data: training images.
    num_images: how many of them are used, drawn with seed 0.

  Returns:
    `accuracy(reduced, labels)` in 0..1, and the mean patch of each class,
    float32 [classes, D].
  """
  # A data set may be sorted by class.
  order = np.random.default_rng(0).permutation(data.num_images)[:num_images]
  parts = [
    np.mean(see(model, data.images[order[i : i + 250]]).patches, axis=1)
    for i in range(0, len(order), 250)
  ]
  means = np.concatenate(parts).astype(np.float64)
  labels = data.labels[order]
  x = np.pad(means, ((0, 0), (0, 1)), constant_values=1)
  target = np.eye(len(data.classes))[labels]
  gram = x.T @ x
  gram += 1e-3 * np.trace(gram) / len(gram) * np.eye(len(gram))
  weight = np.linalg.solve(gram, x.T @ target)
  of_class = np.stack(
    [means[labels == c].mean(axis=0) for c in range(len(data.classes))]
  )

  def accuracy(reduced, truth):
    rows = np.asarray(reduced.tokens, np.float64)
    count = np.asarray(reduced.mask).sum(axis=1, keepdims=True)
    scores = (rows.sum(axis=1) / count) @ weight[:-1] + weight[-1]
    return float(np.mean(scores.argmax(axis=1) == truth))

  return accuracy, of_class.astype(np.float32)

"""Training a vision transformer to name what is in an image.

`ImageRun` is what a file of `configs/` returns, `train` runs it:

    model, trained = image_classification.train(get_config())

`make_loss` alone is what `tokjax.train.loop` takes, for another loop or data.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from tokjax import checks
from tokjax.data import cifar10, image_batches
from tokjax.models import vit
from tokjax.train import loop
from tokjax.typing import Array, Float, UInt8

__all__ = [
  "READING",
  "ImageRun",
  "accuracy",
  "make_loss",
  "pixels",
  "train",
]

# Batches are small and made in no time; grain's own buffer is 500.
READING = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)


@dataclasses.dataclass(unsafe_hash=True)
class ImageRun:
  """A training run: model, data, loop."""

  model: vit.VitConfig  # num_outputs is the number of classes
  data: str = "cifar10"  # what `tokjax.data.cifar10.load` takes
  batch_size: int = 128  # images of a step, over all devices and processes
  shift: int = 4  # pixels an image is moved at most
  flip: bool = True  # mirror every other image
  label_smoothing: float = 0.1  # share of the target spread over all classes
  trainer: loop.TrainConfig = dataclasses.field(
    default_factory=lambda: loop.TrainConfig(num_steps=1000)
  )
  seed: int = 0  # of weights, orders and draws


def train(run: ImageRun) -> tuple[vit.Vit, loop.Trained]:
  """Runs a config: reads the data, trains, tests.

  Args:
    run: the settings; with a folder of the trainer it can be resumed.

  Returns:
    The model, and how the loop ended; its metrics hold `accuracy` on the test
    images.

  Raises:
    FileNotFoundError: if the data is not there.
    ValueError: if data and model do not fit each other, and as `loop.train`.
  """
  data, test = cifar10.load(run.data)
  config = run.model
  checks.same_size(num_outputs=config.num_outputs, classes=len(data.classes))
  checks.same_size(
    image_size=config.image_size, image_height=data.images.shape[1]
  )
  model_key, run_key = jax.random.split(jax.random.key(run.seed))
  batches = image_batches.build(
    data,
    batch_size=run.batch_size,
    seed=run.seed,
    shift=run.shift,
    flip=run.flip,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  trained = loop.train(
    vit.Vit(config, rngs=nnx.Rngs(model_key)),
    make_loss(label_smoothing=run.label_smoothing),
    iter(batches.to_iter_dataset(READING)),
    run.trainer,
    key=run_key,
    evaluate=lambda model, step: {"accuracy": accuracy(model, test)},
  )
  return trained.state.model, trained


def make_loss(
  *, label_smoothing: float = 0.0
) -> Callable[[Any, Mapping[str, Array], Any], tuple[Array, dict[str, Array]]]:
  """The loss that `tokjax.train.loop` takes.

  Cross-entropy of the model's logits with (1 - label_smoothing) on the label
  plus label_smoothing / classes on every class, averaged over the batch.

  Args:
    label_smoothing: 0..1.

  Returns:
    `loss_fn(model, batch, key) -> (loss, {"accuracy": ...})` for batches of
    `image_batches.build`; the key is not used. Float32.

  Raises:
    ValueError: for a share outside 0..1.

  Example:
    >>> loss_fn = make_loss()
    >>> batch = {"images": np.zeros((2, 1, 1, 3), np.uint8),
    ...          "labels": np.array([0, 1])}
    >>> loss, metrics = loss_fn(lambda x: x[:, 0, 0, :2], batch, None)
    >>> round(float(loss), 4), float(metrics["accuracy"])
    (0.6931, 0.5)

  Source: Szegedy et al. (2016), "Rethinking the Inception architecture", label
    smoothing.
  """
  checks.in_range(0, 1, label_smoothing=label_smoothing)

  def loss_fn(model, batch, key):
    del key
    logits = model(pixels(batch["images"])).astype(jnp.float32)
    target = jax.nn.one_hot(batch["labels"], logits.shape[-1])
    target = optax.smooth_labels(target, label_smoothing)
    loss = jnp.mean(optax.softmax_cross_entropy(logits, target))
    hit = jnp.argmax(logits, axis=-1) == batch["labels"]
    return loss, {"accuracy": jnp.mean(hit.astype(jnp.float32))}

  return loss_fn


def pixels(
  raw: UInt8[Array, "B height width C"] | np.ndarray,
) -> Float[Array, "B height width C"]:
  """8-bit pixels in -1..1, as the processor of ViT has them.

  Args:
    raw: on the host or on devices.

  Returns:
    float32.

  Example:
    >>> pixels(np.full((1, 1, 1, 3), 255, np.uint8)).tolist()
    [[[[1.0, 1.0, 1.0]]]]
  """
  return jnp.asarray(raw, jnp.float32) / 127.5 - 1


def accuracy(
  model: Any,
  data: image_batches.ImageSet,
  *,
  batch_size: int = 500,
  predict: Callable[[Any, Array], Array] | None = None,
) -> float:
  """Share of images whose class has the highest logit.

  Args:
    model: `Vit`, or what `predict` takes.
    data: the images; the last batch is padded, so that one program serves all.
    batch_size: images at a time.
    predict: `predict(model, images)` gives logits [B, classes] of normalised
      images; None calls the model. Pass the same function to compile it once.

  Returns:
    A number in 0..1.

  Raises:
    ValueError: if `batch_size` is below 1.

  Example:
    >>> data = image_batches.ImageSet(
    ...   np.zeros((3, 1, 1, 3), np.uint8), np.array([0, 0, 1]), ("a", "b"))
    >>> always_a = lambda bias, x: jnp.tile(bias, (len(x), 1))
    >>> bias = jnp.array([0.5, 0.0])
    >>> round(accuracy(bias, data, predict=always_a), 4)
    0.6667
  """
  checks.in_range(1, float("inf"), batch_size=batch_size)
  predict = _logits if predict is None else predict
  hits = 0
  for start in range(0, data.num_images, batch_size):
    chosen = data.images[start : start + batch_size]
    labels = data.labels[start : start + batch_size]
    missing = batch_size - len(chosen) if start else 0
    chosen = np.pad(chosen, ((0, missing), (0, 0), (0, 0), (0, 0)))
    found = _classes(model, chosen, predict=predict)
    hits += int(np.sum(np.asarray(found)[: len(labels)] == labels))
  return hits / data.num_images


def _logits(model, x):
  return model(x)


@functools.partial(jax.jit, static_argnames="predict")
def _classes(model, images, *, predict):
  return jnp.argmax(predict(model, pixels(images)), axis=-1)

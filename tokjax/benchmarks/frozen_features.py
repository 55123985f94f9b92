"""Training tokenizers on features that a frozen encoder made once.

The encoder costs several times what the small tokenizers of claims do, so
their features are kept on the host, in half precision.
"""

from collections.abc import Mapping
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np

from tokjax.models import vit
from tokjax.train import image_classification, loop
from tokjax.train.optimizer import OptimizerConfig
from tokjax.typing import Float

__all__ = ["fit", "of_images"]


def of_images(
  teacher: vit.Vit, images: np.ndarray, *, batch_size: int = 250
) -> tuple[Float[np.ndarray, "n P D"], Float[np.ndarray, "n D"]]:
  """Patches and class tokens of images, after the last norm, float16.

  Args:
    teacher: an encoder with a class token.
    images: 8-bit.
    batch_size: images at a time.

  Returns:
    Patches, and class tokens.
  """
  found = [
    jax.tree.map(np.asarray, _encode(teacher, images[i : i + batch_size]))
    for i in range(0, len(images), batch_size)
  ]
  patches, classes = zip(*found, strict=True)
  return np.concatenate(patches), np.concatenate(classes)


@jax.jit
def _encode(teacher, raw):
  tokens = teacher.encode(image_classification.pixels(raw)).tokens
  tokens = teacher.normalize(tokens).astype(jnp.float16)
  return tokens[:, teacher.config.num_special :], tokens[:, 0]


def fit(
  model: Any,
  state: Any,
  arrays: Mapping[str, np.ndarray],
  *,
  num_steps: int,
  seed: int,
  batch_size: int = 64,
  learning_rate: float = 2e-3,
) -> tuple[Any, Any]:
  """Trains a tokenizer of features by its own losses.

  Args:
    model: the tokenizer.
    state: of its codebooks.
    arrays: "features", and what else its call takes, by name; rows on axis 0.
    num_steps: of one batch.
    seed: of orders and draws.
    batch_size: rows of a step.
    learning_rate: its peak.

  Returns:
    The trained tokenizer and its state.
  """
  rows = len(arrays["features"])

  def make(step):
    epoch, place = divmod(step, rows // batch_size)
    order = np.random.default_rng([seed, epoch]).permutation(rows)
    chosen = order[place * batch_size : (place + 1) * batch_size]
    return {name: x[chosen] for name, x in arrays.items()}

  batches = grain.MapDataset.range(num_steps).map(make)
  optimizer = OptimizerConfig(
    name="muon", learning_rate=learning_rate, warmup_steps=num_steps // 10
  )
  done = loop.train(
    model,
    _loss,
    iter(batches.to_iter_dataset(image_classification.READING)),
    loop.TrainConfig(num_steps=num_steps, optimizer=optimizer, log_every=100),
    key=jax.random.key(seed),
    buffers=state,
  )
  return jax.device_get((done.state.model, done.state.buffers))


def _loss(model, state, batch, key):
  given = {name: x.astype(jnp.float32) for name, x in batch.items()}
  features = given.pop("features")
  found, state = model(features, state, train=True, key=key, **given)
  loss = sum(found.losses.values(), jnp.float32(0))
  return loss, {**found.stats, **found.losses}, state

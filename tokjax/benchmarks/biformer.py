"""Routing, windows and full attention in one network, at equal FLOPs.

Networks of two stages, 16 x 16 and 8 x 8 tokens of 32 x 32 pixels, learn to
name images. There is no convolution in front of a block, only the published one
beside attention. They differ in what a token reads:

- "routing": the 4 closest of 16 regions, 64 and 16 tokens in the two stages;
- "window": its own of 4 regions, as many tokens;
- "full": all tokens, in a network that is narrower, as this costs more; so
  narrow that it costs 8 % more than the others.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from tokjax import checks
from tokjax.benchmarks.trained_vit import Row
from tokjax.data import cifar10, image_batches
from tokjax.models import biformer, biformer_shapes
from tokjax.models.biformer import BiFormerConfig
from tokjax.train import image_classification, loop
from tokjax.train.optimizer import OptimizerConfig

__all__ = ["NETWORKS", "BiFormerRun", "claimed", "network", "train"]

NETWORKS = ("routing", "window", "full")


@dataclasses.dataclass(frozen=True)
class BiFormerRun:
  """One comparison.

  Attributes:
    dataset: folder with CIFAR-10.
    seed: of weights and batches.
    num_steps: of training, of each network.
    batch_size: images of a step.
    learning_rate: at its peak.
  """

  dataset: str
  seed: int = 0
  num_steps: int = 1500
  batch_size: int = 32
  learning_rate: float = 2e-3


def network(name: str) -> BiFormerConfig:
  """The shape of a network of the comparison.

  Full attention is one window of the whole map, so that scale, heads and
  convolutions are those of the others.

  Args:
    name: one of `NETWORKS`.

  Raises:
    ValueError: for another name.

  Example:
    >>> [biformer_shapes.flops(network(x), 32) // 10**6 for x in NETWORKS]
    [29, 29, 32]
  """
  checks.one_of(NETWORKS, name=name)
  routing = BiFormerConfig(
    widths=(32, 64),
    depths=(2, 2),
    attention=("routing", "routing"),
    num_regions=(4, 4),
    top_k=(4, 4),
    head_dim=16,
    position_size=0,
    stem_stride=2,
    num_outputs=len(cifar10.CLASSES),
  )
  windows = {"attention": ("window", "window"), "top_k": (1, 1)}
  changes = {
    "routing": {},
    "window": {**windows, "num_regions": (2, 2)},
    "full": {
      **windows,
      "num_regions": (1, 1),
      "widths": (26, 52),
      "head_dim": 13,
    },
  }
  return dataclasses.replace(routing, **changes[name])


def train(
  run: BiFormerRun, config: BiFormerConfig, *, progress: bool = True
) -> loop.Trained:
  """Trains a network on the training images.

  Args:
    run: data and settings.
    config: the network.
    progress: log the loss now and then.

  Returns:
    How it ended; its metrics hold `accuracy` on the test images.

  Raises:
    FileNotFoundError: if the data is not there.
  """
  data, test = cifar10.load(run.dataset)
  key, run_key = jax.random.split(jax.random.key(run.seed))
  model = jax.jit(lambda key: biformer.BiFormer(config, rngs=nnx.Rngs(key)))(
    key
  )
  batches = image_batches.build(
    data, batch_size=run.batch_size, seed=run.seed, shift=4, flip=True
  )
  optimizer = OptimizerConfig(
    learning_rate=run.learning_rate,
    warmup_steps=run.num_steps // 10,
    weight_decay=0.05,
  )
  return loop.train(
    model,
    _loss,
    iter(batches.to_iter_dataset(image_classification.READING)),
    loop.TrainConfig(
      run.num_steps, optimizer, log_every=100 if progress else 0
    ),
    key=run_key,
    buffers=model.init_state(),
    evaluate=lambda model, state, step: {
      "accuracy": image_classification.accuracy(
        (model, state), test, predict=_predict
      )
    },
  )


def claimed(run: BiFormerRun, *, progress: bool = True) -> dict[str, Row]:
  """Trains the networks of `NETWORKS`.

  Args:
    run: data and settings.
    progress: log the loss now and then, and print when one is done.

  Returns:
    Rows by name: "accuracy" on the test images, "mflops" of one image, where
    multiply and add count apart.
  """
  rows = {}
  for name in NETWORKS:
    config = network(name)
    trained = train(run, config, progress=progress)
    mflops = biformer_shapes.flops(config, 32) / 1e6
    rows[name] = Row({**trained.metrics, "mflops": mflops})
    if progress:
      print(name, rows[name].metrics, flush=True)
  return rows


def _loss(model, state, batch, key):
  """Cross-entropy with smoothed labels, as `image_classification` has it."""
  images = image_classification.pixels(batch["images"])
  logits, state = model(images, state, train=True, key=key)
  logits = logits.astype(jnp.float32)
  target = jax.nn.one_hot(batch["labels"], logits.shape[-1])
  target = optax.smooth_labels(target, 0.1)
  loss = jnp.mean(optax.softmax_cross_entropy(logits, target))
  hit = jnp.argmax(logits, axis=-1) == batch["labels"]
  return loss, {"accuracy": jnp.mean(hit, dtype=jnp.float32)}, state


def _predict(pair, images):
  model, state = pair
  return model(images, state)[0]

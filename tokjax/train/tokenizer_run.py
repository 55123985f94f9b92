"""Training a tokenizer of images.

`TokenizerRun` is what a file of `configs/` returns, `train` runs it:

    done = train(get_config("cifar10"))
    found, _ = done.tokenizer(images, done.state)

The tokenizer is any of `tokjax.tokenizers` that reads images, features of a
frozen encoder, or both (see `tokjax.tokenizers.types`).
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokjax import checks
from tokjax.data import cifar10, image_batches, image_sets
from tokjax.data.image_batches import ImageSet
from tokjax.data.image_crops import RandomResizedCrop
from tokjax.eval import image_quality, lpips
from tokjax.models import arrays, vit, vit_weights
from tokjax.parallel import meshes, processes
from tokjax.tokenizers import adversarial, two_stage
from tokjax.tokenizers.adversarial import AdversarialConfig
from tokjax.tokenizers.discriminator import Discriminator, DiscriminatorConfig
from tokjax.train import image_classification, loop
from tokjax.typing import Array, Float, Int, UInt8

__all__ = [
  "TokenizerRun",
  "Trained",
  "evaluate",
  "features",
  "load",
  "save",
  "train",
]


@dataclasses.dataclass(unsafe_hash=True)
class TokenizerRun:
  """A training run: tokenizer, data, loop."""

  tokenizer: Any  # a config of `tokjax.tokenizers` with a method `build`
  data: str = "cifar10"  # what `cifar10.load` takes, `image_sets` with crop
  crop: RandomResizedCrop | None = None  # None: data is CIFAR-10
  splits: tuple[str, str] = ("train", "test")  # of the set that crop needs
  num_test: int = 1000  # images of the second at most, spread over it
  teacher: str = ""  # folder of a ViT whose patches are the features read
  start: str = ""  # file of a tokenizer of the same shape to begin with
  proxy: str = ""  # file of the VQGAN that a `two_stage` begins with
  batch_size: int = 64  # images of a step, over all devices and processes
  shift: int = 0  # pixels an image is moved at most
  flip: bool = True  # mirror every other image
  adversarial: AdversarialConfig | None = None  # None: no such loss
  discriminator: DiscriminatorConfig = dataclasses.field(
    default_factory=DiscriminatorConfig
  )
  perceptual: str = ""  # file of the weights of LPIPS (VGG16); "": no such loss
  perceptual_weight: float = 1.0
  mesh: meshes.MeshConfig = dataclasses.field(default_factory=meshes.MeshConfig)
  trainer: loop.TrainConfig = dataclasses.field(
    default_factory=lambda: loop.TrainConfig(num_steps=1000)
  )
  seed: int = 0  # of weights, orders and draws


class Trained(NamedTuple):
  """A trained tokenizer.

  Attributes:
    tokenizer: the module, with averaged parameters where they are kept.
    state: of its codebooks.
    run: how the loop ended.
  """

  tokenizer: Any
  state: Any
  run: loop.Trained


class _Buffers(NamedTuple):
  """What the loss is handed from step to step.

  Attributes:
    state: of the tokenizer.
    teacher: the frozen encoder, None without one.
    perceptual: the weights of LPIPS, None without them.
    game: of the adversarial loss.
    step: updates done.
  """

  state: Any
  teacher: vit.Vit | None
  perceptual: lpips.LpipsWeights | None
  game: adversarial.AdversarialState
  step: Int[Array, ""]


class _Model(NamedTuple):
  """What is trained; no discriminator without an adversarial loss."""

  tokenizer: Any
  discriminator: Discriminator | None


def train(
  run: TokenizerRun, *, devices: Sequence[jax.Device] | None = None
) -> Trained:
  """Runs a config: reads the data, trains, measures on test images.

  With several processes each calls it, reads its rows of every batch and gets
  the whole tokenizer on its own devices.

  Args:
    run: the settings; with a folder of the trainer it can be resumed.
    devices: what the mesh is made of; None for all.

  Returns:
    The tokenizer and how the loop ended; its metrics are those of `evaluate`.

  Raises:
    FileNotFoundError: if data, or a file that the settings name, is not there.
    ValueError: if settings do not fit each other, and as `loop.train`.
  """
  data, test = _images(run)
  tokenizer, state = _build(run)
  if ("features" in tokenizer.reads) != bool(run.teacher):
    raise ValueError(
      "teacher must name a folder exactly if the tokenizer reads features; it "
      f"reads {tokenizer.reads}, got {run.teacher!r}"
    )
  teacher = vit_weights.load(run.teacher) if run.teacher else None
  batches = image_batches.build(
    data,
    batch_size=run.batch_size,
    seed=run.seed,
    crop=run.crop,
    shift=run.shift,
    flip=run.flip,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  model = _Model(tokenizer, _discriminator(run, tokenizer))
  buffers = _Buffers(
    state,
    teacher,
    _perceptual(run, tokenizer),
    adversarial.init_state(),
    jnp.int32(0),
  )
  trained = loop.train(
    model,
    functools.partial(_loss, run.adversarial, run.perceptual_weight),
    iter(batches.to_iter_dataset(image_classification.READING)),
    run.trainer,
    key=jax.random.fold_in(jax.random.key(run.seed), 1),
    mesh=run.mesh.make(devices),
    buffers=buffers,
    evaluate=lambda model, held, step: evaluate(
      model.tokenizer, held.state, test, teacher=held.teacher
    ),
  )
  averaged = run.trainer.average_decay
  model = trained.state.average if averaged else trained.state.model
  held = trained.state.buffers
  if not trained.metrics and not trained.preempted:  # nothing was left to do
    found = evaluate(model.tokenizer, held.state, test, teacher=held.teacher)
    trained = trained._replace(metrics=found)
  tokenizer, state = processes.whole((model.tokenizer, held.state))
  return Trained(tokenizer, state, trained)


def _images(run):
  """The training set, and the images of the test set."""
  if run.crop is None:
    data, test = cifar10.load(run.data)
    return data, test.images
  train, test = run.splits
  data = ImageSet(image_sets.open_images(run.data, split=train))
  return data, image_sets.load(
    run.data,
    split=test,
    size=run.crop.size,
    num_images=run.num_test,
    at_most=True,
  )


def _perceptual(run, tokenizer):
  if not run.perceptual:
    return None
  _check_images(tokenizer, perceptual=run.perceptual)
  return lpips.read_weights(run.perceptual)


def _check_images(tokenizer, **setting):
  if "images" not in tokenizer.reads:
    ((name, value),) = setting.items()
    raise ValueError(
      f"{name} must be empty for a tokenizer that reads {tokenizer.reads}, "
      f"got {value!r}"
    )


def _discriminator(run, tokenizer):
  if run.adversarial is None:
    return None
  _check_images(tokenizer, adversarial=run.adversarial)
  key = jax.random.fold_in(jax.random.key(run.seed), 2)
  return jax.jit(lambda: Discriminator(run.discriminator, rngs=nnx.Rngs(key)))()


def _loss(config, perceptual_weight, model, buffers, batch, key):
  inputs = _inputs(model.tokenizer, buffers.teacher, batch["images"])
  found, state = model.tokenizer(*inputs, buffers.state, train=True, key=key)
  losses, metrics = found.losses, {**found.stats, **found.losses}
  buffers = buffers._replace(state=state)
  images = image_classification.pixels(batch["images"])
  if buffers.perceptual is not None:
    weights = jax.lax.stop_gradient(buffers.perceptual)
    seen = (images + 1) / 2, (found.output + 1) / 2
    distance = jnp.mean(lpips.lpips(weights, *seen, precision=None))
    losses = {**losses, "perceptual": perceptual_weight * distance}
    metrics = {**metrics, **losses}
  if config is not None:
    sides, game = adversarial.losses(
      config,
      model.discriminator,
      images,
      found.output,
      buffers.game,
      step=buffers.step,
    )
    losses = {
      **losses,
      "generator": sides.generator,
      "discriminator": sides.discriminator,
    }
    metrics = {**metrics, **sides.stats, **losses}
    buffers = buffers._replace(game=game)
  loss = sum(losses.values(), jnp.float32(0))
  return loss, metrics, buffers._replace(step=buffers.step + 1)


def _inputs(model, teacher, raw):
  """What the tokenizer reads of 8-bit images, without a gradient."""
  images = image_classification.pixels(raw)
  made = {
    "images": lambda: images,
    "features": lambda: jax.lax.stop_gradient(features(teacher, images)),
  }
  return [made[name]() for name in model.reads]


def features(
  teacher: vit.Vit, images: Float[Array, "B height width 3"]
) -> Float[Array, "B P D"]:
  """The patches of images as a frozen encoder sees them, after its last norm.

  Args:
    teacher: the encoder.
    images: in -1..1.

  Returns:
    One row per patch, without the tokens beside the patches.

  Example:
    >>> config = vit.VitConfig(image_size=4, patch_size=2, width=4,
    ...                        num_layers=1, num_heads=1, mlp_width=4)
    >>> teacher = jax.jit(lambda: vit.Vit(config, rngs=nnx.Rngs(0)))()
    >>> jax.jit(features)(teacher, jnp.ones((1, 4, 4, 3))).shape
    (1, 4, 4)
  """
  tokens = teacher.encode(images).tokens
  return teacher.normalize(tokens[:, teacher.config.num_special :])


def evaluate(
  tokenizer: Any,
  state: Any,
  images: UInt8[np.ndarray, "n height width 3"],
  *,
  teacher: vit.Vit | None = None,
  batch_size: int = 250,
) -> dict[str, float]:
  """How well test images come back.

  Args:
    tokenizer: the module.
    state: of its codebooks.
    images: 8-bit.
    teacher: the encoder whose features it reads, if it does.
    batch_size: images at a time, at most; what fills no batch is left out.

  Returns:
    Means over the batches of `stats` and `losses` of the tokenizer, and
    "psnr" in dB, mean over images, if the output is images.

  Raises:
    ValueError: if there are no images.
  """
  checks.in_range(1, float("inf"), num_images=len(images))
  batch_size = min(batch_size, len(images))
  rows = []
  for start in range(0, len(images) - batch_size + 1, batch_size):
    chosen = images[start : start + batch_size]
    rows.append(jax.device_get(_measure(tokenizer, state, teacher, chosen)))
  return {name: float(np.mean([r[name] for r in rows])) for name in rows[0]}


@jax.jit
def _measure(model, state, teacher, raw) -> Mapping[str, Array]:
  inputs = _inputs(model, teacher, raw)
  found, _ = model(*inputs, state)
  measured = {**found.stats, **found.losses}
  if found.output.shape == raw.shape:
    images, output = raw / 255, (jnp.clip(found.output, -1, 1) + 1) / 2
    psnr = image_quality.psnr(images, output.astype(jnp.float32))
    measured["psnr"] = jnp.mean(psnr)
  return measured


def save(path: str, trained: Trained) -> None:
  """Writes parameters and codebooks, whole or not at all; see `load`.

  Args:
    path: a safetensors file.
    trained: what `train` returned.
  """
  arrays.save(path, (trained.tokenizer, trained.state))


def load(path: str, run: TokenizerRun) -> tuple[Any, Any]:
  """Reads what `save` wrote.

  Args:
    path: the file, or a folder of a run with `model/tokenizer.safetensors`.
    run: the config it was trained with.

  Returns:
    The module and the state of its codebooks.

  Raises:
    FileNotFoundError: if it is not there.
    ValueError: if it is of a tokenizer of another shape.
  """
  file = pathlib.Path(path)
  if file.is_dir():
    file = file / "model" / "tokenizer.safetensors"
  return arrays.load(file, jax.eval_shape(functools.partial(_fresh, run)))


def _build(run):
  if run.start:
    return load(run.start, run)
  tokenizer, state = jax.jit(functools.partial(_fresh, run))()
  if not run.proxy:
    return tokenizer, state
  if not isinstance(run.tokenizer, two_stage.TwoStageConfig):
    raise ValueError(
      f"proxy must be empty for {type(run.tokenizer).__name__}, got"
      f" {run.proxy!r}"
    )
  alone = dataclasses.replace(run, tokenizer=run.tokenizer.proxy)
  return tokenizer.with_proxy(*load(run.proxy, alone), state)


def _fresh(run):
  model_key, state_key = jax.random.split(jax.random.key(run.seed))
  tokenizer = run.tokenizer.build(nnx.Rngs(model_key))
  return tokenizer, tokenizer.init_state(state_key)

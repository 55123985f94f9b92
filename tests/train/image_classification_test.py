"""A tiny vision transformer learns tiny images, and goes on where it was."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.data import cifar10, image_batches
from tokjax.models.reducing import Reduction
from tokjax.models.vit import VitConfig
from tokjax.reduction import types
from tokjax.train import image_classification
from tokjax.train.image_classification import ImageRun
from tokjax.train.loop import TrainConfig
from tokjax.train.optimizer import OptimizerConfig

MODEL = VitConfig(
  image_size=32,
  patch_size=16,
  width=16,
  num_layers=1,
  num_heads=2,
  mlp_width=16,
  num_outputs=10,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Ten flat colours with noise, one a class."""
  folder = tmp_path_factory.mktemp("data")
  rng = np.random.default_rng(0)
  colours = np.array([*np.ndindex(2, 2, 2), (0.5, 0.5, 0.5), (0, 0.5, 1)])
  colours = 40 + 170 * colours
  arrays = {}
  for name, count in (("train", 160), ("test", 40)):
    labels = np.arange(count) % 10
    noise = rng.normal(0, 10, (count, 32, 32, 3))
    x = np.clip(colours[labels][:, None, None] + noise, 0, 255)
    arrays |= {f"{name}_x": x.astype(np.uint8), f"{name}_y": labels}
  np.savez(folder / "cifar10.npz", **arrays)
  return ImageRun(
    model=MODEL,
    data=str(folder),
    batch_size=16,
    shift=1,
    trainer=TrainConfig(
      num_steps=60,
      optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5),
      log_every=0,
    ),
  )


def with_trainer(run, **changes):
  return dataclasses.replace(
    run, trainer=dataclasses.replace(run.trainer, **changes)
  )


@pytest.fixture(scope="module")
def learned(run):
  return image_classification.train(run)


def test_learns_ten_colours(run, learned):
  model, trained = learned
  assert trained.metrics["accuracy"] > 0.9
  _, test = cifar10.load(run.data)
  found = image_classification.accuracy(model, test, batch_size=7)
  assert found == trained.metrics["accuracy"]


def test_a_stopped_run_goes_on_bit_for_bit(run, tmp_path):
  _, whole = image_classification.train(with_trainer(run, num_steps=6))
  # The schedule depends on the length of the run, so the same length, cut.
  settings = {"num_steps": 6, "folder": str(tmp_path / "run"), "save_every": 3}

  class Stop(Exception):
    pass

  def stop_after(count, build):
    def broken(*args, **kwargs):
      def check(step):
        if step >= count:
          raise Stop
        return batches[step]

      batches = build(*args, **kwargs)
      return image_batches.grain.MapDataset.range(9).map(check)

    return broken

  with pytest.MonkeyPatch.context() as patch:
    broken = stop_after(5, image_batches.build)
    patch.setattr(image_batches, "build", broken)
    with pytest.raises(Exception):  # noqa: B017  (grain wraps it)
      image_classification.train(with_trainer(run, **settings))
  assert (tmp_path / "run" / "checkpoints" / "3").is_dir()
  _, rest = image_classification.train(with_trainer(run, **settings))
  jax.tree.map(
    np.testing.assert_array_equal, rest.state.model, whole.state.model
  )


def fixed_logits(logits):
  return lambda x: jnp.asarray(logits) + 0 * x[:, 0, 0, :1]


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_loss_is_smoothed_cross_entropy(smoothing):
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(6, 4)).astype(np.float32)
  labels = rng.integers(0, 4, 6)
  batch = {"images": np.zeros((6, 1, 1, 3), np.uint8), "labels": labels}
  loss_fn = image_classification.make_loss(label_smoothing=smoothing)
  loss, metrics = jax.jit(
    lambda batch, key: loss_fn(fixed_logits(logits), batch, key)
  )(batch, jax.random.key(0))
  want = 0.0
  for row, label in zip(logits.astype(float), labels, strict=True):
    total = math.log(sum(math.exp(x) for x in row))
    for c in range(4):
      share = smoothing / 4 + (1 - smoothing) * (c == label)
      want += share * (total - row[c]) / 6
  np.testing.assert_allclose(loss, want, rtol=1e-5)
  hits = np.mean(logits.argmax(1) == labels)
  np.testing.assert_allclose(metrics["accuracy"], hits, rtol=1e-6)


def test_pixels_are_minus_one_to_one():
  raw = np.array([0, 51, 255], np.uint8).reshape(1, 1, 1, 3)
  got = jax.jit(image_classification.pixels)(raw)
  np.testing.assert_allclose(got[0, 0, 0], [-1, -0.6, 1], atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 5, 20])
def test_accuracy_counts_every_image_once(batch_size):
  rng = np.random.default_rng(1)
  images = rng.integers(0, 256, (13, 1, 1, 3)).astype(np.uint8)
  data = image_batches.ImageSet(
    images, rng.integers(0, 3, 13), ("red", "green", "blue")
  )
  want = np.mean(images[:, 0, 0].argmax(1) == data.labels)
  got = image_classification.accuracy(
    jnp.ones(3), data, batch_size=batch_size, predict=_brightest
  )
  assert got == pytest.approx(want)


def _brightest(scale, x):
  return scale[None] * x[:, 0, 0]


def _first_tokens(layer, x, keys, size, mask):
  return types.selected(x, jnp.tile(jnp.arange(3), (len(x), 1)))


def _reduced(model, x):
  return model(x, reductions=(Reduction(_first_tokens, (0,)),))


def test_accuracy_of_a_model_that_is_reduced(run, learned):
  model, _ = learned
  _, test = cifar10.load(run.data)
  found = image_classification.accuracy(model, test, predict=_reduced)
  assert 0.3 < found <= 1


@pytest.mark.unchecked
def test_settings_that_do_not_fit_are_named(run):
  with pytest.raises(ValueError, match="num_outputs=9, classes=10"):
    model = dataclasses.replace(MODEL, num_outputs=9)
    image_classification.train(dataclasses.replace(run, model=model))
  with pytest.raises(ValueError, match="image_size=16, image_height=32"):
    model = dataclasses.replace(MODEL, image_size=16)
    image_classification.train(dataclasses.replace(run, model=model))
  with pytest.raises(ValueError, match="label_smoothing must lie in 0..1"):
    image_classification.make_loss(label_smoothing=1.5)
  with pytest.raises(ValueError, match="batch_size must lie in 1"):
    _, test = cifar10.load(run.data)
    image_classification.accuracy(None, test, batch_size=0)

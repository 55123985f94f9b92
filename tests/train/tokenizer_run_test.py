"""Tokenizers learn tiny pictures, resume, and play against a discriminator."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from flax import nnx

from tests.tokenizers import two_stage_test
from tests.tokenizers.tiny_tokenizer import built
from tests.train.tiny_tokenizer_run import CONFIG, flat_colours, with_trainer
from tokjax.data.image_crops import RandomResizedCrop
from tokjax.models import vit, vit_weights
from tokjax.models.weights import write_tensors
from tokjax.parallel.meshes import MeshConfig
from tokjax.tokenizers import two_stage
from tokjax.tokenizers.adversarial import AdversarialConfig
from tokjax.tokenizers.discriminator import DiscriminatorConfig
from tokjax.tokenizers.types import Reconstructed
from tokjax.train import tokenizer_run
from tokjax.train.optimizer import OptimizerConfig

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  return flat_colours(tmp_path_factory.mktemp("data"))


def same(got, want):
  jax.tree.map(
    lambda g, w: np.testing.assert_array_equal(np.asarray(g), np.asarray(w)),
    got,
    want,
  )


def test_learns_saves_and_loads(run, tmp_path):
  done = tokenizer_run.train(run)
  # All grey has a loss of .52.
  assert done.run.metrics["pixels"] < 0.4
  assert done.run.metrics["usage"] > 0.4
  want = -10 * np.log10(done.run.metrics["pixels"] / 4)
  assert done.run.metrics["psnr"] > want - 0.5  # a mean of logarithms
  path = tmp_path / "tokenizer.safetensors"
  tokenizer_run.save(path, done)
  same(tokenizer_run.load(path, run), (done.tokenizer, done.state))
  other = dataclasses.replace(
    run, tokenizer=dataclasses.replace(CONFIG, num_tokens=3)
  )
  with pytest.raises(ValueError, match="token_positions: expected"):
    tokenizer_run.load(path, other)
  again = dataclasses.replace(run, start=str(path))
  started = tokenizer_run.train(with_trainer(again, num_steps=1))
  assert started.run.metrics["pixels"] < 0.4


def test_resumes_bit_for_bit_with_averages(run, tmp_path):
  averaged = with_trainer(run, num_steps=4, average_decay=0.5)
  folder = with_trainer(averaged, num_steps=2, folder=str(tmp_path))
  want = tokenizer_run.train(averaged)
  tokenizer_run.train(folder)
  got = tokenizer_run.train(with_trainer(folder, num_steps=4))
  same((got.tokenizer, got.state), (want.tokenizer, want.state))
  same(want.tokenizer, want.run.state.average.tokenizer)


def test_a_discriminator_plays_from_its_step_on(run):
  game = dataclasses.replace(
    with_trainer(run, num_steps=2),
    adversarial=AdversarialConfig(weight=0.1, start_step=1, lecam_weight=0.1),
    discriminator=DiscriminatorConfig(width=4, num_layers=1, groups=4),
  )
  done = tokenizer_run.train(game)
  assert int(done.run.state.buffers.step) == 2
  first = tokenizer_run.train(with_trainer(game, num_steps=1))
  late = dataclasses.replace(
    game, adversarial=dataclasses.replace(game.adversarial, start_step=9)
  )
  idle = tokenizer_run.train(with_trainer(late, num_steps=2))
  moved = lambda a, b: max(  # noqa: E731
    float(jnp.abs(x - y).max())
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )
  disc = lambda x: x.run.state.model.discriminator  # noqa: E731
  assert moved(disc(first), disc(idle)) == 0  # nothing before its step
  assert moved(disc(done), disc(idle)) > 0
  assert moved(done.tokenizer, idle.tokenizer) > 0
  with pytest.raises(ValueError, match="teacher must name a folder"):
    tokenizer_run.train(dataclasses.replace(game, teacher="x"))


class Mean(nnx.Module):
  """Reads features, gives them back as they are but for a bias."""

  reads = ("features",)

  def __init__(self):
    self.bias = nnx.Param(jnp.ones(()))

  def init_state(self, key):
    return ()

  def __call__(self, features, state, *, train=False, key=None):
    output = features + self.bias[...]
    loss = jnp.mean(jnp.square(output - features))
    return Reconstructed(output, {"features": loss}, {}), state


@dataclasses.dataclass(unsafe_hash=True)
class MeanConfig:
  """Of `Mean`."""

  def build(self, rngs):
    return Mean()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
  """The folder of an encoder."""
  config = vit.VitConfig(
    image_size=32, patch_size=16, width=8, num_layers=1, num_heads=2,
    mlp_width=8,
  )  # fmt: skip
  path = tmp_path_factory.mktemp("teacher")
  found = jax.jit(lambda: vit.Vit(config, rngs=nnx.Rngs(0)))()
  vit_weights.save(path, found)
  return path


def test_features_come_from_the_frozen_teacher(run, teacher):
  seen = dataclasses.replace(
    with_trainer(run, num_steps=80),
    tokenizer=MeanConfig(),
    teacher=str(teacher),
  )
  teacher = vit_weights.load(teacher)
  done = tokenizer_run.train(seen)
  assert set(done.run.metrics) == {"features"}
  assert done.run.metrics["features"] < 0.3
  same(done.run.state.buffers.teacher, teacher)
  images = np.zeros((2, 32, 32, 3), np.float32)
  tokens = jax.jit(tokenizer_run.features)(teacher, images)
  want = jax.jit(lambda x: teacher.normalize(teacher.encode(x).tokens))(images)
  np.testing.assert_allclose(tokens, want[:, 1:], atol=1e-6)
  measured = tokenizer_run.evaluate(
    done.tokenizer, (), np.zeros((3, 32, 32, 3), np.uint8), teacher=teacher
  )
  assert measured == pytest.approx(done.run.metrics, abs=1e-5)
  with pytest.raises(ValueError, match="adversarial must be empty"):
    tokenizer_run.train(
      dataclasses.replace(seen, adversarial=AdversarialConfig())
    )


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(data=2, fsdp=4)])
def test_eight_devices_train_as_one(run, mesh):
  # Adam would make the rounding of gradients near zero as large as any.
  sgd = OptimizerConfig(name="sgd", learning_rate=0.1, schedule="constant")
  few = with_trainer(run, num_steps=3, optimizer=sgd)
  one = tokenizer_run.train(few, devices=jax.devices()[:1])
  done = tokenizer_run.train(dataclasses.replace(few, mesh=mesh))
  leaves = jax.tree.leaves(done.run.state.model)
  assert all(len(x.sharding.device_set) == 8 for x in leaves)
  assert any(not x.is_fully_replicated for x in leaves) == (mesh.fsdp > 1)
  jax.tree.map(
    lambda g, w: np.testing.assert_allclose(g, w, atol=1e-5),
    jax.device_get((done.tokenizer, done.state)),
    jax.device_get((one.tokenizer, one.state)),
  )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Pictures of several sizes in two folders."""
  path = tmp_path_factory.mktemp("pictures")
  rng = np.random.default_rng(0)
  for split, count in (("train", 5), ("validation", 3)):
    (path / split).mkdir()
    for i in range(count):
      pixels = rng.integers(0, 256, (40 + i, 50, 3)).astype(np.uint8)
      PIL.Image.fromarray(pixels).save(path / split / f"{i}.png")
  return path


def of_folder(run, folder, size, **changes):
  return dataclasses.replace(
    with_trainer(run, num_steps=1, log_every=1),
    data=str(folder),
    crop=RandomResizedCrop(size, area=(0.5, 1.0)),
    splits=("train", "validation"),
    num_test=2,
    batch_size=4,
    **changes,
  )


def test_images_of_any_size_and_how_different_they_look(
  run, folder, teacher, tmp_path
):
  """A folder of pictures, and the published LPIPS with few channels."""
  with np.load(GOLDEN / "lpips.npz") as file:
    tensors = {
      name.removeprefix("vgg16/"): x
      for name, x in file.items()
      if name.startswith("vgg16/") and not name.endswith("distance")
    }
  write_tensors(tmp_path / "lpips.safetensors", tensors)
  perceptual = str(tmp_path / "lpips.safetensors")
  one = of_folder(run, folder, 32, perceptual=perceptual, perceptual_weight=2.0)
  one = with_trainer(one, folder=str(tmp_path / "run"))
  done = tokenizer_run.train(one, devices=jax.devices()[:1])
  assert done.run.metrics["psnr"] > 3
  line = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0]
  logged = json.loads(line)
  assert logged["perceptual"] > 0
  assert logged["loss"] == pytest.approx(
    logged["pixels"] + logged["perceptual"], rel=1e-5
  )
  with pytest.raises(ValueError, match="batch_size must lie in 1..5"):
    tokenizer_run.train(dataclasses.replace(one, batch_size=8))
  of_features = dataclasses.replace(
    one, tokenizer=MeanConfig(), teacher=str(teacher)
  )
  with pytest.raises(ValueError, match="perceptual must be empty"):
    tokenizer_run.train(of_features)


def test_a_proxy_comes_from_its_own_run(run, folder, tmp_path):
  proxy = built(two_stage_test.PROXY)
  path = str(tmp_path / "vqgan.safetensors")
  tokenizer_run.save(path, tokenizer_run.Trained(*proxy, None))
  frozen = OptimizerConfig(weight_decay=0.1, frozen=two_stage.FROZEN["proxy"])
  first = of_folder(run, folder, 8, tokenizer=two_stage_test.CONFIG, proxy=path)
  first = with_trainer(first, optimizer=frozen)
  done = tokenizer_run.train(first, devices=jax.devices()[:1])
  same((done.tokenizer.proxy, done.state.proxy), proxy)
  assert {"proxy", "agreement"} <= set(done.run.metrics)
  with pytest.raises(ValueError, match="proxy must be empty"):
    tokenizer_run.train(dataclasses.replace(first, tokenizer=CONFIG))

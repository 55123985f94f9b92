"""Tokenizers learn tiny pictures, resume, and play against a discriminator."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.tokenizers.tiny_tokenizer import TRUNK
from tokjax.models import vit, vit_weights
from tokjax.tokenizers.adversarial import AdversarialConfig
from tokjax.tokenizers.codebook import CodebookConfig
from tokjax.tokenizers.discriminator import DiscriminatorConfig
from tokjax.tokenizers.one_d_piece import OneDPieceConfig
from tokjax.tokenizers.types import Reconstructed
from tokjax.tokenizers.vector_quantizer import VQConfig
from tokjax.train import tokenizer_run
from tokjax.train.loop import TrainConfig
from tokjax.train.optimizer import OptimizerConfig
from tokjax.train.tokenizer_run import TokenizerRun

# Without a reset and with a commitment these few images collapse to one code.
BOOK = CodebookConfig(
  16, 4, metric="cosine", learning="ema", reset="batch", reset_threshold=0.5
)
CONFIG = OneDPieceConfig(
  32, 16, 4, TRUNK, TRUNK, VQConfig(BOOK, commitment_weight=0.0)
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Flat colours: one token says all."""
  folder = tmp_path_factory.mktemp("data")
  rng = np.random.default_rng(0)
  arrays = {}
  for name, count in (("train", 64), ("test", 20)):
    colours = rng.choice([20, 128, 235], (count, 1, 1, 3))
    x = np.broadcast_to(colours, (count, 32, 32, 3)).astype(np.uint8)
    labels = np.arange(count) % 10
    arrays |= {f"{name}_x": x, f"{name}_y": labels}
  np.savez(folder / "cifar10.npz", **arrays)
  adam = OptimizerConfig(learning_rate=1e-2, schedule="constant")
  trainer = TrainConfig(num_steps=100, optimizer=adam, log_every=0)
  return TokenizerRun(CONFIG, str(folder), batch_size=16, trainer=trainer)


def with_trainer(run, **changes):
  trainer = dataclasses.replace(run.trainer, **changes)
  return dataclasses.replace(run, trainer=trainer)


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


def test_features_come_from_the_frozen_teacher(run, tmp_path):
  config = vit.VitConfig(
    image_size=32, patch_size=16, width=8, num_layers=1, num_heads=2,
    mlp_width=8,
  )  # fmt: skip
  teacher = jax.jit(lambda: vit.Vit(config, rngs=nnx.Rngs(0)))()
  vit_weights.save(tmp_path / "vit", teacher)
  seen = dataclasses.replace(
    with_trainer(run, num_steps=80),
    tokenizer=MeanConfig(),
    teacher=str(tmp_path / "vit"),
  )
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
  with pytest.raises(ValueError, match="adversarial must be None"):
    tokenizer_run.train(
      dataclasses.replace(seen, adversarial=AdversarialConfig())
    )


def test_of_eight_devices_as_of_one(run):
  """The loop spreads batches over all devices; here over one as well."""
  done = tokenizer_run.train(with_trainer(run, num_steps=3))
  one = functools.partial(jax.tree.map, np.asarray)
  assert len(jax.tree.leaves(done.state)[0].sharding.device_set) == 8
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(one(done.tokenizer)))

"""What claims about image tokenizers measure, on tokenizers made by hand."""

import types

import jax
import numpy as np
import pytest
from flax import nnx

from tests.tokenizers.tiny_tokenizer import TRUNK, built, quantizer
from tokjax.benchmarks import image_tokens, tokenizer_probes
from tokjax.benchmarks.tokenizer_probes import ProbeRun
from tokjax.cli import claim
from tokjax.data import image_batches
from tokjax.eval import rate_distortion
from tokjax.models import vit
from tokjax.tokenizers.hiera_tok import HieraTokConfig
from tokjax.tokenizers.lavit import LavitConfig
from tokjax.tokenizers.ming import MingTokConfig
from tokjax.tokenizers.one_d_piece import OneDPieceConfig
from tokjax.tokenizers.transformer import TransformerConfig

VIT = vit.VitConfig(
  image_size=16, patch_size=8, width=8, num_layers=1, num_heads=2, mlp_width=8
)


def raw(number):
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (number, 16, 16, 3), np.uint8)


@pytest.fixture
def untrained(monkeypatch):
  """Runs give tokenizers as they are made, and count as many images."""

  def trained(run, name, config):
    tokenizer, state = built(config)
    metrics = {"psnr": 10.0, "pixels": 0.5, "kl": 0.25}
    return types.SimpleNamespace(
      tokenizer=tokenizer,
      state=state,
      run=types.SimpleNamespace(metrics=metrics),
    )

  def load(path):
    return tuple(
      image_batches.ImageSet(raw(n), np.arange(n) % 3, ("a", "b", "c"))
      for n in (9, 6)
    )

  teacher = jax.jit(lambda: vit.Vit(VIT, rngs=nnx.Rngs(0)))()
  monkeypatch.setattr(tokenizer_probes, "trained", trained)
  monkeypatch.setattr(tokenizer_probes, "encoder", lambda run: "")
  monkeypatch.setattr(image_tokens.cifar10, "load", load)
  monkeypatch.setattr(image_tokens.vit_weights, "load", lambda path: teacher)
  monkeypatch.setattr(image_tokens, "_BATCH", 3)


def runs(*tokenizers):
  return ProbeRun("test", "folder", tokenizers)


def test_lengths_beside_codecs(untrained):
  config = OneDPieceConfig(16, 8, 30, TRUNK, TRUNK, quantizer())
  rows = image_tokens.by_length(
    runs(("drop", config)), lengths=(1, 30), num_coded=2
  )
  assert set(rows) == {
    f"{name} {k}" for name in ("drop", "jpeg", "webp") for k in (1, 30)
  }
  assert rows["drop 30"].metrics["bytes"] == 15  # 30 of 4 bits
  tokenizer, state = built(config)
  images = raw(6) / np.float32(127.5) - 1

  @jax.jit
  def decode(images):
    indices = tokenizer.encode(images, state).indices
    return tokenizer.decode(indices[:, :1], state)

  error = np.clip(np.asarray(decode(images)), -1, 1) - images
  want = -10 * np.log10(np.mean(np.square(error / 2), axis=(1, 2, 3)))
  got = rows["drop 1"].metrics["psnr"]
  np.testing.assert_allclose(got, want.mean(), rtol=1e-4)
  fitted = rate_distortion.at_budget(raw(6)[:2], "jpeg", 15, count_header=False)
  fits = fitted.quality >= 0
  assert rows["jpeg 30"].metrics["fits"] == fits.mean()


def test_scales_count_their_numbers(untrained):
  config = HieraTokConfig(16, 8, (1, 2), 3, TRUNK, TRUNK)
  rows = image_tokens.by_scale(runs(("scales", config)))
  want = {"psnr": 10.0, "loss": 0.75, "numbers": 15.0}
  assert rows["scales"].metrics == want


def test_meaning_is_read_from_both_rows(untrained):
  shape = TransformerConfig(8, 1, 2, activation="swiglu")
  config = MingTokConfig(16, 8, 4, shape, shape, shape, feature_dim=8)
  metrics = image_tokens.by_meaning(runs(("both", config)))["both"].metrics
  assert metrics["psnr"] == 10.0
  # Nine rows of training, the first six of which are those of the test.
  assert metrics["accuracy"] > 0.5 and 0 <= metrics["latents"] <= 1


def test_needs_are_those_of_the_choice(untrained):
  config = LavitConfig(8, 4, 4, 1, 2, 2.0, quantizer(), stage="merge")
  rows = image_tokens.by_need(runs(("merge", config)))
  tokenizer, state = built(config)
  teacher = image_tokens.vit_weights.load("")

  @jax.jit
  def found(raw):
    images = image_tokens.image_classification.pixels(raw)
    features = image_tokens.tokenizer_run.features(teacher, images)
    output = tokenizer(features, state)[0]
    key = jax.random.split(jax.random.key(0))[0]
    drawn = tokenizer.select(features, key).keep.sum(1)
    surest = tokenizer.select(features).keep.sum(1)
    return drawn, surest, output.losses["features"]

  size = image_tokens._BATCH
  parts = [found(raw(6)[i : i + size]) for i in range(0, 6, size)]
  drawn, length, loss = (np.stack(x) for x in zip(*parts, strict=True))
  length_drawn = rows["merge"].metrics["length"]
  np.testing.assert_allclose(length_drawn, np.mean(drawn), rtol=1e-6)
  metrics = rows["merge surest"].metrics
  np.testing.assert_allclose(metrics["length"], np.mean(length), rtol=1e-6)
  np.testing.assert_allclose(metrics["cosine"], 1 - loss.mean(), rtol=1e-4)


@pytest.mark.parametrize("name", ["one_d_piece", "hiera_tok", "ming", "lavit"])
def test_claims_are_whole(name, tmp_path):
  loaded = claim.load(name, str(tmp_path))
  (run,) = loaded.runs
  for _, config in run.tokenizers:
    made = jax.eval_shape(lambda config=config: config.build(nnx.Rngs(0)))
    assert set(made.reads) <= {"images", "features"}


def test_budgets_are_as_equal_as_they_can_be(tmp_path):
  (run,) = claim.load("hiera_tok", str(tmp_path)).runs
  numbers = {k: c.num_tokens * c.latent_dim for k, c in run.tokenizers}
  assert numbers == {"scales": 510, "one": 512, "one as wide": 384}

"""The linear probe of codes, and the claims that rest on it."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokjax.benchmarks import tokenizer_probes
from tokjax.benchmarks.trained_vit import Row
from tokjax.cli import claim
from tokjax.models import vit
from tokjax.tokenizers.codebook import CodebookConfig
from tokjax.tokenizers.illume import IllumeConfig
from tokjax.tokenizers.transformer import TransformerConfig
from tokjax.tokenizers.vector_quantizer import VQConfig
from tokjax.train import image_classification, tokenizer_run


def rows(seed, number=400, spread=1.0):
  """Rows around one centre a class, their labels, and a column of ones."""
  random = np.random.default_rng(seed)
  labels = random.integers(0, 3, number)
  centres = np.random.default_rng(9).normal(size=(3, 4))
  x = centres[labels] + spread * random.normal(size=(number, 4))
  x = np.concatenate([x, np.ones((number, 1))], axis=1)
  return x.astype(np.float32), labels


def test_ridge_equals_least_squares_where_its_penalty_is_small():
  (x, labels), (y, other) = rows(0), rows(1)
  got = tokenizer_probes.ridge_accuracy(x, labels, y, other, penalty=1e-9)
  weights, *_ = np.linalg.lstsq(np.float64(x), np.eye(3)[labels], rcond=None)
  want = np.mean(np.argmax(y @ weights, axis=1) == other)
  assert got == pytest.approx(want) and 0.5 < got < 1


def test_ridge_names_all_of_what_is_apart_and_none_by_magic():
  (x, labels), (y, other) = rows(0, spread=0.01), rows(1, spread=0.01)
  assert tokenizer_probes.ridge_accuracy(x, labels, y, other) == 1
  # Units of a column have no say.
  scale = np.float32([1e-3, 1, 1e3, 1, 1])
  assert (
    tokenizer_probes.ridge_accuracy(x * scale, labels, y * scale, other) == 1
  )
  blind = np.zeros_like(x)
  got = tokenizer_probes.ridge_accuracy(blind, labels, blind, other)
  most = np.bincount(labels).argmax()
  assert got == pytest.approx(np.mean(other == most))
  with pytest.raises(ValueError, match="train_rows=400, train_labels=3"):
    tokenizer_probes.ridge_accuracy(x, labels[:3], y, other)


def test_mean_codes_are_those_of_every_image():
  small = vit.VitConfig(
    image_size=4, patch_size=2, width=4, num_layers=1, num_heads=1, mlp_width=4
  )
  teacher = jax.jit(lambda: vit.Vit(small, rngs=nnx.Rngs(0)))()
  config = IllumeConfig(
    4, 4, TransformerConfig(8, 1, 2), VQConfig(CodebookConfig(7, 2))
  )
  model = jax.jit(lambda: config.build(nnx.Rngs(1)))()
  state = jax.jit(model.init_state)(jax.random.key(2))
  raw = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), np.uint8)
  done = tokenizer_run.Trained(model, state, None)
  got = tokenizer_probes.mean_codes(done, teacher, raw, batch_size=2)

  @jax.jit
  def codes(raw):
    images = image_classification.pixels(raw)
    features = tokenizer_run.features(teacher, images)
    return model.encode(features, state).codes

  np.testing.assert_allclose(got, np.mean(codes(raw), axis=1), atol=1e-6)


def test_margin_is_the_smallest_lead():
  found = {
    "a": Row({"accuracy": 0.5, "psnr": 20.0}),
    "b": Row({"accuracy": 0.3, "psnr": 20.5}),
  }
  leads = (("a", "b", "accuracy", 0.0), ("a", "b", "psnr", 0.6))
  got = tokenizer_probes.margin(found, leads=leads)
  assert got == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["token_flow", "illume"])
def test_claims_compare_as_many_bits(name, tmp_path):
  loaded = claim.load(name, str(tmp_path))
  (run,) = loaded.runs
  bits = set()
  for _, config in run.tokenizers:
    built = jax.eval_shape(
      functools.partial(lambda config: config.build(nnx.Rngs(0)), config)
    )
    state = jax.eval_shape(built.init_state, jax.random.key(0))
    arrays = {
      "images": jnp.zeros((1, 32, 32, 3)), "features": jnp.zeros((1, 64, 128)),
    }  # fmt: skip
    found = jax.eval_shape(
      lambda model, state, *inputs: model.encode(*inputs, state),
      built, state, *(arrays[key] for key in built.reads),
    )  # fmt: skip
    books = [x for x in jax.tree.leaves(state) if x.ndim == 1]
    bits.add((found.indices.size, books[0].size))
  assert len(bits) == 1
  row = types.SimpleNamespace(metrics={"accuracy": 0.5, "psnr": 20.0})
  names = [key for key, _ in run.tokenizers]
  assert loaded.margin(dict.fromkeys(names, row)) == 0

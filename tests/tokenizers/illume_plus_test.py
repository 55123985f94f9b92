"""ILLUME+: two rows of codes, noise in training alone, ids of both."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from tests.compiled import run
from tokjax.tokenizers.codebook import CodebookConfig
from tokjax.tokenizers.conv import ConvConfig
from tokjax.tokenizers.illume import IllumeConfig
from tokjax.tokenizers.illume_plus import (
  DualViTokConfig,
  DualViTokState,
  from_ids,
  to_ids,
)
from tokjax.tokenizers.transformer import TransformerConfig
from tokjax.tokenizers.vector_quantizer import VQConfig

CONV = ConvConfig(
  width=4, multipliers=(1,), num_res_blocks=1, z_dim=3, groups=2,
  attention=False, flavour="maskgit",
)  # fmt: skip
BOOK = VQConfig(CodebookConfig(7, 2, learning="simvq"))
TINY = DualViTokConfig(
  image_size=4,
  semantic=IllumeConfig(5, 4, TransformerConfig(8, 1, 2), BOOK),
  quantizer=BOOK,
  encoder=CONV,
  decoder=dataclasses.replace(CONV, condition_dim=4),
  noise_rate=0.0,
  noise_batch_rate=0.0,
  pixel_weight=2.0,
)


@functools.cache
def build(**noise):
  config = dataclasses.replace(TINY, **noise)
  model = jax.jit(lambda: config.build(nnx.Rngs(0)))()
  return model, jax.jit(model.init_state)(jax.random.key(1))


def inputs(seed=0, batch=8):
  random = np.random.default_rng(seed)
  shapes = (batch, 4, 4, 3), (batch, 4, 5)
  return [random.normal(size=shape).astype(np.float32) for shape in shapes]


@functools.partial(jax.jit, static_argnames="train")
def call(model, images, features, state, key=None, train=False):
  return model(images, features, state, key=key, train=train)


def test_images_come_back_from_both_rows_of_codes():
  (model, state), (images, features) = build(), inputs()
  found, _ = call(model, images, features, state)
  semantic, pixel = run(model.encode, images, features, state)
  assert semantic.indices.shape == (8, 4) and pixel.indices.shape == (8, 16)
  again = run(model.decode, semantic.indices, pixel.indices, state)
  np.testing.assert_allclose(found.output, again, atol=1e-5)
  error = ((images - np.float64(again)) ** 2).mean()
  assert float(found.losses["pixels"]) == pytest.approx(2 * error, rel=1e-5)
  restored = np.float64(run(model.semantic.decode, semantic.indices,
                            state.semantic))  # fmt: skip
  lengths = np.linalg.norm(features, axis=-1) * np.linalg.norm(
    restored, axis=-1
  )
  cosine = ((features * restored).sum(-1) / lengths).mean()
  assert float(found.losses["semantic"]) == pytest.approx(1 - cosine, rel=1e-4)
  assert found.losses.keys() == {
    "pixels", "semantic", "semantic_commitment", "semantic_codebook",
    "pixel_commitment", "pixel_codebook",
  }  # fmt: skip
  assert {"semantic_usage", "pixel_usage"} <= found.stats.keys()
  other = run(model.decode, semantic.indices * 0, pixel.indices, state)
  assert np.abs(other - again).max() > 1e-3


def moved(rates, keys):
  """Which images come out otherwise than without noise, [keys, B]."""
  (model, state), x = build(**rates), inputs()
  (plain, same), _ = build(), None
  want = call(plain, *x, same, train=True)[0].output

  @jax.jit
  def outputs(keys):
    return jax.lax.map(
      lambda key: model(*x, state, key=key, train=True)[0].output, keys
    )

  return np.abs(outputs(keys) - want[None]).max((2, 3, 4)) > 1e-5


def test_noise_moves_the_codes_of_some_images_or_of_all():
  keys = jax.random.split(jax.random.key(2), 60)
  some = moved({"noise_rate": 0.3}, keys)
  assert some.mean() == pytest.approx(0.3, abs=0.07)
  assert 0 < (some.mean(1) == 0).mean() < 0.3
  every = moved({"noise_batch_rate": 0.3}, keys)
  assert set(every.mean(1)) == {0, 1}
  assert every.mean() == pytest.approx(0.3, abs=0.18)


def test_noise_is_for_training_and_teaches_no_encoder():
  (noisy, state), (images, features) = build(noise_rate=0.5), inputs()
  plain, _ = build()
  key = jax.random.key(3)
  one, two = (call(m, images, features, state, key)[0] for m in (noisy, plain))
  jax.tree.map(np.testing.assert_array_equal, one, two)
  trained = call(plain, images, features, state, train=True)[0]
  np.testing.assert_allclose(trained.output, one.output, atol=1e-5)

  @jax.jit
  def gradients(model, images, features):
    def value(name, images, features):
      found, _ = model(images, features, state, key=key, train=True)
      return found.losses[name], found

    return {
      name: jax.grad(functools.partial(value, name), (0, 1), has_aux=True)(
        images, features
      )
      for name in ("pixels", "semantic")
    }

  got = gradients(noisy, images, features)
  (of_images, of_features), found = got["pixels"]
  moved = np.abs(found.output - trained.output).max((1, 2, 3)) > 1e-5
  assert 0 < moved.sum() < 8
  # As target, an image has a gradient of its own; the rest came by its codes.
  direct = 2 * 2 * (images - found.output) / images.size
  by_codes = np.abs(of_images - direct).max((1, 2, 3)) > 1e-6
  np.testing.assert_array_equal(by_codes, ~moved)
  # The codes of features stay, and their loss knows of no pixel.
  assert np.all(np.abs(of_features).max((1, 2)) > 0)
  (of_images, of_features), _ = got["semantic"]
  assert not np.any(of_images) and np.any(of_features)
  for name in ("semantic", "semantic_commitment", "pixel_commitment"):
    assert float(found.losses[name]) == pytest.approx(
      float(trained.losses[name]), rel=1e-5
    )


def test_worked_example_of_ids_and_the_way_back():
  layout = {"num_semantic": 4, "num_pixel": 8, "offset": 100}
  one, two = np.int32([[3, 0]]), np.int32([[5, 0, 7]])
  ids = run(to_ids, one, two, **layout)
  assert ids.tolist() == [[103, 100, 109, 104, 111]]
  semantic, pixel = run(from_ids, ids, num_tokens=2, **layout)
  np.testing.assert_array_equal(semantic, one)
  np.testing.assert_array_equal(pixel, two)
  # An id of pixels among those of features is none, and the other way round.
  wrong = np.int32([[104, 99, 103, 112, 104]])
  semantic, pixel = run(from_ids, wrong, num_tokens=2, **layout)
  assert semantic.tolist() == [[-1, -1]] and pixel.tolist() == [[-1, -1, 0]]
  with pytest.raises(ValueError, match="num_tokens must lie in 0..5, got 6"):
    run(from_ids, ids, num_tokens=6, **layout)


def test_published_shape_with_fewer_blocks():
  config = DualViTokConfig()
  config = dataclasses.replace(
    config,
    encoder=dataclasses.replace(config.encoder, num_res_blocks=1),
    decoder=dataclasses.replace(config.decoder, num_res_blocks=1),
  )

  def whole():
    model = config.build(nnx.Rngs(0))
    return model, model.init_state(jax.random.key(0))

  model, state = jax.eval_shape(whole)
  assert isinstance(state, DualViTokState)
  assert state.semantic.codes.shape == (32768, 32)
  assert state.pixel.codes.shape == (98304, 32)
  assert model.decoder.conv_in.kernel.shape == (3, 3, 256, 4 * 384)
  assert model.decoder.norm_out.scale.kernel.shape == (64, 384)
  assert model.semantic.features_out.kernel.shape == (1280, 3584)


@pytest.mark.unchecked
@pytest.mark.parametrize("settings, message", [
  ({"noise_rate": 2.0}, "noise_rate must lie in"),
  ({"encoder": dataclasses.replace(CONV, multipliers=(1, 1))},
   "encoder_factor=2, decoder_factor=1"),
  ({"decoder": CONV}, "condition_dim=0, both_codes=4"),
  ({"semantic": dataclasses.replace(TINY.semantic, num_tokens=5)},
   "num_tokens=5, square=4"),
])  # fmt: skip
def test_settings_that_cannot_be(settings, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(TINY, **settings).build(nnx.Rngs(0))


@pytest.mark.unchecked
def test_errors():
  (model, state), x = build(noise_rate=0.5), inputs()
  with pytest.raises(ValueError, match="key must be given to train with noise"):
    model(*x, state, train=True)
  with pytest.raises(ValueError, match=r"images must be \[B, 4, 4, C\]"):
    model.vectors(x[0][:, :2])

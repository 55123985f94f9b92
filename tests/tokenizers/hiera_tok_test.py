"""HieraTok: scales do not look down, one scale is a plain transformer VAE."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.compiled import run
from tests.tokenizers.tiny_tokenizer import (
  TRUNK,
  built,
  gradients,
  parts,
  pictures,
)
from tokjax.ops import patches
from tokjax.tokenizers.hiera_tok import HieraTokConfig

CONFIG = HieraTokConfig(8, 2, (1, 2, 4), 3, TRUNK, TRUNK)
SCALES = {1: slice(0, 1), 2: slice(1, 5), 4: slice(5, 21)}


def changed(**settings):
  return HieraTokConfig(
    **{**vars(CONFIG), "encoder": TRUNK, "decoder": TRUNK, **settings}
  )


@functools.cache
def latents(config=CONFIG):
  tokenizer, _ = built(config)
  return run(type(tokenizer).encode, tokenizer, pictures())


@pytest.mark.parametrize("side", [2, 4])
def test_a_scale_changes_nothing_coarser(side):
  tokenizer, _ = built(CONFIG)
  z = np.asarray(latents().mean)
  tangent = np.zeros_like(z)
  tangent[:, SCALES[side]] = 1
  decode = jax.jit(lambda z, t: jax.jvp(tokenizer.decode_tokens, (z,), (t,))[1])
  moved = np.asarray(decode(z, tangent))
  first = SCALES[side].start
  assert not np.any(moved[:, :first])
  assert np.all(np.any(moved[:, first:] != 0, axis=-1))


def test_latents_of_a_coarse_scale_are_of_means():
  tokenizer, _ = built(CONFIG)

  @jax.jit
  def by_hand(images):
    x = patches.patchify(images, 2)
    x = tokenizer.encoder(tokenizer.patches(x) + tokenizer.positions[...][None])
    return tokenizer.to_latent(jnp.mean(x, axis=1))[:, :3]

  got = np.asarray(latents().mean)[:, 0]
  np.testing.assert_allclose(got, by_hand(pictures()), atol=1e-5)


def test_one_scale_is_the_plain_model():
  """The same with a mask of ones, written out."""
  config = changed(sides=(4,))
  tokenizer, _ = built(config)
  z = np.asarray(latents(config).mean)

  @jax.jit
  def by_hand(z):
    places = tokenizer.decoder_places
    x = tokenizer.from_latent(z) + places.positions[...][None]
    x = tokenizer.decoder(x + places.scales[...][None])
    return patches.unpatchify(tokenizer.pixels(x), (4, 4), 2)

  got = run(type(tokenizer).decode, tokenizer, z)
  np.testing.assert_allclose(got, by_hand(z), atol=1e-5)


def test_pooled_latents_need_the_finest_alone():
  config = changed(pool="latents")
  tokenizer, _ = built(config)
  z = np.asarray(latents(config).mean)
  assert z.shape == (3, 16, 3)
  same, _ = built(CONFIG)  # the same parameters, other pooling
  coarse = z.mean(axis=1, keepdims=True)
  middle = z.reshape(3, 2, 2, 2, 2, 3).mean(axis=(2, 4)).reshape(3, 4, 3)
  whole = np.concatenate([coarse, middle, z], axis=1)
  got = run(type(tokenizer).decode, tokenizer, z)
  want = run(type(same).decode, same, whole)
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_losses_are_means_of_pixels_and_of_scales():
  tokenizer, _ = built(CONFIG)
  found, _ = run(type(tokenizer).__call__, tokenizer, pictures(), ())
  want = np.mean(np.abs(pictures() - np.asarray(found.output)))
  np.testing.assert_allclose(found.losses["pixels"], want, rtol=1e-5)
  mean, log_variance = (np.float64(x) for x in latents())
  terms = (mean**2 + np.exp(log_variance) - 1 - log_variance) / 2
  by_scale = np.mean([terms[:, where].mean() for where in SCALES.values()])
  np.testing.assert_allclose(found.losses["kl"], 1e-4 * by_scale, rtol=1e-4)
  by_token = built(changed(kl_balance="token"))[0]
  found, _ = run(type(by_token).__call__, by_token, pictures(), ())
  np.testing.assert_allclose(found.losses["kl"], 1e-4 * terms.mean(), rtol=1e-4)


def test_gradients_reach_what_they_should():
  config = changed(num_scale_layers=1)
  tokenizer, _ = built(config)
  key = jax.random.key(0)
  found = gradients(tokenizer, (), (pictures(),), ["kl"], key)
  encoding = {
    "patches", "positions", "encoder", "encoder_places", "scale_blocks",
    "to_latent",
  }  # fmt: skip
  assert parts(found) == encoding
  found = gradients(tokenizer, (), (pictures(),), ["pixels"], key)
  assert parts(found) == encoding | {
    "from_latent", "decoder_places", "decoder", "pixels",
  }  # fmt: skip


def test_training_samples_and_needs_a_key():
  tokenizer, _ = built(CONFIG)

  @jax.jit
  def once(key):
    return tokenizer(pictures(), (), train=True, key=key)[0].output

  one, other = once(jax.random.key(0)), once(jax.random.key(1))
  assert np.abs(np.asarray(one - other)).max() > 1e-3
  with pytest.raises(ValueError, match="key must be given"):
    tokenizer(pictures(), (), train=True)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"sides": (4, 2)}, "sides must ascend"),
    ({"sides": (1, 2)}, "last_side=2, patches=4"),
    ({"pool": "latents", "num_scale_layers": 1}, "num_scale_layers must be 0"),
    ({"pool": "max"}, "pool must be one of"),
  ],
)
def test_settings_are_checked(settings, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda: changed(**settings).build(nnx.Rngs(0)))


def test_published_scales_have_341_tokens():
  assert HieraTokConfig().num_tokens == 341

"""MingTok: causal meaning, its cache, shortcuts, targets."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.compiled import run
from tests.tokenizers.tiny_tokenizer import built, gradients, parts, pictures
from tokjax.tokenizers.ming import MingTokConfig
from tokjax.tokenizers.transformer import TransformerConfig

SMALL = TransformerConfig(8, 2, 2, activation="swiglu", init_scale=0.3)
CONFIG = MingTokConfig(8, 4, 4, SMALL, SMALL, SMALL, feature_dim=6)


def features():
  return np.float32(np.random.default_rng(1).normal(size=(3, 4, 6)))


@functools.cache
def latents():
  tokenizer, _ = built(CONFIG)
  return np.asarray(run(type(tokenizer).encode, tokenizer, pictures()))


def semantics(z, hidden=None):
  tokenizer, _ = built(CONFIG)
  return np.asarray(run(type(tokenizer).semantics, tokenizer, z, hidden))


@pytest.mark.parametrize("place", [1, 3])
def test_meaning_depends_on_earlier_latents_only(place):
  tokenizer, _ = built(CONFIG)
  tangent = np.zeros_like(latents())
  tangent[:, place] = 1
  moved = jax.jit(lambda z, t: jax.jvp(tokenizer.semantics, (z,), (t,))[1])(
    latents(), tangent
  )
  assert not np.any(moved[:, :place])
  assert np.all(np.any(np.asarray(moved[:, place:]) != 0, axis=-1))


def test_one_after_the_other_equals_all_at_once():
  tokenizer, _ = built(CONFIG)

  @jax.jit
  def stepped(z):
    def one(cache, z):
      meaning, cache = tokenizer.semantics_step(z[:, None], cache)
      return cache, meaning[:, 0]

    cache = tokenizer.init_cache(3)
    return jax.lax.scan(one, cache, z.swapaxes(0, 1))[1].swapaxes(0, 1)

  got = stepped(latents())
  np.testing.assert_allclose(got, semantics(latents()), atol=1e-5)


def test_shortcuts_are_inverse_and_have_no_parameters():
  """With all weights of the heads at zero, only they remain."""
  tokenizer, _ = built(CONFIG)

  @jax.jit
  def means(images):
    x = tokenizer.encode(images)
    return x, jnp.repeat(x, 2, axis=-1).reshape(3, 4, 4, 2).mean(-1)

  z, back = means(pictures())
  np.testing.assert_allclose(back, z, atol=1e-6)
  graph, weights = nnx.split(tokenizer)
  for name in ("to_latent", "from_latent"):
    weights[name] = jax.tree.map(jnp.zeros_like, weights[name])
  bare = nnx.merge(graph, weights)

  @jax.jit
  def parts_of(images):
    return bare.encode(images), bare._raised(bare.encode(images))

  z, raised = parts_of(pictures())
  np.testing.assert_allclose(raised, np.repeat(z, 2, axis=-1), atol=1e-6)


def test_hidden_latents_have_no_influence():
  hidden = np.zeros((3, 4), bool)
  hidden[:, 2] = True
  changed = latents().copy()
  changed[:, 2] += 5
  got = semantics(changed, hidden)
  np.testing.assert_array_equal(got, semantics(latents(), hidden))
  assert np.abs(got - semantics(latents())).max() > 1e-3


def test_losses():
  tokenizer, _ = built(CONFIG)
  found, state = run(
    type(tokenizer).__call__, tokenizer, pictures(), features(), ()
  )
  assert state == () and found.output.shape == pictures().shape
  error = np.abs(pictures() - np.asarray(found.output)).mean()
  np.testing.assert_allclose(found.losses["pixels"], error, rtol=1e-5)
  want = run(lambda z: tokenizer.to_feature(z), semantics(latents()))
  x, y = np.float64(want), np.float64(features())
  cosine = (x * y).sum(-1)
  cosine /= np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
  np.testing.assert_allclose(found.stats["cosine"], cosine.mean(), atol=1e-5)
  np.testing.assert_allclose(
    found.losses["semantic"], 1 - cosine.mean(), atol=1e-5
  )


def test_gradients_reach_what_they_should():
  tokenizer, _ = built(CONFIG)
  inputs, key = (pictures(), features()), jax.random.key(0)
  shared = {
    "patches", "positions", "class_token", "encoder", "norm_latent",
    "to_latent", "from_latent", "hidden_latent", "places", "semantic",
  }  # fmt: skip
  found = gradients(tokenizer, (), inputs, ["semantic"], key)
  assert parts(found) == shared | {"to_feature"}
  found = gradients(tokenizer, (), inputs, ["pixels"], key)
  assert parts(found) == shared | {
    "to_pixel", "pixel_positions", "pixel", "pixels",
  }  # fmt: skip


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"latent_dim": 3}, "encoder_width must be a multiple of 3"),
    ({"finer": 3}, "patch_size must be a multiple of 3"),
    ({"mask_rate": 2.0}, "mask_rate must lie in 0..1"),
  ],
)
def test_settings_are_checked(settings, message):
  config = dataclasses.replace(CONFIG, **settings)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda: config.build(nnx.Rngs(0)))


def test_inputs_are_checked():
  tokenizer, _ = built(CONFIG)
  with pytest.raises(ValueError, match="key must be given"):
    tokenizer(pictures(), features(), (), train=True)
  with pytest.raises(ValueError, match=r"features must have shape \(3, 4, 6\)"):
    tokenizer(pictures(), features()[:, :2], ())

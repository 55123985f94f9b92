"""VQGAN: the codes of maps, its losses and who learns from them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.compiled import run
from tests.tokenizers.tiny_tokenizer import (
  built,
  gradients,
  parts,
  pictures,
  quantizer,
)
from tokjax.tokenizers import vqgan
from tokjax.tokenizers.conv import ConvConfig
from tokjax.tokenizers.vqgan import Vqgan, VqganConfig

TRUNK = ConvConfig(
  4, (1, 1), num_res_blocks=1, z_dim=4, groups=2, attention=False,
  flavour="maskgit",
)  # fmt: skip
CONFIG = VqganConfig(TRUNK, quantizer())


def test_decodes_its_own_codes():
  tokenizer, state = built(CONFIG)
  images = np.concatenate([pictures(), pictures(1)], axis=2)[:2]  # 8 x 16
  found, same = run(Vqgan.__call__, tokenizer, images, state)
  coded = run(Vqgan.encode, tokenizer, images, state)
  assert coded.indices.shape == (2, 4, 8)
  again = run(Vqgan.decode, tokenizer, coded.indices, state)
  np.testing.assert_allclose(found.output, again, atol=1e-5)
  jax.tree.map(np.testing.assert_array_equal, same, state)
  z = np.float64(run(type(tokenizer.encoder).__call__, tokenizer.encoder,
                     images))  # fmt: skip
  table = np.float64(tokenizer.quantizer.codebook.codes[...])
  unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (z, table)]
  np.testing.assert_array_equal(
    coded.indices, np.argmax(unit[0] @ unit[1].T, axis=-1)
  )


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_pixels_are_judged_as_told(kind):
  tokenizer, state = built(dataclasses.replace(CONFIG, pixel_loss=kind))
  found, _ = run(Vqgan.__call__, tokenizer, pictures(), state)
  error = np.abs(pictures() - np.float64(found.output))
  want = (error if kind == "l1" else error**2).mean()
  assert float(found.losses["pixels"]) == pytest.approx(want, rel=1e-5)


def test_gradients_reach_every_part():
  tokenizer, state = built(CONFIG)
  found = gradients(tokenizer, state, (pictures(),), ["pixels"])
  assert parts(found) == {"encoder", "decoder"}
  found = gradients(tokenizer, state, (pictures(),), ["commitment"])
  assert parts(found) == {"encoder"}
  found = gradients(tokenizer, state, (pictures(),), ["codebook"])
  assert parts(found) == {"quantizer"}


def test_learns_colours():
  """Flat pictures of four colours in four codes."""
  rng = np.random.default_rng(0)
  colours = rng.choice([-0.8, 0.8], (16, 1, 1, 3))
  images = np.broadcast_to(colours, (16, 4, 4, 3)).astype(np.float32)
  tokenizer, state = built(CONFIG)
  adam = optax.adam(1e-2)

  @jax.jit
  def train(tokenizer, state):
    def loss(tokenizer, state):
      found, state = tokenizer(images, state, train=True)
      return sum(found.losses.values()), (state, found.losses["pixels"])

    def step(carry, _):
      tokenizer, state, moments = carry
      grad, (state, pixels) = jax.grad(loss, has_aux=True)(tokenizer, state)
      update, moments = adam.update(grad, moments, tokenizer)
      tokenizer = optax.apply_updates(tokenizer, update)
      return (tokenizer, state, moments), pixels

    carry = tokenizer, state, adam.init(tokenizer)
    return jax.lax.scan(step, carry, length=120)[1]

  losses = np.asarray(train(tokenizer, state))
  assert losses[0] > 0.6 and losses[-1] < 0.3


def test_widths_must_fit():
  wrong = dataclasses.replace(TRUNK, z_dim=6)
  with pytest.raises(ValueError, match="z_dim=6, quantizer_width=4"):
    built(VqganConfig(wrong, quantizer()))
  with pytest.raises(ValueError, match="pixel_loss must be one of"):
    built(dataclasses.replace(CONFIG, pixel_loss="l3"))
  tokenizer, state = built(CONFIG)
  with pytest.raises(ValueError, match="height"):
    vqgan.Vqgan.encode(tokenizer, jnp.zeros((1, 3, 4, 3)), state)

"""The convolutional encoder and decoder against loops, and their settings."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.compiled import run
from tokjax.tokenizers import conv
from tokjax.tokenizers.conv import ConvConfig, ConvDecoder, ConvEncoder

TINY = ConvConfig(
  width=4, multipliers=(1, 2), num_res_blocks=1, z_dim=3, groups=2
)
MASKGIT = dataclasses.replace(
  TINY, flavour="maskgit", attention=False, legacy_shortcut=True
)


@functools.cache
def build(kind, config, seed=0):
  """A module whose every parameter is random, biases and scales too."""
  module = jax.jit(lambda: kind(config, rngs=nnx.Rngs(seed)))()
  random = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: np.float32(x + 0.3 * random.normal(size=x.shape)), module
  )


def images(seed=0, shape=(3, 8, 6, 3)):
  random = np.random.default_rng(seed)
  return random.normal(size=shape).astype(np.float32)


def convolved(x, layer, stride=1, pad=None):
  """Sums over the window of each output, by loops."""
  kernel = np.asarray(layer.kernel[...], np.float64)
  size = len(kernel)
  pad = ((size // 2, size // 2) if pad is None else pad,) * 2
  x = np.pad(x, ((0, 0), *pad, (0, 0)))
  rows, columns = ((n - size) // stride + 1 for n in x.shape[1:3])
  out = np.zeros((len(x), rows, columns, kernel.shape[-1]))
  for i in range(rows):
    for j in range(columns):
      window = x[:, i * stride : i * stride + size, j * stride :][:, :, :size]
      out[:, i, j] = np.einsum("bhwc,hwcd->bd", window, kernel)
  return out if layer.bias is None else out + np.asarray(layer.bias)


def linear(x, layer):
  return x @ np.asarray(layer.kernel, np.float64) + np.asarray(layer.bias)


def normed(x, norm, condition):
  y = x.reshape(*x.shape[:3], 2, -1)
  y = y - y.mean((1, 2, 4), keepdims=True)
  y = y / np.sqrt((y**2).mean((1, 2, 4), keepdims=True) + 1e-6)
  y = y.reshape(x.shape) * np.asarray(norm.norm.scale)
  y = y + np.asarray(norm.norm.bias)
  if norm.scale is None:
    return y
  times = x.shape[1] // condition.shape[1]
  c = condition.repeat(times, 1).repeat(times, 2)
  return y * linear(c, norm.scale) + linear(c, norm.shift)


def silu(x):
  return x / (1 + np.exp(-x))


def resed(x, block, condition):
  y = convolved(silu(normed(x, block.norm_in, condition)), block.conv_in)
  y = convolved(silu(normed(y, block.norm_mid, condition)), block.conv_mid)
  if block.shortcut is not None:
    x = convolved(y if block.legacy_shortcut else x, block.shortcut)
  return x + y


def attended(x, block, condition):
  y = normed(x, block.norm, condition).reshape(len(x), -1, x.shape[-1])
  q, k, v = (linear(y, f) for f in (block.query, block.key, block.value))
  scores = np.exp(np.einsum("bnd,bmd->bnm", q, k) / np.sqrt(x.shape[-1]))
  mixed = scores / scores.sum(-1, keepdims=True) @ v
  return x + linear(mixed, block.out).reshape(x.shape)


def walked(module, x, condition=None):
  """The layers of an encoder or decoder one by one, in float64."""
  x = convolved(np.asarray(x, np.float64), module.conv_in)
  for layer in module.layers:
    if hasattr(layer, "conv_mid"):
      x = resed(x, layer, condition)
    elif hasattr(layer, "query"):
      x = attended(x, layer, condition)
    elif type(layer).__name__ == "_Double":
      x = convolved(x.repeat(2, 1).repeat(2, 2), layer.conv)
    elif layer.conv is None:
      x = (x[:, ::2] + x[:, 1::2]) / 2
      x = (x[:, :, ::2] + x[:, :, 1::2]) / 2
    else:
      x = convolved(x, layer.conv, stride=2, pad=(0, 1))
  return convolved(silu(normed(x, module.norm_out, condition)), module.conv_out)


@pytest.mark.parametrize("config", [TINY, MASKGIT], ids=["vqgan", "maskgit"])
def test_encoder_equals_loops(config):
  encoder = build(ConvEncoder, config)
  got = run(encoder, images())
  assert got.shape == (3, 4, 3, 3)
  np.testing.assert_allclose(got, walked(encoder, images()), atol=3e-4)


@pytest.mark.parametrize("config", [
  TINY, MASKGIT, dataclasses.replace(TINY, condition_dim=5, attention=False),
], ids=["vqgan", "maskgit", "conditioned"])  # fmt: skip
def test_decoder_equals_loops(config):
  decoder = build(ConvDecoder, config)
  z = images(1, (3, 4, 3, 3))
  condition = images(2, (3, 4, 3, 5)) if config.condition_dim else None
  got = run(decoder, z, condition)
  assert got.shape == (3, 8, 6, 3)
  np.testing.assert_allclose(got, walked(decoder, z, condition), atol=5e-4)


def kinds(module):
  """Letters of the layers: residual, attention, half, double."""
  letters = {"_ResBlock": "r", "_Attention": "a", "_Halve": "h", "_Double": "d"}
  return "".join(letters[type(layer).__name__] for layer in module.layers)


def shaped(kind, config):
  return nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0)))


def test_published_shapes():
  vqgan, maskgit = conv.SHAPES["vqgan"], conv.SHAPES["maskgit"]
  assert vqgan.factor == 16
  encoder, decoder = shaped(ConvEncoder, vqgan), shaped(ConvDecoder, vqgan)
  assert kinds(encoder) == "rrh" * 4 + "rara" + "rar"
  assert kinds(decoder) == "rar" + "rarara" + "drrr" * 4
  # The 16-fold tokenizer of LlamaGen, 72 million with its quantizer.
  numbers = [
    sum(x.size for x in jax.tree.leaves(module))
    for module in (encoder, decoder)
  ]
  assert 71.5e6 < sum(numbers) < 72.5e6
  encoder, decoder = shaped(ConvEncoder, maskgit), shaped(ConvDecoder, maskgit)
  assert kinds(encoder) == "rrh" * 4 + "rr" + "rr"
  assert kinds(decoder) == "rr" + "rr" + "drr" * 4
  assert encoder.conv_in.bias is None and encoder.conv_out.bias is not None


def test_every_parameter_learns():
  encoder, decoder = build(ConvEncoder, TINY), build(ConvDecoder, TINY)

  def loss(encoder, decoder):
    return jnp.sum(jnp.sin(decoder(encoder(images()))))

  gradients = jax.jit(jax.grad(loss, (0, 1)))(encoder, decoder)
  paths = jax.tree_util.tree_leaves_with_path(gradients)
  still = [p for p, x in paths if not np.abs(x).max() > 0]
  # A softmax does not see what all keys have in common.
  assert all("key" in jax.tree_util.keystr(p) for p in still), still


def test_computes_in_the_dtype_of_its_parameters():
  encoder = build(ConvEncoder, TINY)
  low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), encoder)
  got = run(low, images())
  assert got.dtype == jnp.bfloat16
  want = run(encoder, images())
  error = np.abs(np.asarray(got, np.float32) - want).mean()
  assert error < 0.05 * np.abs(want).mean()
  assert run(encoder, jnp.asarray(images(), jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.unchecked
@pytest.mark.parametrize("settings, message", [
  ({"groups": 3}, "channels must be a multiple of 3, got 4"),
  ({"flavour": "magic"}, "flavour must be one of"),
  ({"flavour": "maskgit"}, "attention must be one of False"),
  ({"multipliers": ()}, "levels must lie in"),
])  # fmt: skip
def test_settings_that_cannot_be(settings, message):
  with pytest.raises(ValueError, match=message):
    shaped(ConvEncoder, dataclasses.replace(TINY, **settings))


def test_errors():
  encoder, decoder = build(ConvEncoder, TINY), build(ConvDecoder, TINY)
  with pytest.raises(ValueError, match="height must be a multiple of 2, got 7"):
    jax.eval_shape(encoder, images(shape=(1, 7, 8, 3)))
  with pytest.raises(ValueError, match="channels=1, image_channels=3"):
    jax.eval_shape(encoder, images(shape=(1, 8, 8, 1)))
  with pytest.raises(ValueError, match="channels=2, z_dim=3"):
    jax.eval_shape(decoder, images(shape=(1, 4, 4, 2)))
  with pytest.raises(ValueError, match="condition must have 0 channels"):
    z = images(shape=(1, 4, 4, 3))
    jax.eval_shape(decoder, z, z)

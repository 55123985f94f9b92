"""Sizes, pictures and weights for tests of whole tokenizers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokjax.tokenizers.codebook import CodebookConfig
from tokjax.tokenizers.transformer import TransformerConfig
from tokjax.tokenizers.vector_quantizer import VQConfig

TRUNK = TransformerConfig(width=8, num_layers=1, num_heads=2, init_scale=0.3)


def quantizer(learning="gradient", **settings):
  return VQConfig(
    CodebookConfig(16, 4, metric="cosine", learning=learning), **settings
  )


@functools.cache
def built(config):
  """(tokenizer, state) of a config."""

  def make():
    tokenizer = config.build(nnx.Rngs(0))
    return tokenizer, tokenizer.init_state(jax.random.key(1))

  return jax.jit(make)()


def pictures(seed=0, number=3, side=8):
  rng = np.random.default_rng(seed)
  return rng.uniform(-1, 1, (number, side, side, 3)).astype(np.float32)


def gradients(tokenizer, state, inputs, of=None, key=None):
  """Of the sum of the losses, or of those named, with respect to all."""

  @jax.jit
  def find(tokenizer, state, inputs):
    def loss(tokenizer):
      found, _ = tokenizer(*inputs, state, train=True, key=key)
      names = found.losses if of is None else of
      return sum((found.losses[name] for name in names), jnp.float32(0))

    return jax.grad(loss)(tokenizer)

  return find(tokenizer, state, inputs)


def parts(gradient):
  """Names of the parts of a module that got a gradient."""
  leaves = jax.tree_util.tree_leaves_with_path(gradient)
  names = set()
  for path, x in leaves:
    assert np.all(np.isfinite(x)), path
    if np.any(np.asarray(x)):
      names.add(jax.tree_util.keystr(path[:1], simple=True))
  return names

"""Modules with weights by NumPy: there is nothing to compile."""

import jax
import numpy as np
from flax import nnx

__all__ = ["filled", "filled_tokenizer"]


def filled(build, scale=0.4):
  """What `build()` makes, with normal weights; scales of norms around one.

  The leaves are NumPy arrays, constants of whatever program they come into.
  """
  random = np.random.default_rng(0)

  def weights(path, x):
    around = 1.0 if jax.tree_util.keystr(path).find("scale") >= 0 else 0.0
    found = around + scale * random.normal(size=x.shape)
    return np.asarray(found, x.dtype)

  return jax.tree_util.tree_map_with_path(weights, jax.eval_shape(build))


def filled_tokenizer(config):
  """(tokenizer, state) of a config, with such weights."""
  tokenizer = filled(lambda: config.build(nnx.Rngs(0)))
  return tokenizer, tokenizer.init_state(jax.random.key(1))

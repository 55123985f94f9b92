"""Modules with weights by NumPy: there is nothing to compile."""

import jax
import numpy as np

__all__ = ["filled"]


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

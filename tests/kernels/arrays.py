"""Lets tests write their inputs as NumPy arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["takes_numpy"]


def takes_numpy(function):
  """The function, with NumPy arguments made into the arrays it is typed for."""

  def convert(x):
    return jnp.asarray(x) if isinstance(x, np.ndarray) else x

  @functools.wraps(function)
  def converted(*arrays, **settings):
    arrays, settings = jax.tree.map(convert, (arrays, settings))
    return function(*arrays, **settings)

  return converted

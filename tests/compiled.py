"""Calls as one program: eager ones compile each of their operations apart.

merging = compiled(merging)  # in a test of tokjax.ops.merging
"""

import functools
import inspect
import types

import jax
import numpy as np

__all__ = ["compiled", "run"]


def compiled(module, leave=()):
  """A module whose public functions are jitted, but for those to leave.

  Arrays in arguments are traced, everything else is static. What a function
  says of wrong arguments is said while it is traced, as without jit.
  """
  public = {
    name: _compiled(getattr(module, name))
    for name in module.__all__
    if inspect.isroutine(getattr(module, name)) and name not in leave
  }
  return types.SimpleNamespace(**{**vars(module), **public})


def run(function, *args, **kwargs):
  """One call as one program; arrays may be NumPy's."""
  return _compiled(function)(*args, **kwargs)


def _compiled(function):
  @functools.wraps(function)
  def call(*args, **kwargs):
    leaves, tree = jax.tree.flatten((args, kwargs))
    arrays = [x for x in leaves if _is_array(x)]
    static = (_ARRAY if _is_array(x) else x for x in leaves)
    return _program(function, tree, *static)(arrays)

  return call


_ARRAY = object()  # stands where an array was


def _is_array(x):
  return isinstance(x, (jax.Array, np.ndarray))


@functools.lru_cache(maxsize=1000, typed=True)  # 1, 1.0 and True differ
def _program(function, tree, *static):
  @jax.jit
  def run(arrays):
    arrays = iter(arrays)
    leaves = [next(arrays) if x is _ARRAY else x for x in static]
    args, kwargs = jax.tree.unflatten(tree, leaves)
    return function(*args, **kwargs)

  return run

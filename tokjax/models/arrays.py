"""Any tree of arrays as one safetensors file, by the paths of its arrays.

For what only tokjax reads; checkpoints that other libraries know have modules
of their own (`bert_weights`, `vit_weights`).
"""

import os
import pathlib
from typing import Any

import jax
import numpy as np

from tokjax import files
from tokjax.models import weights
from tokjax.parallel import rules

__all__ = ["load", "save"]


def save(path: str | os.PathLike, tree: Any) -> None:
  """Writes the arrays of a tree: whole, or not at all.

  Args:
    path: the file; its folder is made, an old one replaced.
    tree: any pytree of arrays without PRNG keys, nnx modules included.

  Example:
    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/x.safetensors"
    >>> save(path, {"w": np.ones(2, np.float32)})
    >>> load(path, {"w": jax.ShapeDtypeStruct((2,), np.float32)})
    {'w': Array([1., 1.], dtype=float32)}
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  arrays = {rules.leaf_path(where): np.asarray(x) for where, x in leaves}
  with files.replacing(path) as aside:
    weights.write_tensors(aside, arrays)


def load(path: str | os.PathLike, like: Any) -> Any:
  """Reads the arrays that `save` wrote.

  Args:
    path: the file.
    like: the tree to fill, of arrays or `jax.ShapeDtypeStruct`.

  Returns:
    The tree, with floats as float32.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if the file is damaged, or holds other names or shapes than
      the tree; lists them.
  """
  arrays = weights.read_tensors([pathlib.Path(path)])
  leaves = jax.tree_util.tree_leaves_with_path(like)
  want = {rules.leaf_path(where): x.shape for where, x in leaves}
  have = {name: x.shape for name, x in arrays.items()}
  if want != have:
    wrong = [
      f"{name}: expected {want.get(name)}, got {have.get(name)}"
      for name in sorted(want.keys() | have.keys())
      if want.get(name) != have.get(name)
    ]
    raise ValueError(f"{path} holds another tree: " + "; ".join(wrong[:10]))

  def fill(where, x):
    return jax.numpy.asarray(arrays[rules.leaf_path(where)], x.dtype)

  return jax.tree_util.tree_map_with_path(fill, like)

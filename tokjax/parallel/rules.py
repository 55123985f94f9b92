"""Where each array of a tree lives on a mesh, by rules over its path.

A rule is (pattern, axes): a regular expression searched in the path of the
array, and one entry per array axis: the mesh axis that cuts it, several of
them in a tuple, or None. The first rule that matches decides. An array that
no rule matches is cut along its largest axis that `fsdp` divides.

    RULES = (
      (r"(qkv|up)/kernel$", (None, "fsdp", "tensor")),  # stacked layers
      (r"(out|down)/kernel$", (None, "tensor", "fsdp")),
      (r"(bias|scale)$", ()),
    )

Paths read `blocks/qkv/kernel`; in a training state they begin with `model/`
or `optimizer_state/...`, and the same rule serves a parameter and its
moments when the pattern is anchored at the end only.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

__all__ = [
  "Placement",
  "Rules",
  "gather",
  "leaf_path",
  "placements",
  "shard",
  "shardings",
]

Rules = Sequence[tuple[str, tuple[str | tuple[str, ...] | None, ...]]]


class Placement(NamedTuple):
  """Where one array lives, and why.

  Attributes:
    path: of the array in its tree.
    shape: of the whole array.
    spec: mesh axis of each array axis; axes of size 1 are left out.
    reason: the rule that decided; what did not divide, where it did not.
  """

  path: str
  shape: tuple[int, ...]
  spec: jax.P
  reason: str


def leaf_path(path: Sequence[Any]) -> str:
  """The path of a leaf as text, parts joined by slashes.

  Args:
    path: from `jax.tree_util.tree_flatten_with_path`.

  Returns:
    The path; a parameter of an nnx module goes by its name, without the
    `value` inside it.

  Example:
    >>> leaves = jax.tree_util.tree_leaves_with_path({"up": [1.0]})
    >>> leaf_path(leaves[0][0])
    'up/0'
  """
  text = jax.tree_util.keystr(tuple(path), simple=True, separator="/")
  return text.removesuffix("/value")


def placements(tree: Any, mesh: Mesh, rules: Rules = ()) -> list[Placement]:
  """Decides where every array of a tree lives; moves nothing.

  Args:
    tree: any pytree of arrays or `jax.ShapeDtypeStruct`, nnx modules included.
    mesh: the devices.
    rules: (pattern, axes) in order; see the top of this file.

  Returns:
    One row per array in the order of the tree's leaves. Where a size does not
    divide, that axis is whole on every device, and the reason says so.

  Raises:
    ValueError: if a rule names an axis that the mesh does not have.

  Example:
    >>> from tokjax.parallel import meshes
    >>> mesh = meshes.make_mesh(devices=jax.devices()[:1])
    >>> row, = placements({"bias": np.zeros(3)}, mesh, [("bias", ("tensor",))])
    >>> row.path, row.reason
    ('bias', "rule 'bias'")
  """
  _check_axes(mesh, rules)
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return [_place(leaf_path(p), _shape(x), mesh.shape, rules) for p, x in leaves]


def shardings(tree: Any, mesh: Mesh, rules: Rules = ()) -> Any:
  """The sharding of every array of a tree.

  Args:
    tree: as for `placements`.
    mesh: as for `placements`.
    rules: as for `placements`.

  Returns:
    The tree with a `NamedSharding` in place of each array.

  Raises:
    ValueError: if a rule names an axis that the mesh does not have.

  Example:
    >>> from tokjax.parallel import meshes
    >>> mesh = meshes.make_mesh(devices=jax.devices()[:1])
    >>> shardings({"bias": np.zeros(3)}, mesh)["bias"].spec == jax.P()
    True
  """
  rows = placements(tree, mesh, rules)
  structure = jax.tree.structure(tree)
  return structure.unflatten([NamedSharding(mesh, row.spec) for row in rows])


def shard(tree: Any, mesh: Mesh, rules: Rules = ()) -> Any:
  """Puts every array of a tree where the rules say.

  Under `jax.distributed` every process passes the same values.

  Args:
    tree: a pytree of arrays.
    mesh: as for `placements`.
    rules: as for `placements`.

  Returns:
    The same values; an array that is already in place is not copied.

  Raises:
    ValueError: if a rule names an axis that the mesh does not have.

  Example:
    >>> from tokjax.parallel import meshes
    >>> mesh = meshes.make_mesh(devices=jax.devices()[:1])
    >>> shard({"bias": np.zeros(3)}, mesh)["bias"].sharding.spec == jax.P()
    True
  """
  return jax.device_put(tree, shardings(tree, mesh, rules))


def gather(tree: Any, axis: str = "fsdp") -> Any:
  """Makes arrays whole along one mesh axis, in a mesh of Explicit axes.

  A parameter stored in parts over `fsdp` is used whole. With Auto axes the
  compiler sees to that and nothing happens here; with Explicit ones the type
  of the array must say so. The gradient comes back in parts.

  Args:
    tree: a pytree of traced arrays.
    axis: the mesh axis.

  Returns:
    The tree, no array cut along `axis`.

  Example:
    >>> gather({"bias": jax.numpy.ones(3)})["bias"].shape
    (3,)
  """

  def whole(x):
    spec = jax.typeof(x).sharding.spec
    kept = [_without(entry, axis) for entry in spec]
    return x if kept == list(spec) else jax.sharding.reshard(x, jax.P(*kept))

  return jax.tree.map(whole, tree)


def _without(entry, axis):
  if isinstance(entry, tuple):
    return tuple(name for name in entry if name != axis) or None
  return None if entry == axis else entry


def _shape(leaf):
  return tuple(leaf.shape) if hasattr(leaf, "shape") else np.shape(leaf)


def _names(entry):
  return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _check_axes(mesh, rules):
  for pattern, axes in rules:
    for name in (name for entry in axes for name in _names(entry)):
      if name not in mesh.shape:
        raise ValueError(
          f"rule {pattern!r} names axis {name!r}, the mesh has "
          f"{tuple(mesh.shape)}"
        )


def _place(path, shape, sizes: Mapping[str, int], rules):
  for pattern, axes in rules:
    if re.search(pattern, path):
      return _place_by_rule(path, shape, sizes, pattern, axes)
  count = sizes.get("fsdp", 1)
  fits = [i for i, n in enumerate(shape) if n >= count and n % count == 0]
  if count == 1 or not fits:
    why = "no axis divides by" if count > 1 else "default:"
    return Placement(path, shape, jax.P(), f"{why} fsdp={count}")
  largest = max(fits, key=lambda i: shape[i])  # ties: the first
  spec = jax.P(*(None,) * largest, "fsdp")
  return Placement(path, shape, spec, f"default: axis {largest} over fsdp")


def _place_by_rule(path, shape, sizes, pattern, axes):
  reasons = [f"rule {pattern!r}"]
  if len(axes) > len(shape):
    reasons.append(f"replicated: {len(axes)} axes for shape {shape}")
    return Placement(path, shape, jax.P(), "; ".join(reasons))
  entries = []
  for i, entry in enumerate(axes):
    names = tuple(name for name in _names(entry) if sizes[name] > 1)
    count = int(np.prod([sizes[name] for name in names], dtype=int))
    if shape[i] % count:
      reasons.append(
        f"axis {i} replicated: {shape[i]} does not divide by "
        + " x ".join(f"{name}={sizes[name]}" for name in names)
      )
      names = ()
    entries.append(names[0] if len(names) == 1 else names or None)
  while entries and entries[-1] is None:
    entries.pop()
  return Placement(path, shape, jax.P(*entries), "; ".join(reasons))

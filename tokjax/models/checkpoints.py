"""Published checkpoints: which file layout it is, and everything in it.

Four layouts are read: plain transformers folders, sentence-transformers and
PyLate folders (`modules.json`, the head in numbered Dense folders), Stanford
ColBERT folders (`artifact.metadata`, the head inside the model file), and
ours, which are the first or the second with more (`tokjax.json`): see
`tokjax.models.saving`.
"""

import dataclasses
import json
import pathlib
import string
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import tokenizers
from flax import nnx

from tokjax import checks
from tokjax.models import bert, bert_weights, json_settings, weights
from tokjax.retrieval import colbert, heads, methods
from tokjax.retrieval.colberter import ColberterConfig, ColberterHead

__all__ = ["Checkpoint", "Settings", "abstract_head", "load"]

# What torch calls the activations of a Dense layer, and what we do.
TORCH_ACTIVATIONS: Mapping[str, heads.Activation] = {
  "torch.nn.modules.linear.Identity": "identity",
  "torch.nn.modules.activation.Tanh": "tanh",
  "torch.nn.modules.activation.ReLU": "relu",
  "torch.nn.modules.activation.GELU": "gelu",
  "torch.nn.modules.activation.SiLU": "silu",
}

# Of a folder that `tokjax.models.saving` wrote: where settings and heads that
# other libraries have no word for stand, and how.
SETTINGS_FILE = "tokjax.json"
HEAD_FILE = "head.safetensors"
FORMAT = "tokjax model 1"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A model and what it is used by: what a folder holds.

  Attributes:
    encoder: token ids to hidden states.
    head: hidden states to token vectors; None where there is none.
    tokenizer: with its own cutting and padding switched off.
    config: how texts become scored tokens, as the folder says; not read by a
      ColBERTer head, whose own config says it.
    method: what is made of the tokens; ColBERT where the folder is silent.
    layout: "transformers", "sentence-transformers", "stanford" or "tokjax";
      None where it was not read.
    folder: where it was read or saved.
    sha256: of the weight files in the order read, encoder then head.
  """

  encoder: bert.Bert
  head: heads.Projection | ColberterHead | None
  tokenizer: tokenizers.Tokenizer
  config: colbert.ColbertConfig
  method: methods.Method = methods.Method()
  layout: str | None = None
  folder: pathlib.Path | None = None
  sha256: str | None = None


@dataclasses.dataclass(frozen=True)
class Settings:
  """What `tokjax.json` says beside its format.

  Attributes:
    head: "dense" if it stands in the Dense folders, "projection" or
      "colberter" if in `head.safetensors`.
    config: of the texts.
    method: as in `Checkpoint`.
    projection: of a `ProjectionHead`.
    colberter: of a `ColberterHead`.
  """

  head: Literal["none", "dense", "projection", "colberter"]
  config: colbert.ColbertConfig
  method: methods.Method
  projection: heads.HeadConfig | None = None
  colberter: ColberterConfig | None = None

  def __post_init__(self):
    for name in ("projection", "colberter"):
      if self.head == name and getattr(self, name) is None:
        raise ValueError(f"{name} must be given for head {name!r}, got None")


def load(source: str, *, revision: str | None = None) -> Checkpoint:
  """Reads a checkpoint: encoder, head, tokenizer and settings.

  Args:
    source: a folder, a weights package's model ("all-MiniLM-L6-v2") or a hub
      name; see `tokjax.models.weights.find`.
    revision: branch, tag or commit on the hub.

  Returns:
    Everything in the folder, parameters in float32. A folder that says
    nothing about late interaction gets `ColbertConfig.zero_shot`, one that
    says nothing of a method gets ColBERT.

  Raises:
    FileNotFoundError: if there is no such checkpoint, or only a pickle.
    ValueError: for a damaged file, another architecture, tensors that do not
      fit, or modules that are not known.
  """
  folder = weights.find(source, revision=revision)
  if (folder / SETTINGS_FILE).is_file():
    return _load_saved(folder)
  if (folder / "artifact.metadata").is_file():
    return _load_stanford(folder)
  if (folder / "modules.json").is_file():
    return _load_modules(folder)
  config = _read_json(folder / "config.json")
  if config.get("architectures") == ["HF_ColBERT"]:
    return _load_stanford(folder)
  return _load_encoder(folder)


def abstract_head(
  config: heads.HeadConfig | ColberterConfig,
) -> heads.ProjectionHead | ColberterHead:
  """The head of a config with shapes in place of its arrays.

  Args:
    config: of either kind of head.

  Raises:
    ValueError: for settings that do not fit each other.

  Example:
    >>> head = abstract_head(heads.HeadConfig(input_dim=6, output_dim=4))
    >>> head.layers[0].kernel.shape
    (6, 4)
  """
  kind = {
    heads.HeadConfig: heads.ProjectionHead,
    ColberterConfig: ColberterHead,
  }[type(config)]
  return jax.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0)))


def _load_saved(folder):
  """A folder of ours: that of another library, and what it cannot say."""
  path = folder / SETTINGS_FILE
  said = _read_json(path)
  found = said.pop("format", None) if isinstance(said, dict) else said
  if found != FORMAT:
    raise ValueError(f"{path} must have the format {FORMAT!r}, got {found!r}")
  settings = json_settings.from_json(Settings, said, source=str(path))
  load_rest = _load_modules if settings.head == "dense" else _load_encoder
  checkpoint = load_rest(folder)
  head, digest = checkpoint.head, checkpoint.sha256
  width = checkpoint.encoder.config.width
  if settings.head == "dense" and settings.projection is not None:
    head = _with_config(head, settings.projection, path)
  elif settings.head == "projection":
    head = _read_head(settings.projection, folder / HEAD_FILE)
    _check_width(str(path), settings.projection.input_dim, width)
  elif settings.head == "colberter":
    head = _read_head(settings.colberter, folder / HEAD_FILE)
    _check_width(str(path), settings.colberter.hidden_dim, width)
  if settings.head in ("projection", "colberter"):
    files = [*weights.weight_files(folder), folder / HEAD_FILE]
    digest = weights.sha256(files)
  try:
    methods.check_head(head, settings.method)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  return dataclasses.replace(
    checkpoint,
    head=head,
    config=settings.config,
    method=settings.method,
    layout="tokjax",
    sha256=digest,
  )


def _read_head(config, file):
  """A head whose parameters stand in a file by their paths."""
  if not file.is_file():
    raise FileNotFoundError(f"{file} is not there")
  head, tensors = abstract_head(config), weights.read_tensors([file])
  names, leaves = weights.parameter_names(head), jax.tree.leaves(head)
  want = {name: x.shape for name, x in zip(names, leaves, strict=True)}
  got = {name: x.shape for name, x in tensors.items()}
  if got != want:
    raise ValueError(f"{file} must hold {want}, got {got}")
  return jax.tree.unflatten(
    jax.tree.structure(head), [jnp.asarray(tensors[name]) for name in names]
  )


def _with_config(head, config, path):
  """A Projection as the ProjectionHead that it was."""
  named = abstract_head(config)
  want, got = (
    (jax.tree.structure(x.layers), [leaf.shape for leaf in jax.tree.leaves(x)])
    for x in (named, head)
  )
  if got != want:
    raise ValueError(
      f"{path}: the Dense folders must hold the head of projection, {config}"
    )
  return jax.tree.unflatten(jax.tree.structure(named), jax.tree.leaves(head))


def _load_encoder(folder):
  """A plain transformers folder."""
  files = weights.weight_files(folder)
  encoder = bert_weights.load_encoder(
    _read_json(folder / "config.json"), weights.read_tensors(files)
  )
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
  _check_width("linear.weight", kernel.shape[0], encoder.config.width)
  if said.get("dim", kernel.shape[1]) != kernel.shape[1]:
    raise ValueError(
      f"artifact.metadata says dim={said['dim']}, linear.weight gives "
      f"{kernel.shape[1]}"
    )
  checks.one_of(("cosine",), similarity=said.get("similarity", "cosine"))
  punctuation = said.get("mask_punctuation", True)
  return Checkpoint(
    encoder=encoder,
    head=heads.from_matrix(jnp.asarray(kernel)),
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
    head=heads.Projection(layers) if layers else None,
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
    query_marker=said["query_prefix"] or None,
    document_marker=said["document_prefix"] or None,
    expand_queries=said.get("do_query_expansion", True),
    attend_to_expansion=bool(said.get("attend_to_expansion_tokens")),
    skip_words=default.skip_words if words is None else tuple(words),
  )


def _load_dense(place, files, width):
  config = _read_json(place / "config.json")
  tensors = weights.read_tensors(files)
  inputs, outputs = config["in_features"], config["out_features"]
  activation = config.get("activation_function", next(iter(TORCH_ACTIVATIONS)))
  checks.one_of(tuple(TORCH_ACTIVATIONS), activation_function=activation)
  residual = config.get("use_residual", False)
  want = {"linear.weight": (outputs, inputs)}
  if config.get("bias", True):
    want["linear.bias"] = (outputs,)
  if residual and inputs != outputs:
    want["residual.weight"] = (outputs, inputs)
  got = {name: x.shape for name, x in tensors.items()}
  if got != want:
    raise ValueError(f"{files[0]} must hold {want}, got {got}")
  _check_width(str(place), inputs, width)
  bias, skip = tensors.get("linear.bias"), tensors.get("residual.weight")
  return heads.ProjectionLayer(
    jnp.asarray(tensors["linear.weight"].T),
    None if bias is None else jnp.asarray(bias),
    None if skip is None else jnp.asarray(skip.T),
    activation=TORCH_ACTIVATIONS[activation],
    identity_residual=residual and inputs == outputs,
  )


def _check_width(name, inputs, width):
  if inputs != width:
    raise ValueError(f"{name} must take width {width}, got {inputs}")


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
  try:
    return json.loads(path.read_text())
  except ValueError as error:  # cut, or not UTF-8
    raise ValueError(f"{path} is not JSON: {error}") from error

"""Writes a model's folder, which `tokjax.models.checkpoints.load` reads back.

Other libraries read as much of it as they have words for:

    config.json, model.safetensors,         transformers: the encoder
    tokenizer.json, tokenizer_config.json
    modules.json, 1_Dense/, 2_Dense/, ...,  PyLate: a head of linear layers,
    config_sentence_transformers.json       and how texts are marked and cut
    tokjax.json                             the method and all settings
    head.safetensors                        heads with gates, learned scales
                                            or words (ColBERTer)

PyLate scores special tokens and scales token vectors to unit length whatever
`score_specials` and `normalize` say.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from tokjax.models import (
  bert,
  bert_weights,
  checkpoints,
  json_settings,
  weights,
)
from tokjax.models.checkpoints import Checkpoint
from tokjax.retrieval import colberter, heads, methods

__all__ = ["save"]

# What vocabularies in BERT's style call their special tokens.
_SPECIAL_TOKENS = {
  "unk_token": "[UNK]",
  "sep_token": "[SEP]",
  "pad_token": "[PAD]",
  "cls_token": "[CLS]",
}


def save(folder: str | os.PathLike, checkpoint: Checkpoint) -> Checkpoint:
  """Writes a model as a folder: whole, or not at all.

  `checkpoints.load` gives the same arrays (bfloat16 ones as float32), head,
  tokenizer, config and method. A folder that was saved before is replaced. What
  was written is read back before it takes its place.

  Args:
    folder: a local path; must not hold anything else.
    checkpoint: the model; its `layout`, `folder` and `sha256` are not read.

  Returns:
    The checkpoint with those three as `checkpoints.load` gives them.

  Raises:
    TypeError: for an encoder or head of another kind.
    ValueError: for parts that do not fit each other, or a head that its config
      does not describe.
    FileExistsError: if the folder holds something else.
    OSError: if the disk is full or not writable.

  Example:
    >>> import tempfile
    >>> import tokenizers
    >>> from flax import nnx
    >>> from tokjax.retrieval import xtr
    >>> config = bert.BertConfig(vocab_size=9, width=4, num_layers=1,
    ...                          num_heads=1, mlp_width=4, max_positions=3)
    >>> words = tokenizers.models.WordLevel({"[UNK]": 0}, "[UNK]")
    >>> checkpoint = Checkpoint(
    ...   bert.Bert(config, rngs=nnx.Rngs(0)), None,
    ...   tokenizers.Tokenizer(words), xtr.text_config(),
    ...   methods.Method("xtr", k_prime=40))
    >>> saved = save(pathlib.Path(tempfile.mkdtemp()) / "model", checkpoint)
    >>> checkpoints.load(str(saved.folder)).method.k_prime
    40
  """
  encoder, head = checkpoint.encoder, checkpoint.head
  if not isinstance(encoder, bert.Bert):
    raise TypeError(f"encoder must be a Bert, got {type(encoder).__name__}")
  kind = _kind(head)
  methods.check_head(head, checkpoint.method)
  folder = pathlib.Path(folder)
  with _replacing(folder) as aside:
    _write_encoder(aside, encoder)
    _write_tokenizer(aside, checkpoint)
    if kind == "dense":
      _write_pylate(aside, checkpoint)
    elif head is not None:
      _write_head(aside / checkpoints.HEAD_FILE, head)
    _write_settings(aside / checkpoints.SETTINGS_FILE, checkpoint, kind)
    read = checkpoints.load(str(aside))
    for name in ("encoder", "head"):
      want, got = (
        jax.tree.structure(getattr(x, name)) for x in (checkpoint, read)
      )
      if got != want:
        raise ValueError(
          f"{name} must be made as its config says: it has other parts or "
          "settings and could not be read back"
        )
  return dataclasses.replace(
    checkpoint, layout=read.layout, folder=folder, sha256=read.sha256
  )


def _kind(head):
  """Where the parameters of a head go; see `checkpoints.Settings`."""
  if head is None:
    return "none"
  if isinstance(head, colberter.ColberterHead):
    return "colberter"
  if not isinstance(head, heads.Projection):
    raise TypeError(
      "head must be a Projection (`heads.from_matrix` makes one of a matrix), "
      f"a ColberterHead or None, got {type(head).__name__}"
    )
  if all(map(_is_dense, head.layers)):
    return "dense"
  if isinstance(head, heads.ProjectionHead):
    return "projection"
  raise ValueError(
    "head must be a ProjectionHead, whose config describes it, where a layer "
    "has a gate, a learned scale, or a residual that changes no width"
  )


def _is_dense(layer):
  """Whether PyLate has a word for a layer."""
  if not isinstance(layer, heads.ProjectionLayer) or layer.scale is not None:
    return False
  if layer.residual is None:
    return True
  inputs, outputs = layer.kernel.shape
  return inputs != outputs and not layer.identity_residual


def _write_encoder(folder, encoder):
  tensors = bert_weights.encoder_tensors(encoder)
  weights.write_tensors(folder / "model.safetensors", tensors)
  config = bert_weights.config_to_json(encoder.config)
  config["torch_dtype"] = str(next(iter(tensors.values())).dtype)
  _write_json(folder / "config.json", config)


def _write_tokenizer(folder, checkpoint):
  tokenizer = checkpoint.tokenizer
  tokenizer.save(str(folder / "tokenizer.json"))
  names = {**_SPECIAL_TOKENS, "mask_token": checkpoint.config.mask_token}
  known = {
    key: name
    for key, name in names.items()
    if tokenizer.token_to_id(name) is not None
  }
  _write_json(
    folder / "tokenizer_config.json",
    {
      "tokenizer_class": "PreTrainedTokenizerFast",
      "model_max_length": checkpoint.encoder.config.max_positions,
      "model_input_names": ["input_ids", "attention_mask"],
      **known,
    },
  )


def _write_pylate(folder, checkpoint):
  layers, config = checkpoint.head.layers, checkpoint.config
  kinds = {"": "sentence_transformers.models.Transformer"}
  for i, layer in enumerate(layers, 1):
    kinds[f"{i}_Dense"] = "pylate.models.Dense.Dense"
    _write_dense(folder / f"{i}_Dense", layer)
  modules = [
    {"idx": i, "name": str(i), "path": path, "type": kind}
    for i, (path, kind) in enumerate(kinds.items())
  ]
  _write_json(folder / "modules.json", modules)
  _write_json(
    folder / "config_sentence_transformers.json",
    {
      "prompts": {},
      "default_prompt_name": None,
      "similarity_fn_name": "MaxSim",
      "query_prefix": config.query_marker or "",
      "document_prefix": config.document_marker or "",
      "query_length": config.query_length,
      "document_length": config.document_length,
      "do_query_expansion": config.expand_queries,
      "attend_to_expansion_tokens": config.attend_to_expansion,
      "skiplist_words": list(config.skip_words),
    },
  )


def _write_dense(folder, layer):
  tensors = {"linear.weight": np.asarray(layer.kernel[...]).T}
  if layer.bias is not None:
    tensors["linear.bias"] = np.asarray(layer.bias[...])
  if layer.residual is not None:
    tensors["residual.weight"] = np.asarray(layer.residual[...]).T
  names = {name: key for key, name in checkpoints.TORCH_ACTIVATIONS.items()}
  config = {
    "in_features": layer.kernel.shape[0],
    "out_features": layer.kernel.shape[1],
    "bias": layer.bias is not None,
    "activation_function": names[layer.activation],
  }
  if layer.identity_residual or layer.residual is not None:
    config["use_residual"] = True  # PyLate before 1.3.3 does not know it
  folder.mkdir()
  _write_json(folder / "config.json", config)
  weights.write_tensors(folder / "model.safetensors", tensors)


def _write_head(path, head):
  names, leaves = weights.parameter_names(head), jax.tree.leaves(head)
  tensors = map(np.asarray, leaves)
  weights.write_tensors(path, dict(zip(names, tensors, strict=True)))


def _write_settings(path, checkpoint, kind):
  config = getattr(checkpoint.head, "config", None)
  settings = checkpoints.Settings(
    head=kind,
    config=checkpoint.config,
    method=checkpoint.method,
    projection=None if kind == "colberter" else config,
    colberter=config if kind == "colberter" else None,
  )
  said = {"format": checkpoints.FORMAT, **json_settings.to_json(settings)}
  _write_json(path, said)


def _write_json(path: pathlib.Path, value: Any) -> None:
  path.write_text(json.dumps(value, indent=1) + "\n")


@contextlib.contextmanager
def _replacing(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """A new folder to write to, which becomes `folder` when the block ends well.

  Between taking the old folder away and putting the new one in its place there
  is a moment without either, and never one with parts of both.
  """
  ours = (folder / checkpoints.SETTINGS_FILE).is_file()
  if folder.exists() and not ours and any(folder.iterdir()):
    raise FileExistsError(
      f"{folder} holds something that is not a saved model; nothing was written"
    )
  folder.parent.mkdir(parents=True, exist_ok=True)
  aside = folder.with_name(f".{folder.name}.{os.getpid()}")
  old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
  aside.mkdir()
  try:
    yield aside
    if folder.exists():
      folder.rename(old)
    aside.rename(folder)
  except BaseException:
    if old.exists() and not folder.exists():
      old.rename(folder)
    raise
  finally:
    shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)

"""Which tensor of a transformers file is which parameter of `Vit`."""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from tokjax import checks, files
from tokjax.models import vit, weights
from tokjax.models.weights import Source

__all__ = [
  "TABLES",
  "config_from_json",
  "load",
  "load_encoder",
  "save",
]


# CLIP and SigLIP name the parts of their vision tower alike.
_T = "vision_model.encoder.layers.{layer}"
_TOWER = {
  **weights.linear_table("patches", "vision_model.embeddings.patch_embedding"),
  "positions": Source(("vision_model.embeddings.position_embedding.weight",)),
  **weights.norm_table("blocks.norm_attention", f"{_T}.layer_norm1"),
  **weights.linear_table(
    "blocks.qkv",
    f"{_T}.self_attn.q_proj",
    f"{_T}.self_attn.k_proj",
    f"{_T}.self_attn.v_proj",
  ),
  **weights.linear_table("blocks.out", f"{_T}.self_attn.out_proj"),
  **weights.norm_table("blocks.norm_mlp", f"{_T}.layer_norm2"),
  **weights.linear_table("blocks.up", f"{_T}.mlp.fc1"),
  **weights.linear_table("blocks.down", f"{_T}.mlp.fc2"),
  **weights.norm_table("norm", "vision_model.post_layernorm"),
}
_CLIP = {
  **_TOWER,
  "class_token": Source(("vision_model.embeddings.class_embedding",)),
  **weights.norm_table("norm_input", "vision_model.pre_layrnorm"),
  "head.kernel": Source(("visual_projection.weight",), True),
}
_P = "vision_model.head"
_SIGLIP = {
  **_TOWER,
  "pool.probe": Source((f"{_P}.probe",)),
  "pool.qkv.kernel": Source((f"{_P}.attention.in_proj_weight",), True),
  "pool.qkv.bias": Source((f"{_P}.attention.in_proj_bias",)),
  **weights.linear_table("pool.out", f"{_P}.attention.out_proj"),
  **weights.norm_table("pool.norm", f"{_P}.layernorm"),
  **weights.linear_table("pool.up", f"{_P}.mlp.fc1"),
  **weights.linear_table("pool.down", f"{_P}.mlp.fc2"),
}

# ViT, DeiT and DINOv2 share the names of embeddings and attention.
_L = "encoder.layer.{layer}"
_COMMON = {
  **weights.linear_table("patches", "embeddings.patch_embeddings.projection"),
  "class_token": Source(("embeddings.cls_token",)),
  "positions": Source(("embeddings.position_embeddings",)),
  **weights.linear_table(
    "blocks.qkv",
    f"{_L}.attention.attention.query",
    f"{_L}.attention.attention.key",
    f"{_L}.attention.attention.value",
  ),
  **weights.linear_table("blocks.out", f"{_L}.attention.output.dense"),
  **weights.norm_table("norm", "layernorm"),
}
_VIT = {
  **_COMMON,
  **weights.norm_table("blocks.norm_attention", f"{_L}.layernorm_before"),
  **weights.norm_table("blocks.norm_mlp", f"{_L}.layernorm_after"),
  **weights.linear_table("blocks.up", f"{_L}.intermediate.dense"),
  **weights.linear_table("blocks.down", f"{_L}.output.dense"),
  **weights.linear_table("head", "classifier"),
}
_DEIT = {
  **_VIT,
  "distill_token": Source(("embeddings.distillation_token",)),
}
_DEIT_TEACHER = {
  **_DEIT,
  **weights.linear_table("head", "cls_classifier"),
  **weights.linear_table("distill_head", "distillation_classifier"),
}
_DINOV2 = {
  **_COMMON,
  "registers": Source(("embeddings.register_tokens",)),
  **weights.norm_table("blocks.norm_attention", f"{_L}.norm1"),
  **weights.norm_table("blocks.norm_mlp", f"{_L}.norm2"),
  "blocks.scale_attention": Source((f"{_L}.layer_scale1.lambda1",)),
  "blocks.scale_mlp": Source((f"{_L}.layer_scale2.lambda1",)),
  **weights.linear_table("blocks.up", f"{_L}.mlp.fc1"),
  **weights.linear_table("blocks.down", f"{_L}.mlp.fc2"),
}

TABLES: Mapping[str, Mapping[str, Source]] = {
  "clip": _CLIP,
  "siglip": _SIGLIP,
  "vit": _VIT,
  "deit": _DEIT,
  "deit_teacher": _DEIT_TEACHER,
  "dinov2": _DINOV2,
}

# Family of each `model_type`; two hold the vision part in `vision_config`.
_FAMILIES = {
  "clip": "clip",
  "clip_vision_model": "clip",
  "siglip": "siglip",
  "siglip_vision_model": "siglip",
  "vit": "vit",
  "deit": "deit",
  "dinov2": "dinov2",
  "dinov2_with_registers": "dinov2",
}
# Field of `VitConfig` -> key of `config.json` and the value that a file means
# which does not name it (files of CLIP and SigLIP leave defaults out).
_KEYS = {
  "image_size": ("image_size", 224),
  "patch_size": ("patch_size", 16),
  "num_channels": ("num_channels", 3),
  "width": ("hidden_size", 768),
  "num_layers": ("num_hidden_layers", 12),
  "num_heads": ("num_attention_heads", 12),
  "mlp_width": ("intermediate_size", 3072),
  "activation": ("hidden_act", "gelu"),
  "norm_epsilon": ("layer_norm_eps", 1e-12),
  "init_scale": ("initializer_range", 0.02),
}
_DEFAULTS = {
  "clip": {"patch_size": 32, "activation": "quick_gelu", "norm_epsilon": 1e-5},
  "siglip": {"activation": "gelu_pytorch_tanh", "norm_epsilon": 1e-6},
  "vit": {},
  "deit": {},
  "dinov2": {"patch_size": 14, "norm_epsilon": 1e-6},
}
_ACTIVATIONS = {
  "gelu": "gelu",
  "quick_gelu": "quick_gelu",
  "gelu_pytorch_tanh": "gelu_tanh",
}
# What a `config.json` may not ask for, with the only value that we have.
_FIXED = {
  "qkv_bias": True,
  "use_swiglu_ffn": False,
  "vision_use_head": True,
}
# In front of the encoder's names, by the class that saved the file.
_PREFIXES = ("", "vit.", "deit.", "dinov2.", "dinov2_with_registers.")
# Tensors that a file may hold and that we have no use for: index buffers, the
# text tower, the pooler of ViT and the mask token of DINOv2's training.
_IGNORED = re.compile(
  r"(.*\.)?position_ids"
  r"|text_model\..*|text_projection\.weight|logit_(scale|bias)"
  r"|(.*\.)?pooler\.dense\.(weight|bias)"
  r"|(.*\.)?embeddings\.mask_token"
)


def config_from_json(config: Mapping[str, Any]) -> vit.VitConfig:
  """Our shape of an encoder from the `config.json` of transformers.

  The linear layer after pooling is not named there: `load_encoder` finds it
  among the tensors.

  Args:
    config: the parsed file, of a vision model or of a pair (CLIP, SigLIP).

  Returns:
    The shape, without a linear head.

  Raises:
    ValueError: for another model type, activation or kind of block.

  Example:
    >>> config_from_json({"model_type": "dinov2", "image_size": 518}).grid
    (37, 37)
  """
  kind = config.get("model_type")
  checks.one_of(tuple(_FAMILIES), model_type=kind)
  family = _FAMILIES[kind]
  if kind in ("clip", "siglip"):
    config = config.get("vision_config") or {}
  for name, value in _FIXED.items():
    checks.one_of((value,), **{name: config.get(name, value)})
  defaults = _DEFAULTS[family]
  fields = {
    field: config.get(key, defaults.get(field, value))
    for field, (key, value) in _KEYS.items()
  }
  checks.one_of(tuple(_ACTIVATIONS), hidden_act=fields["activation"])
  fields["activation"] = _ACTIVATIONS[fields["activation"]]
  if family == "clip":
    fields |= {"patch_bias": False, "norm_input": True, "head_bias": False}
  elif family == "siglip":
    fields |= {"class_token": False, "pool": "attention"}
  elif family == "deit":
    fields["distill_token"] = True
  elif family == "dinov2":
    fields["mlp_width"] = int(fields["width"] * config.get("mlp_ratio", 4))
    fields["layer_scale"] = float(config.get("layerscale_value", 1.0))
  if kind == "dinov2_with_registers":
    fields["num_registers"] = config.get("num_register_tokens", 4)
    fields["antialias_positions"] = True
  return vit.VitConfig(**fields)


def load(source: str, *, revision: str | None = None) -> vit.Vit:
  """Reads a vision encoder with the head that its file holds.

  Args:
    source: a folder or a hub name; see `tokjax.models.weights.find`.
    revision: branch, tag or commit on the hub.

  Returns:
    The module, parameters in float32.

  Raises:
    FileNotFoundError: if there is no such checkpoint, or only a pickle.
    ValueError: for a damaged file, another architecture, or tensors that do
      not fit.
  """
  folder = weights.find(source, revision=revision)
  path = folder / "config.json"
  if not path.is_file():
    raise FileNotFoundError(f"{path} is not there")
  try:
    config = json.loads(path.read_text())
  except ValueError as error:  # cut, or not UTF-8
    raise ValueError(f"{path} is not JSON: {error}") from error
  tensors = weights.read_tensors(weights.weight_files(folder))
  return load_encoder(config, tensors)


def load_encoder(
  config: Mapping[str, Any],
  tensors: Mapping[str, np.ndarray],
  *,
  ignored: Iterable[str] = (),
) -> vit.Vit:
  """Builds the encoder that a `config.json` describes from its tensors.

  Args:
    config: the parsed `config.json`.
    tensors: all tensors of the file, by name. Of a pair of towers only the
      vision one is read.
    ignored: names that belong to somebody else.

  Returns:
    The module, parameters in float32; with a linear head where the file has
    a projection (CLIP) or a classifier (ViT, DeiT).

  Raises:
    ValueError: listing unknown names, missing names and wrong shapes.
  """
  shape = config_from_json(config)
  family = _FAMILIES[config["model_type"]]
  tensors = {
    name: x
    for name, x in tensors.items()
    if name not in set(ignored) and not _IGNORED.fullmatch(name)
  }
  if "distillation_classifier.weight" in tensors and family == "deit":
    family = "deit_teacher"
  table = TABLES[family]
  if "head.kernel" in table:
    (name,) = table["head.kernel"].names
    if name in tensors:
      count = tensors[name].shape[0]
      shape = dataclasses.replace(shape, num_outputs=count)
  shape = dataclasses.replace(shape, distill_head=family == "deit_teacher")
  table = _with_prefix(table, tensors)
  module = jax.eval_shape(lambda: vit.Vit(shape, rngs=nnx.Rngs(0)))
  return weights.fill(
    module, _flat(tensors, table), table, num_layers=shape.num_layers
  )


def save(folder: str | os.PathLike, encoder: vit.Vit) -> None:
  """Writes an encoder as a ViT folder of transformers; `load` reads it back.

  Args:
    folder: made if missing.
    encoder: with a class token and nothing that a ViT does not have:
      distillation token, registers, layer scale, norm of the input, pooling
      other than by the class token.

  Raises:
    ValueError: for another kind of encoder; names the field.

  Example:
    >>> import tempfile
    >>> config = vit.VitConfig(image_size=4, patch_size=2, width=4,
    ...                        num_layers=1, num_heads=1, mlp_width=4)
    >>> folder = tempfile.mkdtemp()
    >>> save(folder, vit.Vit(config, rngs=nnx.Rngs(0)))
    >>> load(folder).config == config
    True
  """
  config = encoder.config
  published = {
    "class_token": True,
    "distill_token": False,
    "num_registers": 0,
    "layer_scale": None,
    "norm_input": False,
    "antialias_positions": False,
    "pool": "class",
    "patch_bias": True,
    "head_bias": True,
  }
  for field, value in published.items():
    checks.one_of((value,), **{field: getattr(config, field)})
  names = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
  kind = "ViTForImageClassification" if config.num_outputs else "ViTModel"
  said = {
    "architectures": [kind],
    "model_type": "vit",
    **{key: getattr(config, field) for field, (key, _) in _KEYS.items()},
    "hidden_act": names[config.activation],
    "qkv_bias": True,
  }
  if config.num_outputs:
    labels = {str(i): f"LABEL_{i}" for i in range(config.num_outputs)}
    said["id2label"] = labels
    said["label2id"] = {name: int(i) for i, name in labels.items()}
  table = TABLES["vit"]
  if config.num_outputs:
    table = _prefixed(table, "vit.")
  tensors = weights.to_tensors(encoder, table)
  patches = table["patches.kernel"].names[0]
  size = (config.patch_size, config.patch_size, config.num_channels)
  tensors[patches] = (
    tensors[patches].reshape(-1, *size).transpose(0, 3, 1, 2)
  )  # [D, C, p, p]
  for target in ("class_token", "positions"):
    name = table[target].names[0]
    rows = tensors[name].reshape(-1, config.width)
    tensors[name] = rows[None]  # [1, N, D]
  folder = pathlib.Path(folder)
  with files.replacing(folder / "model.safetensors") as aside:
    weights.write_tensors(aside, tensors)
  with files.replacing(folder / "config.json") as aside:
    aside.write_text(json.dumps(said, indent=2) + "\n")


def _with_prefix(table, tensors):
  """The table with the prefix that the names of this file have."""
  mark = table["positions"].names[0]
  prefixes = [p for p in _PREFIXES if p + mark in tensors]
  if not prefixes:
    raise ValueError(
      f"no positions {mark!r} under any of the prefixes {_PREFIXES}; the "
      f"file holds {sorted(tensors)[:8]} ..."
    )
  return _prefixed(table, prefixes[0])


def _prefixed(table, prefix):
  return {
    target: source
    if target.startswith(("head.", "distill_head."))
    else Source(tuple(prefix + n for n in source.names), source.transpose)
    for target, source in table.items()
  }


# Parameters that torch keeps with leading axes of size 1, by our rank.
_RANKS = {
  "class_token": 1,
  "distill_token": 1,
  "pool.probe": 1,
  "positions": 2,
  "registers": 2,
}


def _flat(tensors, table):
  """The tensors in the layout of ours that a table cannot express."""
  tensors = dict(tensors)
  name = table["patches.kernel"].names[0]
  if name in tensors and tensors[name].ndim == 4:
    kernel = tensors[name].transpose(0, 2, 3, 1)  # [D, p, p, C]
    tensors[name] = kernel.reshape(kernel.shape[0], -1)
  for target, rank in _RANKS.items():
    name = table[target].names[0] if target in table else None
    if name in tensors:
      shape = tensors[name].shape
      extra = len(shape) - rank
      if extra > 0 and shape[:extra] == (1,) * extra:
        tensors[name] = tensors[name].reshape(shape[extra:])
  return tensors

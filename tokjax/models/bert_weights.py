"""Which tensor of a transformers file is which parameter of `Bert`."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from tokjax import checks
from tokjax.models import bert, weights
from tokjax.models.weights import Source

__all__ = [
  "BERT_TABLE",
  "DISTILBERT_TABLE",
  "config_from_json",
  "config_to_json",
  "encoder_tensors",
  "load_encoder",
]


_B = "encoder.layer.{layer}"
BERT_TABLE: Mapping[str, Source] = {
  "words.embedding": Source(("embeddings.word_embeddings.weight",)),
  "positions.embedding": Source(("embeddings.position_embeddings.weight",)),
  "segments.embedding": Source(("embeddings.token_type_embeddings.weight",)),
  **weights.norm_table("norm", "embeddings.LayerNorm"),
  **weights.linear_table(
    "blocks.qkv",
    f"{_B}.attention.self.query",
    f"{_B}.attention.self.key",
    f"{_B}.attention.self.value",
  ),
  **weights.linear_table("blocks.out", f"{_B}.attention.output.dense"),
  **weights.norm_table(
    "blocks.norm_attention", f"{_B}.attention.output.LayerNorm"
  ),
  **weights.linear_table("blocks.up", f"{_B}.intermediate.dense"),
  **weights.linear_table("blocks.down", f"{_B}.output.dense"),
  **weights.norm_table("blocks.norm_mlp", f"{_B}.output.LayerNorm"),
}

_D = "transformer.layer.{layer}"
DISTILBERT_TABLE: Mapping[str, Source] = {
  "words.embedding": Source(("embeddings.word_embeddings.weight",)),
  "positions.embedding": Source(("embeddings.position_embeddings.weight",)),
  **weights.norm_table("norm", "embeddings.LayerNorm"),
  **weights.linear_table(
    "blocks.qkv",
    f"{_D}.attention.q_lin",
    f"{_D}.attention.k_lin",
    f"{_D}.attention.v_lin",
  ),
  **weights.linear_table("blocks.out", f"{_D}.attention.out_lin"),
  **weights.norm_table("blocks.norm_attention", f"{_D}.sa_layer_norm"),
  **weights.linear_table("blocks.up", f"{_D}.ffn.lin1"),
  **weights.linear_table("blocks.down", f"{_D}.ffn.lin2"),
  **weights.norm_table("blocks.norm_mlp", f"{_D}.output_layer_norm"),
}

_TABLES = {"bert": BERT_TABLE, "distilbert": DISTILBERT_TABLE}
_ARCHITECTURES = {"bert": "BertModel", "distilbert": "DistilBertModel"}
# Field of `BertConfig` -> key of `config.json`: those that must be there, and
# those whose defaults there are our defaults.
_KEYS = {
  "bert": (
    {
      "vocab_size": "vocab_size",
      "width": "hidden_size",
      "num_layers": "num_hidden_layers",
      "num_heads": "num_attention_heads",
      "mlp_width": "intermediate_size",
      "max_positions": "max_position_embeddings",
    },
    {
      "num_segments": "type_vocab_size",
      "norm_epsilon": "layer_norm_eps",
      "dropout_rate": "hidden_dropout_prob",
      "attention_dropout_rate": "attention_probs_dropout_prob",
      "init_scale": "initializer_range",
    },
  ),
  "distilbert": (
    {
      "vocab_size": "vocab_size",
      "width": "dim",
      "num_layers": "n_layers",
      "num_heads": "n_heads",
      "mlp_width": "hidden_dim",
      "max_positions": "max_position_embeddings",
    },
    {
      "dropout_rate": "dropout",
      "attention_dropout_rate": "attention_dropout",
      "init_scale": "initializer_range",
    },
  ),
}
# In front of the encoder's names, by the class that saved the file.
_PREFIXES = ("", "bert.", "distilbert.", "model.")
# Tensors that an encoder file may hold and that we have no use for: index
# buffers, the pooler, language-model and sentence-order heads.
_IGNORED = re.compile(
  r"(.*\.)?(position_ids|token_type_ids)"
  r"|(.*\.)?pooler\.dense\.(weight|bias)"
  r"|cls\..*"
  r"|vocab_(transform|layer_norm|projector)\.(weight|bias)"
)


def config_from_json(config: Mapping[str, Any]) -> bert.BertConfig:
  """Our shape of an encoder from the `config.json` of transformers.

  Raises:
    ValueError: for another model type, activation or kind of positions.
  """
  kind = config.get("model_type")
  checks.one_of(tuple(_TABLES), model_type=kind)
  activation = config.get(
    "activation" if kind == "distilbert" else "hidden_act", "gelu"
  )
  checks.one_of(("gelu",), activation=activation)
  positions = config.get("position_embedding_type", "absolute")
  checks.one_of(("absolute",), position_embedding_type=positions)
  needed, optional = _KEYS[kind]
  missing = sorted(key for key in needed.values() if key not in config)
  if missing:
    raise ValueError(f"config.json of a {kind} lacks {missing}")
  fields = {
    field: config[key]
    for field, key in {**needed, **optional}.items()
    if key in config
  }
  if kind == "distilbert":
    fields["num_segments"] = 0
  return bert.BertConfig(**fields)


def config_to_json(config: bert.BertConfig) -> dict[str, Any]:
  """The `config.json` of transformers for an encoder; `config_from_json` back.

  Args:
    config: with segments it is written as a BERT, without as a DistilBERT.

  Raises:
    ValueError: for an encoder without segments and another `norm_epsilon`
      than 1e-12, which is neither.

  Example:
    >>> config_to_json(bert.BertConfig(num_layers=3))["num_hidden_layers"]
    3
  """
  kind = _kind(config)
  needed, optional = _KEYS[kind]
  keys = {**needed, **optional}
  if kind == "distilbert":
    checks.one_of((1e-12,), norm_epsilon=config.norm_epsilon)
  return {
    "architectures": [_ARCHITECTURES[kind]],
    "model_type": kind,
    "activation" if kind == "distilbert" else "hidden_act": "gelu",
    **{key: getattr(config, field) for field, key in keys.items()},
  }


def encoder_tensors(encoder: bert.Bert) -> dict[str, np.ndarray]:
  """The tensors of an encoder by their names in transformers.

  Args:
    encoder: BERT, or DistilBERT if it has no segments.

  Returns:
    What `load_encoder` takes, in the dtypes of the parameters.

  Example:
    >>> config = bert.BertConfig(vocab_size=9, width=4, num_layers=1,
    ...                          num_heads=1, mlp_width=4, max_positions=3)
    >>> encoder = bert.Bert(config, rngs=nnx.Rngs(0))
    >>> found = encoder_tensors(encoder)
    >>> found["embeddings.word_embeddings.weight"].shape
    (9, 4)
  """
  return weights.to_tensors(encoder, _TABLES[_kind(encoder.config)])


def load_encoder(
  config: Mapping[str, Any],
  tensors: Mapping[str, np.ndarray],
  *,
  ignored: Iterable[str] = (),
) -> bert.Bert:
  """Builds the encoder that a `config.json` describes from its tensors.

  Args:
    config: the parsed `config.json`.
    tensors: all tensors of the file, by name.
    ignored: names that belong to somebody else, such as a projection head.

  Returns:
    The module, parameters in float32.

  Raises:
    ValueError: listing unknown names, missing names and wrong shapes.
  """
  shape = config_from_json(config)
  table = _TABLES[config["model_type"]]
  # Checkpoints that came from TensorFlow call the two norm parameters so.
  tensors = {
      re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight",
             re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)): x
      for name, x in tensors.items()
      if name not in set(ignored) and not _IGNORED.fullmatch(name)
  }  # fmt: skip
  words = table["words.embedding"].names[0]
  prefixes = [p for p in _PREFIXES if p + words in tensors]
  if not prefixes:
    raise ValueError(
      f"no word table {words!r} under any of the prefixes {_PREFIXES}; the "
      f"file holds {sorted(tensors)[:8]} ..."
    )
  module = jax.eval_shape(lambda: bert.Bert(shape, rngs=nnx.Rngs(0)))
  return weights.fill(
    module,
    tensors,
    {
      target: Source(
        tuple(prefixes[0] + name for name in source.names),
        source.transpose,
      )
      for target, source in table.items()
    },
    num_layers=shape.num_layers,
  )


def _kind(config):
  return "bert" if config.num_segments else "distilbert"

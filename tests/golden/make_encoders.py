"""Writes the stored encoders and embeddings; needs torch and transformers.

    python tests/golden/make_encoders.py tiny
    python tests/golden/make_encoders.py minilm SCIFACT_FOLDER

"tiny": random BERT and DistilBERT folders as transformers saves them, with
what transformers computes for a padded batch. "minilm": sentence-transformers'
embeddings (mean pooled, unit length) of the first 100 documents of SciFact,
title + " " + text, by all-MiniLM-L6-v2; the texts are not stored.
"""

import json
import pathlib
import sys

import numpy as np

GOLDEN = pathlib.Path(__file__).parent
KINDS = {
  "bert_tiny": {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 24,
  },
  "distilbert_tiny": {
    "vocab_size": 60,
    "dim": 16,
    "n_layers": 3,
    "n_heads": 2,
    "hidden_dim": 24,
    "max_position_embeddings": 20,
  },
}


def torch_encoder(name: str, settings: dict, seed: int):
  """A random transformers encoder with weights large enough to matter."""
  import torch
  import transformers

  torch.manual_seed(seed)
  if name.startswith("distilbert"):
    config = transformers.DistilBertConfig(**settings)
    model = transformers.DistilBertModel(config)
  else:
    config = transformers.BertConfig(**settings)
    model = transformers.BertModel(config, add_pooling_layer=False)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.2 * torch.randn_like(parameter))
  return model.eval()


def example(settings: dict, seed: int = 0, batch: int = 3, length: int = 9):
  """Random ids with right padding: lengths 9, 5, 1, ..."""
  rng = np.random.default_rng(seed)
  ids = rng.integers(0, settings["vocab_size"], (batch, length))
  lengths = np.maximum(length - 4 * np.arange(batch), 1)
  return ids.astype(np.int32), np.arange(length)[None] < lengths[:, None]


def torch_hidden(model, ids, mask) -> np.ndarray:
  import torch

  with torch.inference_mode():
    out = model(
      torch.tensor(ids.astype(np.int64)),
      attention_mask=torch.tensor(mask.astype(np.int64)),
    )
  return out.last_hidden_state.numpy()


def main(what: str, *arguments: str) -> None:
  if what == "tiny":
    for name, settings in KINDS.items():
      model = torch_encoder(name, settings, seed=0)
      model.save_pretrained(GOLDEN / name, safe_serialization=True)
      ids, mask = example(settings)
      np.savez(
        GOLDEN / name / "hidden.npz",
        ids=ids,
        mask=mask,
        hidden=torch_hidden(model, ids, mask),
      )
  elif what == "minilm":
    import sentence_transformers

    from tokjax.models import weights

    corpus = pathlib.Path(arguments[0]) / "corpus.jsonl"
    rows = [json.loads(line) for line in corpus.read_text().splitlines()[:100]]
    model = sentence_transformers.SentenceTransformer(
      str(weights.find("all-MiniLM-L6-v2")), device="cpu"
    )
    np.savez(
      GOLDEN / "minilm_scifact100.npz",
      embeddings=model.encode(
        [f"{row['title']} {row['text']}".strip() for row in rows],
        normalize_embeddings=True,
      ),
    )
  else:
    raise SystemExit(__doc__)


if __name__ == "__main__":
  main(*sys.argv[1:])

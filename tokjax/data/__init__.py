"""Data sets: a user's own files, BEIR folders, installed docstrings, images.

- `tokjax.data.beir`: folders in the BEIR layout.
- `tokjax.data.pydocs`: the docstrings of the packages installed beside us.
- `tokjax.data.corpus`: the documents a user wants to encode or index.
- `tokjax.data.training_set`: what a retriever learns from; `triples` reads it
  from files, `hard_negatives` adds negatives.
- `tokjax.data.batches`: its batches, resumable and cut among processes
  (`schedule` says which examples each holds).
- `tokjax.data.records`: any of them as ArrayRecord tables for grain.
- `tokjax.data.cifar10`: labelled images; `image_batches` augments them.
"""

__all__ = [
  "batches",
  "beir",
  "cifar10",
  "corpus",
  "hard_negatives",
  "image_batches",
  "pydocs",
  "records",
  "retrieval_set",
  "schedule",
  "training_set",
  "triples",
]

"""Data sets: a user's own files, BEIR folders, installed docstrings, images.

- `tokjax.data.beir`: folders in the BEIR layout.
- `tokjax.data.pydocs`: the docstrings of the packages installed beside us.
- `tokjax.data.corpus`: the documents a user wants to encode or index.
- `tokjax.data.training_set`: what a retriever learns from; `triples` reads it
  from files, `hard_negatives` adds negatives.
- `tokjax.data.batches`: its batches, resumable and cut among processes
  (`schedule` says which examples each holds).
- `tokjax.data.records`: any of them as ArrayRecord tables for grain.
- `tokjax.data.cifar10`: labelled images; `image_sets`: those of folders, arrays
  and TFDS; `image_batches`, `image_crops` augment them.
- `tokjax.data.meshes`: surfaces and solids from files; `solids`: made up ones.
- `tokjax.data.interactions`: who chose what after what; `pyapi` makes such a
  set of installed packages, `cooccurrence` features of one.
"""

__all__ = [
  "batches",
  "beir",
  "cifar10",
  "cooccurrence",
  "corpus",
  "hard_negatives",
  "image_batches",
  "image_crops",
  "image_sets",
  "interactions",
  "meshes",
  "pyapi",
  "pydocs",
  "records",
  "retrieval_set",
  "schedule",
  "solids",
  "training_set",
  "triples",
]

"""`tokjax encode`: a corpus as one file of token vectors."""

import argparse
import dataclasses
import json
import os
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from tokjax import files
from tokjax.cli.evaluate import DEFAULT_MODEL
from tokjax.data import corpus
from tokjax.models import checkpoints, json_settings
from tokjax.retrieval import colbert, methods

__all__ = ["EncodedCorpus", "encode_corpus", "main", "read", "write"]


class EncodedCorpus(NamedTuple):
  """A corpus that has been encoded.

  Attributes:
    ids: one string per document.
    texts: one text per document, as it was encoded.
    documents: the vectors that `method` keeps.
    model: where the checkpoint came from.
    sha256: of its weights.
    method: what was made of the tokens.
  """

  ids: list[str]
  texts: list[str]
  documents: colbert.Documents
  model: str
  sha256: str
  method: methods.Method = methods.Method()


def encode_corpus(
  path: str | os.PathLike,
  model: str = DEFAULT_MODEL,
  *,
  method: methods.Method | None = None,
  dtype: str = "float32",
  progress: bool = True,
) -> EncodedCorpus:
  """Reads and encodes a user's corpus.

  Args:
    path: what `tokjax.data.corpus.load` reads.
    model: what `tokjax.models.checkpoints.load` reads.
    method: what is made of the tokens; None for what the model was made for.
    dtype: the encoder computes in this.
    progress: show a progress bar.

  Returns:
    The encoded corpus.

  Raises:
    ValueError: for a corpus or checkpoint that is not there or damaged, or a
      method that the model cannot be used by.
  """
  texts = corpus.load(path)
  checkpoint = checkpoints.load(model)
  if method is not None:
    checkpoint = dataclasses.replace(checkpoint, method=method)
  documents = methods.encode_documents(
    texts.texts, checkpoint, dtype=dtype, progress=progress
  )
  return EncodedCorpus(
    list(texts.ids),
    texts.texts,
    documents,
    model,
    checkpoint.sha256,
    checkpoint.method,
  )


def write(path: str | os.PathLike, encoded: EncodedCorpus) -> None:
  """Writes an encoded corpus as safetensors; token vectors as float16.

  Args:
    path: the file; written aside and renamed.
    encoded: what to write.
  """
  documents = encoded.documents
  facts = {
    "ids": json.dumps(encoded.ids),
    "texts": json.dumps(encoded.texts),
    "model": encoded.model,
    "sha256": encoded.sha256,
    "method": json.dumps(json_settings.to_json(encoded.method)),
  }
  arrays = {
    "tokens": np.asarray(documents.tokens, np.float16),
    "offsets": documents.offsets,
    "pooled": documents.pooled,
  }
  if documents.word_ids is not None:
    arrays["word_ids"] = documents.word_ids
  with files.replacing(path) as aside:
    safetensors.numpy.save_file(arrays, aside, metadata=facts)


def read(path: str | os.PathLike) -> EncodedCorpus:
  """Reads what `write` wrote.

  Args:
    path: the file.

  Returns:
    The encoded corpus, vectors float16. A file that names no method holds
    every token vector: ColBERT.

  Raises:
    ValueError: if the file is truncated, damaged or something else.
  """
  try:
    with safetensors.safe_open(os.fspath(path), framework="numpy") as file:
      facts = file.metadata() or {}
      arrays = {name: file.get_tensor(name) for name in file.keys()}
  except safetensors.SafetensorError as error:
    raise ValueError(f"{path} is not a complete file: {error}") from error
  missing = {"ids", "texts", "model", "sha256"} - facts.keys()
  missing |= {"tokens", "offsets", "pooled"} - arrays.keys()
  if missing:
    raise ValueError(
      f"{path} was not written by `tokjax encode`: no {sorted(missing)}"
    )
  method = json_settings.from_json(
    methods.Method,
    json.loads(facts.get("method", "{}")),
    source=f"{path}: method",
  )
  return EncodedCorpus(
    json.loads(facts["ids"]),
    json.loads(facts["texts"]),
    colbert.Documents(
      arrays["tokens"],
      arrays["offsets"],
      arrays["pooled"],
      arrays.get("word_ids"),
    ),
    facts["model"],
    facts["sha256"],
    method,
  )


def main(argv: list[str]) -> int:
  """Encodes a corpus; see `tokjax encode --help`."""
  parser = argparse.ArgumentParser(
    prog="tokjax encode",
    description="Encodes a corpus into one file of vectors (float16), by the"
    " method that the model was made for; `tokjax index` takes it in place of"
    " the corpus.",
  )
  add = parser.add_argument
  add(
    "corpus",
    help="a .jsonl file (_id or id, text, maybe title), a folder in BEIR"
    " layout, or a folder of .txt and .md files",
  )
  add("file", help="the .safetensors file to write")
  add("--model", default=DEFAULT_MODEL, help="folder, package or hub name")
  add("--dtype", default="float32", choices=("float32", "bfloat16"))
  add("--json", action="store_true", help="print the counts as JSON")
  options = parser.parse_args(argv)
  encoded = encode_corpus(
    options.corpus,
    options.model,
    dtype=options.dtype,
    progress=not options.json,
  )
  write(options.file, encoded)
  counts = {
    "file": options.file,
    "documents": len(encoded.ids),
    "tokens": len(encoded.documents.tokens),
    "bytes": os.path.getsize(options.file),
    "sha256": encoded.sha256,
  }
  if options.json:
    print(json.dumps(counts))
  else:
    print(
      "{file}: {documents:,} documents, {tokens:,} tokens, {bytes:,} bytes;"
      " model sha256 {sha256}".format(**counts)
    )
  return 0

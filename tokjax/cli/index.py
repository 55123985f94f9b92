"""`tokjax index`: a corpus as a searchable index in a folder."""

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from tokjax import checks
from tokjax.cli import encode
from tokjax.cli.evaluate import DEFAULT_MODEL
from tokjax.retrieval import (
  codecs,
  colbert,
  index_files,
  muvera,
  token_index,
)

__all__ = ["IndexConfig", "load", "main", "write"]

# Named in the metadata of every index written here.
_FORMAT = "tokjax index 1"


@dataclasses.dataclass(unsafe_hash=True)
class IndexConfig:
  """How an index is built."""

  model: str = DEFAULT_MODEL  # what encodes queries: folder, package, hub name
  codec: str = "int8"  # how tokens are stored, a name of codecs.NAMES
  fde: int = 10240  # width of MUVERA encodings for candidates; 0 for none
  # Do empty cells of a document borrow a token, as published? Not by default:
  # on the zero-shot tokens of sentence encoders it lowers recall.
  fill_empty: bool = False
  seed: int = 0  # of the codec's clusters and the MUVERA hyperplanes


def write(
  folder: str | os.PathLike,
  ids: Sequence[str],
  texts: Sequence[str],
  documents: colbert.Documents,
  sha256: str,
  config: IndexConfig,
  *,
  add: bool = False,
  replace: bool = False,
) -> index_files.StoredIndex:
  """Builds an index, or adds documents to one.

  Args:
    folder: where it goes: a local path or a bucket URL.
    ids: one string per document.
    texts: one text per document, kept to be shown.
    documents: their token vectors and pooled vectors.
    sha256: of the model's weights, kept so that queries meet the same model.
    config: how to build; ignored where `add` finds an index, whose own counts.
    add: add to the index that is there.
    replace: remove an index that is there first; local folders only.

  Returns:
    The index on disk, opened.

  Raises:
    ValueError: if the index there was made with another model.
    WriterConflictError: if there is an index and neither was asked for, or
      somebody else writes to it.
  """
  if replace and (pathlib.Path(folder) / "manifest-00000001.json").exists():
    shutil.rmtree(folder)
  if add:
    stored = index_files.open_index(folder)
    config = _config(stored)
    if stored.metadata["sha256"] != sha256:
      raise ValueError(
        f"index {folder} was made with the weights "
        f"{stored.metadata['sha256'][:16]}..., got {sha256[:16]}..."
      )
    codec = stored.codec()
  else:
    checks.one_of(codecs.NAMES, codec=config.codec)
    checks.one_of((0, *muvera.PRESETS), fde=config.fde)
    key = jax.random.key(config.seed)
    codec = codecs.train(
      config.codec,
      key,
      documents.tokens[:: max(1, len(documents.tokens) // 65536)],
      num_tokens=len(documents.tokens),
    )
    index_files.create(
      folder,
      codec,
      metadata={
        "format": _FORMAT,
        "sha256": sha256,
        **dataclasses.asdict(config),
      },
    )
  vectors = {"pooled": documents.pooled.astype(np.float16)}
  if config.fde:
    params, settings = _fde(config, documents.tokens.shape[1])
    fde = muvera.encode_corpus(
      params, settings, documents.tokens, documents.offsets
    )
    vectors["fde"] = fde.astype(np.float16)
  return index_files.add(
    folder,
    ids,
    codecs.encode_corpus(codec, documents.tokens),
    documents.offsets,
    vectors=vectors,
    texts=texts,
  )


def load(
  stored: index_files.StoredIndex,
) -> tuple[token_index.TokenIndex, list[str], list[str]]:
  """The documents of an index on disk, in memory and ready to be searched.

  Args:
    stored: an index that `write` made.

  Returns:
    The index, with the candidate sets "pooled" and (if built) "fde"; the id
    and the text of each document.

  Raises:
    ValueError: if it was made by something else, or is empty.
    DamagedIndexError: if a file fails its checksum.
  """
  config = _config(stored)
  found = stored.load()
  if not found.ids:
    raise ValueError(f"index {stored.folder} holds no documents")
  codec = stored.codec()
  candidates = {
    "pooled": token_index.store_vectors(found.vectors["pooled"], name="float16")
  }
  if "fde" in found.vectors:
    params, settings = _fde(config, codec.dim)
    candidates["fde"] = token_index.store_vectors(
      found.vectors["fde"],
      name="float16",
      fde_params=params,
      fde_config=settings,
    )
  index = token_index.from_payload(
    codec, found.payload, found.offsets, candidates=candidates
  )
  return index, found.ids, found.texts


def _config(stored: index_files.StoredIndex) -> IndexConfig:
  facts: dict[str, Any] = stored.metadata
  if facts.get("format") != _FORMAT:
    raise ValueError(
      f"index {stored.folder} was not made by `tokjax index`: format "
      f"{facts.get('format')!r} instead of {_FORMAT!r}"
    )
  names = [field.name for field in dataclasses.fields(IndexConfig)]
  return IndexConfig(**{name: facts[name] for name in names})


def _fde(config, dim):
  settings = muvera.FDEConfig(
    dim=dim, fill_empty=config.fill_empty, **muvera.PRESETS[config.fde]
  )
  return muvera.init(jax.random.key(config.seed + 1), settings), settings


def main(argv: list[str]) -> int:
  """Builds an index; see `tokjax index --help`."""
  parser = argparse.ArgumentParser(
    prog="tokjax index",
    description="Encodes a corpus and builds an index that `tokjax search`"
    " opens. A build that is interrupted leaves what was there before.",
  )
  default = IndexConfig()
  add = parser.add_argument
  add(
    "corpus",
    help="a .jsonl file (_id or id, text, maybe title), a folder in BEIR"
    " layout, a folder of .txt and .md files, or a file of `tokjax encode`",
  )
  add("index", help="folder to write (or gs://, s3:// URL)")
  add("--model", default=default.model, help="folder, package or hub name")
  add("--codec", default=default.codec, choices=codecs.NAMES)
  add(
    "--fde",
    type=int,
    default=default.fde,
    choices=(0, *muvera.PRESETS),
    help="width of the MUVERA encodings that find candidates; 0 for none",
  )
  add("--dtype", default="float32", choices=("float32", "bfloat16"))
  add("--add", action="store_true", help="add to the index that is there")
  add("--json", action="store_true", help="print the counts as JSON")
  options = parser.parse_args(argv)
  if pathlib.Path(options.corpus).suffix == ".safetensors":
    encoded = encode.read(options.corpus)
  else:
    encoded = encode.encode_corpus(
      options.corpus,
      options.model,
      dtype=options.dtype,
      progress=not options.json,
    )
  start = time.perf_counter()
  stored = write(
    options.index,
    encoded.ids,
    encoded.texts,
    encoded.documents,
    encoded.sha256,
    IndexConfig(model=encoded.model, codec=options.codec, fde=options.fde),
    add=options.add,
  )
  counts = {
    "index": options.index,
    "version": stored.version,
    "documents": stored.num_documents,
    "bytes_per_document": round(stored.num_bytes / stored.num_documents),
    "build_seconds": round(time.perf_counter() - start, 2),
  }
  if options.json:
    print(json.dumps(counts))
  else:
    print(
      "{index}: version {version}, {documents:,} documents,"
      " {bytes_per_document:,} bytes each, built in {build_seconds} s".format(
        **counts
      )
    )
  return 0

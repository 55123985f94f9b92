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
from tokjax.models import json_settings
from tokjax.retrieval import (
  codecs,
  colbert,
  crisp,
  index_files,
  methods,
  muvera,
  token_index,
)

__all__ = ["IndexConfig", "load", "main", "read_config", "write"]

# Named in the metadata of every index written here.
_FORMAT = "tokjax index 1"


@dataclasses.dataclass(unsafe_hash=True)
class IndexConfig:
  """How an index is built."""

  model: str = DEFAULT_MODEL  # what encodes queries: folder, package, hub name
  # What documents were encoded by, and queries will be.
  method: methods.Method = methods.Method()
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
    documents: their vectors, as `methods.encode_documents` gives them for
      the method of the config.
    sha256: of the model's weights, kept so that queries meet the same model.
    config: how to build; where `add` finds an index, its own counts, and must
      name the same method.
    add: add to the index that is there.
    replace: remove an index that is there first; local folders only.

  Returns:
    The index on disk, opened.

  Raises:
    ValueError: if the index there was made with another model or method, or
      MUVERA encodings are asked of ColBERTer.
    WriterConflictError: if there is an index and neither was asked for, or
      somebody else writes to it.
  """
  if replace and (pathlib.Path(folder) / "manifest-00000001.json").exists():
    shutil.rmtree(folder)
  if add:
    stored = index_files.open_index(folder)
    found, config = config.method, read_config(stored)
    if stored.metadata["sha256"] != sha256:
      raise ValueError(
        f"index {folder} was made with the weights "
        f"{stored.metadata['sha256'][:16]}..., got {sha256[:16]}..."
      )
    if found != config.method:
      raise ValueError(
        f"index {folder} was made by {config.method}, got {found}"
      )
    codec = stored.codec()
  else:
    checks.one_of(codecs.NAMES, codec=config.codec)
    checks.one_of((0, *muvera.PRESETS), fde=config.fde)
    if config.fde and config.method.name == "colberter":
      raise ValueError(
        f"fde must be 0 for ColBERTer, whose text vectors find candidates, got "
        f"{config.fde}"
      )
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
        **json_settings.to_json(config),
      },
    )
  vectors = {config.method.vectors: documents.pooled.astype(np.float16)}
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
    word_ids=documents.word_ids,
  )


def load(
  stored: index_files.StoredIndex,
) -> tuple[token_index.TokenIndex, list[str], list[str]]:
  """The documents of an index on disk, in memory and ready to be searched.

  Args:
    stored: an index that `write` made.

  Returns:
    The index, with the candidate sets "pooled" (of ColBERTer "cls") and, if
    built, "fde", and the word ids of ColBERTer with exact match; the id and
    the text of each document.

  Raises:
    ValueError: if it was made by something else, or is empty.
    DamagedIndexError: if a file fails its checksum.
  """
  config = read_config(stored)
  found = stored.load()
  if not found.ids:
    raise ValueError(f"index {stored.folder} holds no documents")
  codec, name = stored.codec(), config.method.vectors
  candidates = {
    name: token_index.store_vectors(found.vectors[name], name="float16")
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
    codec,
    found.payload,
    found.offsets,
    candidates=candidates,
    word_ids=found.word_ids,
  )
  return index, found.ids, found.texts


def read_config(stored: index_files.StoredIndex) -> IndexConfig:
  """How an index on disk was built.

  Args:
    stored: an index that `write` made; one that names no method was made by
      ColBERT's.

  Returns:
    The config given to `write`.

  Raises:
    ValueError: if it was made by something else.
  """
  facts: dict[str, Any] = stored.metadata
  if facts.get("format") != _FORMAT:
    raise ValueError(
      f"index {stored.folder} was not made by `tokjax index`: format "
      f"{facts.get('format')!r} instead of {_FORMAT!r}"
    )
  names = [field.name for field in dataclasses.fields(IndexConfig)]
  return json_settings.from_json(
    IndexConfig,
    {name: facts[name] for name in names if name in facts},
    source=f"metadata of index {stored.folder}",
  )


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
  add(
    "--method",
    choices=("colbert", "xtr", "crisp"),
    help="what is made of a model's tokens (default: what it was made for)",
  )
  add(
    "--crisp",
    choices=tuple(crisp.PRESETS),
    help="with --method crisp: how many means; C8x32 has 8 of a query and 32"
    " of a document, C25 a quarter of the tokens of each",
  )
  add(
    "--k-prime",
    type=int,
    metavar="N",
    help="with --method xtr: tokens that a query token retrieves"
    f" (default: {methods.Method().k_prime})",
  )
  add("--codec", default=default.codec, choices=codecs.NAMES)
  add(
    "--fde",
    type=int,
    choices=(0, *muvera.PRESETS),
    help="width of the MUVERA encodings that find candidates; 0 for none"
    f" (default: {default.fde}; 0 for XTR and ColBERTer, which use none)",
  )
  add("--dtype", default="float32", choices=("float32", "bfloat16"))
  add("--add", action="store_true", help="add to the index that is there")
  add("--json", action="store_true", help="print the counts as JSON")
  options = parser.parse_args(argv)
  method = _asked_method(options)
  if pathlib.Path(options.corpus).suffix == ".safetensors":
    encoded = _changed(encode.read(options.corpus), method)
  else:
    encoded = encode.encode_corpus(
      options.corpus,
      options.model,
      method=method,
      dtype=options.dtype,
      progress=not options.json,
    )
  fde = options.fde
  if fde is None:
    uses = encoded.method.name in ("colbert", "crisp")
    fde = default.fde if uses else 0
  start = time.perf_counter()
  stored = write(
    options.index,
    encoded.ids,
    encoded.texts,
    encoded.documents,
    encoded.sha256,
    IndexConfig(
      model=encoded.model,
      method=encoded.method,
      codec=options.codec,
      fde=fde,
    ),
    add=options.add,
  )
  counts = {
    "index": options.index,
    "version": stored.version,
    "method": encoded.method.name,
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


def _asked_method(options) -> methods.Method | None:
  """What the command line asks for; None for what model or file say."""
  if options.crisp is not None and options.method != "crisp":
    raise ValueError("--crisp needs --method crisp")
  if options.k_prime is not None and options.method != "xtr":
    raise ValueError("--k-prime needs --method xtr")
  if options.method == "crisp":
    if options.crisp is None:
      raise ValueError(
        f"--method crisp needs --crisp, one of {', '.join(crisp.PRESETS)}"
      )
    means = crisp.CrispConfig(**crisp.PRESETS[options.crisp])
    asked = methods.Method("crisp", means)
  elif options.method == "xtr" and options.k_prime is not None:
    asked = methods.Method("xtr", k_prime=options.k_prime)
  elif options.method is not None:
    asked = methods.Method(options.method)
  else:
    asked = None
  if options.add:
    own = read_config(index_files.open_index(options.index)).method
    if asked not in (None, own):
      raise ValueError(f"index {options.index} was made by {own}, got {asked}")
    return own
  return asked


def _changed(encoded, method):
  """An encoded corpus by another method, where its vectors allow it."""
  if method in (None, encoded.method):
    return encoded
  if (
    encoded.method.name not in ("colbert", "xtr") or method.name == "colberter"
  ):
    raise ValueError(
      f"the corpus was encoded by {encoded.method.name!r}, whose vectors do not"
      f" serve {method}"
    )
  return encoded._replace(
    documents=methods.reduce_documents(encoded.documents, method),
    method=method,
  )

"""Retrieval sets as ArrayRecord tables: written by TFDS, read by grain.

A data set is a folder with two tables, each a TFDS data set of its own:

- `documents`, one split `corpus`: {id, title, text}.
- `queries`, one split per split: {id, text, document_ids, grades}; the
  judgements travel with their query, so that a record is a training example.

Nothing here needs TensorFlow.
"""

import contextlib
import io
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import tensorflow_datasets as tfds

from tokjax import checks
from tokjax.data.retrieval_set import RetrievalSet

__all__ = ["Tables", "data_source", "read", "write"]

_VERSION = "1.0.0"
_TABLES = ("documents", "queries")


class Tables(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """The TFDS builder of both tables; `config` says which one.

  Args:
    sets: the splits, all over the same documents.
    name: of the data set, a Python identifier in lower case.
    metadata: JSON values to keep beside the records.
    **kwargs: of `tfds.core.GeneratorBasedBuilder`: `config` ("documents" or
      "queries") and `data_dir`.
  """

  VERSION = tfds.core.Version(_VERSION)
  BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=table) for table in _TABLES]
  # Nothing is downloaded. Without this line TFDS looks for checksums beside
  # the class, for which it needs a package it does not require.
  url_infos = None

  def __init__(
    self,
    *,
    sets: Mapping[str, RetrievalSet],
    name: str,
    metadata: Mapping[str, Any],
    **kwargs: Any,
  ):
    self.name = name
    self._sets = sets
    self._metadata = metadata
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    text = tfds.features.Text
    features = {
      "documents": {"id": text(), "title": text(), "text": text()},
      "queries": {
        "id": text(),
        "text": text(),
        "document_ids": tfds.features.Sequence(text()),
        "grades": tfds.features.Sequence(np.int32),
      },
    }[self.builder_config.name]
    return tfds.core.DatasetInfo(
      builder=self,
      description=f"{self.builder_config.name} of {self.name}",
      features=tfds.features.FeaturesDict(features),
      metadata=tfds.core.MetadataDict(self._metadata),
      disable_shuffling=True,  # the order of the retrieval set is kept
    )

  def _split_generators(self, dl_manager):
    if self.builder_config.name == "documents":
      anyone = next(iter(self._sets.values()))
      return {"corpus": _document_records(anyone)}
    return {
      split: _query_records(s) for split, s in self._sets.items() if s.query_ids
    }

  def _generate_examples(self):
    raise NotImplementedError("_split_generators holds the generators")


def write(
  sets: Mapping[str, RetrievalSet],
  data_dir: str | pathlib.Path,
  *,
  name: str,
  fingerprint: str,
  overwrite: bool = False,
) -> pathlib.Path:
  """Writes the splits of a data set as tables; whole, or not at all.

  Both tables are built in a folder beside the final one, which is renamed at
  the end: an interrupted build leaves nothing at the final path.

  Args:
    sets: the splits; all must hold the same documents. Those without queries
      are left out.
    data_dir: where data sets are kept; made if missing.
    name: of the data set; its folder is `data_dir/<name>`, with characters
      other than a-z, 0-9 and _ replaced.
    fingerprint: of what the sets were made from. Tables with the same one are
      left as they are.
    overwrite: replace tables that have another fingerprint.

  Returns:
    The folder of the tables.

  Raises:
    ValueError: if no split has queries, their documents differ, or tables with
      another fingerprint are there and `overwrite` is False.
  """
  if not any(s.query_ids for s in sets.values()):
    raise ValueError("sets must hold at least one split with queries")
  _check_same_documents(sets)
  data_dir = pathlib.Path(data_dir)
  name = _snake_case(name)
  final = data_dir / name
  if final.exists():
    found = _open(final, "queries").info.metadata["fingerprint"]
    if found == fingerprint:
      return final
    if not overwrite:
      raise ValueError(
        f"{final}: tables made from other data are here; pass "
        "overwrite=True to replace them"
      )
  data_dir.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(
    dir=data_dir, prefix=f".{name}-building-"
  ) as aside:
    for table in _TABLES:
      builder = Tables(
        sets=sets,
        name=name,
        metadata=_metadata(sets, fingerprint),
        config=table,
        data_dir=aside,
      )
      # TFDS prints two lines on standard output, which is the caller's.
      with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(file_format="array_record")
    if final.exists():
      shutil.rmtree(final)
    (pathlib.Path(aside) / name).rename(final)
  return final


def read(folder: str | pathlib.Path, split: str = "test") -> RetrievalSet:
  """The retrieval set that `write` stored, in the same order.

  Args:
    folder: what `write` returned.
    split: one of the splits written.

  Returns:
    An equal `RetrievalSet`.

  Raises:
    ValueError: if the folder holds no tables, or not this split.
  """
  folder = pathlib.Path(folder)
  queries = data_source(folder, "queries", split)
  documents = data_source(folder, "documents", "corpus")
  metadata = _open(folder, "queries").info.metadata
  document_columns = _columns(documents, ("id", "title", "text"))
  query_columns = _columns(queries, ("id", "text"))
  qrels = {
    key: {
      document.decode(): int(grade)
      for document, grade in zip(
        record["document_ids"], record["grades"], strict=True
      )
    }
    for key, record in zip(query_columns["id"], queries, strict=True)
  }
  return RetrievalSet(
    name=metadata["name"],
    document_ids=document_columns["id"],
    document_titles=document_columns["title"],
    document_texts=document_columns["text"],
    query_ids=query_columns["id"],
    query_texts=query_columns["text"],
    qrels=qrels,
    metadata=metadata["of_split"][split],
  )


def data_source(
  folder: str | pathlib.Path,
  table: Literal["documents", "queries"],
  split: str,
) -> Any:
  """Random access to the records of a table, for `grain.MapDataset.source`.

  Args:
    folder: what `write` returned.
    table: "documents" or "queries".
    split: "corpus" for documents, else one of the splits written.

  Returns:
    A sequence of dicts; texts are UTF-8 bytes, `grades` a list of int32.

  Raises:
    ValueError: if the folder holds no such table or split.

  Example: (of a folder made by `beir.build`)

    source = records.data_source(folder, "queries", "train")
    batches = grain.MapDataset.source(source).shuffle(seed=0).batch(8)
  """
  builder = _open(pathlib.Path(folder), table)
  checks.one_of(tuple(builder.info.splits), split=split)
  return builder.as_data_source(split)


def _open(folder: pathlib.Path, table: str) -> tfds.core.DatasetBuilder:
  checks.one_of(_TABLES, table=table)
  if not (folder / table / _VERSION).is_dir():
    raise ValueError(f"{folder}: no table {table} of version {_VERSION}")
  return tfds.builder_from_directory(folder / table / _VERSION)


def _document_records(
  retrieval_set: RetrievalSet,
) -> Iterator[tuple[int, dict[str, str]]]:
  rows = zip(
    retrieval_set.document_ids,
    retrieval_set.document_titles,
    retrieval_set.document_texts,
    strict=True,
  )
  for row, (key, title, text) in enumerate(rows):
    yield row, {"id": key, "title": title, "text": text}


def _query_records(
  retrieval_set: RetrievalSet,
) -> Iterator[tuple[int, dict[str, Any]]]:
  rows = zip(retrieval_set.query_ids, retrieval_set.query_texts, strict=True)
  for row, (key, text) in enumerate(rows):
    grades = retrieval_set.qrels.get(key, {})
    yield (
      row,
      {
        "id": key,
        "text": text,
        "document_ids": list(grades),
        "grades": list(grades.values()),
      },
    )


def _columns(source, names: tuple[str, ...]) -> dict[str, list[str]]:
  columns: dict[str, list[str]] = {name: [] for name in names}
  for record in source:
    for name in names:
      columns[name].append(record[name].decode())
  return columns


def _check_same_documents(sets: Mapping[str, RetrievalSet]) -> None:
  first, *others = sets
  for split in others:
    one, two = sets[first], sets[split]
    if (one.document_ids, one.document_texts) != (
      two.document_ids,
      two.document_texts,
    ):
      raise ValueError(f"splits {first} and {split} must share the documents")


def _metadata(
  sets: Mapping[str, RetrievalSet], fingerprint: str
) -> dict[str, Any]:
  return {
    "name": next(iter(sets.values())).name,
    "fingerprint": fingerprint,
    "of_split": {split: s.metadata for split, s in sets.items()},
  }


def _snake_case(name: str) -> str:
  """A name TFDS accepts for a data set and its files."""
  plain = re.sub(r"[^a-z0-9_]+", "_", name.lower()).strip("_")
  return plain if plain[:1].isalpha() else f"set_{plain}"

"""Training examples from files in the layouts of MS MARCO and ColBERTv2.

One example per line: a query, a document that answers it, documents that do
not. Either the texts themselves, or ids of a collection.

    query TAB positive TAB negative                              .tsv
    {"query": ..., "positive": ..., "negative": ...}             .jsonl, .json
    {"query": ..., "positives": [...], "negatives": [...]}
    [query, positive, negative, ...]
    [query, [positive, score], [negative, score], ...]
"""

import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tokjax import checks
from tokjax.data import corpus, json_lines
from tokjax.data.training_set import TrainingSet

__all__ = ["read"]


def read(
  path: str | pathlib.Path,
  *,
  queries: str | pathlib.Path | None = None,
  documents: str | pathlib.Path | None = None,
) -> TrainingSet:
  """Training examples of one file, in the order of its lines.

  Without `queries` and `documents` the lines hold texts, and equal texts
  become one query or document. With both they hold ids, and the training set
  holds the whole collection, in the order of its file. In a list the first
  document is the positive, as the published code of ColBERT takes it; scores
  are the teacher's.

  Args:
    path: a `.tsv`, `.jsonl` or `.json` file, one example per line.
    queries: texts of the queries by id: `.tsv` (id, text) or `.jsonl` (`_id`
      or `id`, `text`).
    documents: the same for documents, with a title in a third column or in
      the field `title`, which is put before the text.

  Returns:
    A `TrainingSet`.

  Raises:
    ValueError: if a file is missing, empty or of another kind, a line cannot
      be read, an id is unknown, a positive is among its negatives, or only
      some of the lines have scores. Messages name file and line.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   file = pathlib.Path(folder) / "train.tsv"
    ...   _ = file.write_text("red fruit\\tapple\\tpear\\n")
    ...   train = read(file)
    >>> train.document_texts
    ['apple', 'pear']

  Source:
    Nguyen et al. 2016, "MS MARCO" (`triples`, `collection.tsv`,
    `queries.tsv`); Santhanam et al. 2022, "ColBERTv2" (lists with scores).
  """
  path = pathlib.Path(path)
  if (queries is None) != (documents is None):
    raise ValueError("queries and documents must be given together")
  query_rows = _Rows("query", _collection(queries))
  document_rows = _Rows("document", _collection(documents))
  query_index, positives, negatives, scores = [], [], [], []
  for place, line in _lines(path):
    good = document_rows.of(line.positives, place)
    bad = document_rows.of(line.negatives, place)
    if not set(good).isdisjoint(bad):
      raise ValueError(f"{place}: a positive is among the negatives")
    if scores and (line.scores is None) != (scores[0] is None):
      raise ValueError(f"{place}: either all lines must have scores or none")
    query_index += query_rows.of([line.query], place)
    positives.append(np.array(good, np.int32))
    negatives.append(np.array(bad, np.int32))
    scores.append(line.scores)
  if not query_index:
    raise ValueError(f"{path}: no examples")
  return TrainingSet(
    query_texts=query_rows.texts,
    document_texts=document_rows.texts,
    query_index=np.array(query_index, np.int32),
    positives=positives,
    negatives=negatives,
    teacher_scores=None if scores[0] is None else scores,
  )


class _Line(NamedTuple):
  query: Any  # what stands in the file: `_Rows` knows if it is text or id
  positives: list[Any]
  negatives: list[Any]
  scores: np.ndarray | None = None  # float32, positives first


class _Rows:
  """Rows of texts: found by id, or given to texts as they come."""

  def __init__(self, name: str, collection: corpus.Corpus | None):
    self._name = name
    self._by_id = collection is not None
    ids = collection.ids if collection is not None else []
    self.texts = collection.texts if collection is not None else []
    self._row = {key: i for i, key in enumerate(ids)}

  def of(self, values: Sequence[Any], place: str) -> list[int]:
    return [self._find(value, place) for value in values]

  def _find(self, value: Any, place: str) -> int:
    record = {self._name: value}
    if self._by_id:
      key = json_lines.identifier(record, place, (self._name,))
      if key not in self._row:
        raise ValueError(f"{place}: no {self._name} has the id {key!r}")
    else:  # a number is an id whose collection was forgotten: an error
      key = json_lines.text(record, place, self._name)
      if not key.strip():
        raise ValueError(f"{place}: {self._name} must not be blank")
      if key not in self._row:
        self._row[key] = len(self.texts)
        self.texts.append(key)
    return self._row[key]


def _collection(path: str | pathlib.Path | None) -> corpus.Corpus | None:
  if path is None:
    return None
  path = pathlib.Path(path)
  checks.one_of((".tsv", ".jsonl"), **{f"suffix of {path}": path.suffix})
  if path.suffix == ".jsonl":
    return corpus.read_json_lines(path)
  places: dict[str, str] = {}
  titles, bodies = [], []
  for number, line in json_lines.decoded_lines(path):
    place = f"{path}:{number}"
    key, *cells = line.split("\t")
    if not key or len(cells) not in (1, 2):
      raise ValueError(
        f"{place}: expected an id, a text and maybe a title between tabs, got "
        f"{line!r}"
      )
    if key in places:
      raise ValueError(f"{place}: id {key!r} was used at {places[key]}")
    places[key] = place
    bodies.append(cells[0])
    titles.append(cells[1] if len(cells) == 2 else "")
  if not places:
    raise ValueError(f"{path}: no texts")
  return corpus.Corpus(ids=list(places), titles=titles, bodies=bodies)


def _lines(path: pathlib.Path):
  """(file:line, `_Line`) of each line that is not blank."""
  suffixes = (".tsv", ".jsonl", ".json")
  checks.one_of(suffixes, **{f"suffix of {path}": path.suffix})
  for number, text in json_lines.decoded_lines(path):
    place = f"{path}:{number}"
    if path.suffix == ".tsv":
      yield place, _of_cells(text, place)
      continue
    try:
      record = json.loads(text)
    except json.JSONDecodeError as error:
      raise ValueError(f"{place}: not JSON: {error}") from error
    if isinstance(record, dict):
      yield place, _of_object(record, place)
    elif isinstance(record, list):
      yield place, _of_list(record, place)
    else:
      kind = type(record).__name__
      raise ValueError(f"{place}: expected a JSON object or list, got {kind}")


def _of_cells(text: str, place: str) -> _Line:
  cells = text.split("\t")
  if len(cells) != 3 or not all(cells):
    raise ValueError(
      f"{place}: expected 3 columns between tabs (query, positive, negative), "
      f"got {len(cells)}: {text!r}"
    )
  return _Line(cells[0], cells[1:2], cells[2:])


def _of_object(record: dict[str, Any], place: str) -> _Line:
  if "query" not in record:
    raise ValueError(f"{place}: missing field query")
  positives = _field(record, place, "positive", "positives")
  if not positives:
    raise ValueError(f"{place}: expected at least one positive")
  negatives = _field(record, place, "negative", "negatives")
  return _Line(record["query"], positives, negatives)


def _of_list(record: list[Any], place: str) -> _Line:
  if len(record) < 2:
    raise ValueError(f"{place}: expected a query and documents, got {record}")
  query, *documents = record
  if not isinstance(documents[0], list):
    return _Line(query, documents[:1], documents[1:])
  if not all(isinstance(d, list) and len(d) == 2 for d in documents):
    raise ValueError(f"{place}: every document must be [document, score]")
  scores = np.array([_number(d[1], place) for d in documents], np.float32)
  keys = [d[0] for d in documents]
  return _Line(query, keys[:1], keys[1:], scores)


def _field(
  record: dict[str, Any], place: str, one: str, many: str
) -> list[Any]:
  """The values of a field that holds one, or of one that holds a list."""
  if one in record and many in record:
    raise ValueError(f"{place}: expected {one} or {many}, got both")
  values = record.get(many, record.get(one, []))
  return values if isinstance(values, list) else [values]


def _number(value: Any, place: str) -> float:
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  if not is_number or not math.isfinite(value):
    raise ValueError(f"{place}: a score must be a finite number, got {value!r}")
  return float(value)

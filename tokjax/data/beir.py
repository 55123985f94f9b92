"""Folders in the layout of the BEIR benchmark.

`corpus.jsonl` (`_id`, `title`, `text`), `queries.jsonl` (`_id`, `text`) and
`qrels/<split>.tsv` (header, then query id, document id, integer grade).
"""

import hashlib
import pathlib
from collections.abc import Iterable

from tokjax.data import corpus, json_lines, records
from tokjax.data.retrieval_set import RetrievalSet

__all__ = ["build", "load", "splits"]


def load(
  folder: str | pathlib.Path,
  split: str = "test",
  *,
  allow_missing: bool = False,
) -> RetrievalSet:
  """Documents, judged queries and judgements of one split.

  Queries without a judgement in the split are left out. Ids are strings; a
  document's text is title, a space, text. Judgements keep the grade 0, which
  means judged and not relevant.

  Args:
    folder: the data set.
    split: names `qrels/<split>.tsv`, usually "train", "dev" or "test".
    allow_missing: keep judgements of documents the corpus lacks; they still
      count among the relevant ones, so recall cannot reach 1 there.

  Returns:
    A `RetrievalSet`; queries in the order of `queries.jsonl`.

  Raises:
    ValueError: if a file is missing, a line cannot be read, an id comes
      twice, or judgements name unknown queries or documents. Messages name
      file and line.

  Source:
    Thakur et al. 2021, "BEIR: A Heterogeneous Benchmark for Zero-shot
    Evaluation of Information Retrieval Models" (the layout).
  """
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise ValueError(f"{folder}: no such folder")
  documents = corpus.read_json_lines(
    folder / "corpus.jsonl", id_fields=("_id",)
  )
  return _load_split(folder, split, documents, allow_missing)


def splits(folder: str | pathlib.Path) -> list[str]:
  """Names of the splits a folder has judgements for, sorted.

  Args:
    folder: the data set.

  Returns:
    The names of its `qrels/*.tsv` files without the suffix.
  """
  files = (pathlib.Path(folder) / "qrels").glob("*.tsv")
  return sorted(path.stem for path in files)


def build(
  folder: str | pathlib.Path,
  data_dir: str | pathlib.Path,
  *,
  overwrite: bool = False,
  allow_missing: bool = False,
) -> pathlib.Path:
  """Writes a BEIR folder as ArrayRecord tables (see `tokjax.data.records`).

  The tables appear at `data_dir/<name of folder>` whole or not at all. Tables
  made before from the same files are left as they are.

  Args:
    folder: the data set, all its splits.
    data_dir: where data sets are kept.
    overwrite: replace tables that were made from other files.
    allow_missing: as in `load`.

  Returns:
    The folder of the tables, for `records.read` and `records.data_source`.

  Raises:
    ValueError: as in `load`; or if tables made from other files are there and
      `overwrite` is False.
  """
  folder = pathlib.Path(folder)
  names = splits(folder)
  if not names:
    raise ValueError(f"{folder / 'qrels'}: no .tsv files")
  documents = corpus.read_json_lines(
    folder / "corpus.jsonl", id_fields=("_id",)
  )
  sets = {
    split: _load_split(folder, split, documents, allow_missing)
    for split in names
  }
  files = [folder / "corpus.jsonl", folder / "queries.jsonl"]
  files += [folder / "qrels" / f"{split}.tsv" for split in names]
  return records.write(
    sets,
    data_dir,
    name=folder.resolve().name,
    fingerprint=_fingerprint(files),
    overwrite=overwrite,
  )


def _load_split(
  folder: pathlib.Path,
  split: str,
  documents: corpus.Corpus,
  allow_missing: bool,
) -> RetrievalSet:
  queries = _read_queries(folder / "queries.jsonl")
  qrels_path = folder / "qrels" / f"{split}.tsv"
  if not qrels_path.is_file():
    found = ", ".join(splits(folder)) or "none"
    raise ValueError(f"{qrels_path}: no such file; splits here: {found}")
  qrels = _read_qrels(qrels_path)
  _check_known(qrels_path, "queries", qrels, queries)
  if not allow_missing:
    judged = (key for grades in qrels.values() for key in grades)
    _check_known(qrels_path, "documents", judged, documents.ids)
  query_ids = [key for key in queries if key in qrels]
  return RetrievalSet(
    name=folder.resolve().name,
    document_ids=documents.ids,
    document_titles=documents.titles,
    document_texts=documents.texts,
    query_ids=query_ids,
    query_texts=[queries[key] for key in query_ids],
    qrels={key: qrels[key] for key in query_ids},
  )


def _read_queries(path: pathlib.Path) -> dict[str, str]:
  queries: dict[str, str] = {}
  for place, record in json_lines.records(path):
    key = json_lines.identifier(record, place)
    if key in queries:
      raise ValueError(f"{place}: query id {key!r} comes twice")
    queries[key] = json_lines.text(record, place, "text")
  if not queries:
    raise ValueError(f"{path}: no queries")
  return queries


def _read_qrels(path: pathlib.Path) -> dict[str, dict[str, int]]:
  qrels: dict[str, dict[str, int]] = {}
  for row, (number, line) in enumerate(json_lines.decoded_lines(path)):
    place = f"{path}:{number}"
    cells = [cell.strip() for cell in line.split("\t")]
    if len(cells) != 3:
      raise ValueError(
        f"{place}: expected 3 columns between tabs (query-id, corpus-id, "
        f"score), got {len(cells)}: {line!r}"
      )
    query, document, score = cells
    if row == 0:
      if _is_integer(score):
        raise ValueError(
          f"{place}: expected the header query-id, corpus-id, score, got "
          f"{line!r}"
        )
      continue
    if not _is_integer(score):
      raise ValueError(f"{place}: score must be an integer, got {score!r}")
    grades = qrels.setdefault(query, {})
    if grades.setdefault(document, int(score)) != int(score):
      raise ValueError(
        f"{place}: query {query!r} and document {document!r} had the score "
        f"{grades[document]} before, now {score}"
      )
  if not qrels:
    raise ValueError(f"{path}: no judgements")
  return qrels


def _is_integer(cell: str) -> bool:
  return cell.removeprefix("-").isdecimal()


def _check_known(
  path: pathlib.Path, what: str, used: Iterable[str], known: Iterable[str]
) -> None:
  unknown = sorted(set(used) - set(known))
  if unknown:
    raise ValueError(
      f"{path}: {len(unknown)} {what} are judged but not in the data set, "
      f"such as {', '.join(map(repr, unknown[:3]))}"
    )


def _fingerprint(files: Iterable[pathlib.Path]) -> str:
  digest = hashlib.sha256()
  for path in files:
    digest.update(hashlib.sha256(path.read_bytes()).digest())
  return digest.hexdigest()

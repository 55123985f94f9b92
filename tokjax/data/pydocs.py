"""`pydocs`: a corpus that is already there, made of installed docstrings.

Each summary line is a query for the rest of its docstring. Some 8,000 real
documents of JAX, NumPy, SciPy, flax, optax and the standard library, with no
download; the same installed versions give the same corpus. Nothing is
imported or executed (see `tokjax.data.docstrings`).

What is judged relevant, and how the splits stay apart:

- A document is the text after a summary. Names are ids, not text. Documents
  with equal text are one document.
- A query is a summary, once, however many docstrings share it. It is relevant
  to all of their documents.
- Near duplicates (Jaccard similarity of three-word runs at least 0.8) are
  judged alike: a query relevant to one is relevant to all.
- A summary that stands word for word in a document it is relevant to is no
  query: finding it would only be string matching. The document stays.
- Documents linked by near duplication or by a common query are in one split,
  chosen by a hash of the first id among them: 80 % train, 10 % validation,
  10 % test. All splits search all documents.
"""

import functools
import hashlib
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tokjax import checks
from tokjax.data import docstrings, near_duplicates, records
from tokjax.data.retrieval_set import RetrievalSet

__all__ = [
  "PACKAGES",
  "SPLITS",
  "build",
  "load",
  "load_splits",
  "summarize",
]

PACKAGES = ("jax", "numpy", "scipy", "flax", "optax", "python")
SPLITS = ("train", "validation", "test")

_SUMMARY_WORDS = (4, 40)  # fewer say nothing, more are a paragraph
_MIN_BODY_WORDS = 20
_THRESHOLD = 0.8


def load(
  split: str = "test", *, packages: Sequence[str] = PACKAGES
) -> RetrievalSet:
  """All documents, and the queries of one split.

  Args:
    split: "train", "validation" or "test".
    packages: installed top-level packages; "python" is the standard library.

  Returns:
    A `RetrievalSet`. Document ids are qualified names; query ids are those
    names after "summary:". `metadata` holds the package versions and counts.
    Takes about 15 s for the default packages.

  Raises:
    ValueError: if the split is unknown, or a package is not installed.
  """
  checks.one_of(SPLITS, split=split)
  return load_splits(packages)[split]


def load_splits(
  packages: Sequence[str] = PACKAGES,
) -> dict[str, RetrievalSet]:
  """All three splits over the same documents; costs as much as one.

  Args:
    packages: installed top-level packages; "python" is the standard library.

  Returns:
    {split: `RetrievalSet`} for each of `SPLITS`.

  Raises:
    ValueError: if `packages` is empty, names one twice, or one is not
      installed.
  """
  _check_packages(packages)
  return dict(_splits(tuple(packages)))


@functools.cache  # 15 s; the sets are never changed
def _splits(packages):
  entries_of = {
    package: [e for e in docstrings.extract(package) if _is_long_enough(e)]
    for package in packages
  }
  entries = list(itertools.chain.from_iterable(entries_of.values()))
  documents = _merge_equal(entries)
  group = near_duplicates.group(documents.bodies, threshold=_THRESHOLD)
  queries = _judge(entries, documents, group)
  part = _component(queries, group)
  split_of = [_split(documents.ids[first]) for first in part]
  metadata = {
    "versions": {p: docstrings.package_version(p) for p in packages},
    "documents": _count_by_package(documents.ids, entries_of),
    "groups": len(np.unique(group)),
    "verbatim_summaries_left_out": queries.num_verbatim,
  }
  return {
    split: _retrieval_set(split, documents, queries, split_of, metadata)
    for split in SPLITS
  }


def build(
  data_dir: str | pathlib.Path,
  *,
  packages: Sequence[str] = PACKAGES,
  overwrite: bool = False,
) -> pathlib.Path:
  """Writes the corpus as ArrayRecord tables (see `tokjax.data.records`).

  Tables made before from the same packages and versions are left as they are.

  Args:
    data_dir: where data sets are kept; the tables go to `data_dir/pydocs`.
    packages: as in `load_splits`.
    overwrite: replace tables made from other packages or versions.

  Returns:
    The folder of the tables, for `records.read` and `records.data_source`.

  Raises:
    ValueError: as in `load_splits`; or if tables made from other packages are
      there and `overwrite` is False.
  """
  _check_packages(packages)
  versions = {p: docstrings.package_version(p) for p in packages}
  sets = load_splits(packages)
  return records.write(
    sets,
    data_dir,
    name="pydocs",
    fingerprint=_hash(repr(versions)),
    overwrite=overwrite,
  )


def summarize(sets: Mapping[str, RetrievalSet]) -> str:
  """A few lines to print: versions, documents by package, queries by split.

  Args:
    sets: what `load_splits` returned.

  Returns:
    Text of one line per package and one per split.
  """
  metadata = next(iter(sets.values())).metadata
  lines = [
    f"{package} {version}: {metadata['documents'][package]} documents"
    for package, version in metadata["versions"].items()
  ]
  lines += [
    f"{split}: {len(s.query_ids)} queries, {s.num_judgements} judgements"
    for split, s in sets.items()
  ]
  return "\n".join(lines)


class _Documents(NamedTuple):
  ids: list[str]  # first name with this text
  bodies: list[str]
  row: dict[str, int]  # body -> index


class _Queries(NamedTuple):
  ids: list[str]
  texts: list[str]
  relevant: list[list[int]]  # indices of documents, ascending
  num_verbatim: int


def _check_packages(packages: Sequence[str]) -> None:
  if isinstance(packages, str):
    raise ValueError(f"packages must be a sequence of names, got {packages!r}")
  if not packages or len(set(packages)) < len(packages):
    raise ValueError(
      f"packages must name at least one package, each once, got {packages}"
    )


def _is_long_enough(entry: docstrings.Docstring) -> bool:
  low, high = _SUMMARY_WORDS
  enough = len(entry.body.split()) >= _MIN_BODY_WORDS
  return enough and low <= len(entry.summary.split()) <= high


def _merge_equal(entries: Sequence[docstrings.Docstring]) -> _Documents:
  documents = _Documents([], [], {})
  for entry in entries:
    if entry.body not in documents.row:
      documents.row[entry.body] = len(documents.ids)
      documents.ids.append(entry.name)
      documents.bodies.append(entry.body)
  return documents


def _judge(
  entries: Sequence[docstrings.Docstring],
  documents: _Documents,
  group: np.ndarray,
) -> _Queries:
  """One query per distinct summary, relevant to all it was written for."""
  members: dict[int, list[int]] = {}
  for row, first in enumerate(group.tolist()):
    members.setdefault(first, []).append(row)
  asked: dict[str, tuple[docstrings.Docstring, set[int]]] = {}
  for entry in entries:
    _, rows = asked.setdefault(_plain(entry.summary), (entry, set()))
    rows.update(members[int(group[documents.row[entry.body]])])
  plain_bodies = [_plain(body) for body in documents.bodies]
  queries = _Queries([], [], [], 0)
  num_verbatim = 0
  for plain, (entry, rows) in asked.items():
    if any(plain in plain_bodies[row] for row in rows):
      num_verbatim += 1
      continue
    queries.ids.append(f"summary:{entry.name}")
    queries.texts.append(entry.summary)
    queries.relevant.append(sorted(rows))
  return queries._replace(num_verbatim=num_verbatim)


def _component(queries: _Queries, group: np.ndarray) -> list[int]:
  """First document of those a chain of groups and queries links to each."""
  links = itertools.chain(
    enumerate(group.tolist()),
    (pair for rows in queries.relevant for pair in itertools.pairwise(rows)),
  )
  return near_duplicates.union(len(group), links).tolist()


def _retrieval_set(
  split: str,
  documents: _Documents,
  queries: _Queries,
  split_of: Sequence[str],
  metadata: dict,
) -> RetrievalSet:
  rows = [
    row
    for row, relevant in enumerate(queries.relevant)
    if split_of[relevant[0]] == split
  ]
  return RetrievalSet(
    name="pydocs",
    document_ids=documents.ids,
    document_titles=[""] * len(documents.ids),
    document_texts=documents.bodies,
    query_ids=[queries.ids[row] for row in rows],
    query_texts=[queries.texts[row] for row in rows],
    qrels={
      queries.ids[row]: {documents.ids[d]: 1 for d in queries.relevant[row]}
      for row in rows
    },
    metadata=metadata,
  )


def _count_by_package(
  ids: Sequence[str], entries_of: Mapping[str, list[docstrings.Docstring]]
) -> dict[str, int]:
  kept = set(ids)
  return {
    package: sum(entry.name in kept for entry in entries)
    for package, entries in entries_of.items()
  }


def _plain(text: str) -> str:
  return " ".join(text.casefold().split()).rstrip(".!?:")


def _split(key: str) -> str:
  tenth = int(_hash(key), 16) % 10
  return {0: "test", 1: "validation"}.get(tenth, "train")


def _hash(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()

"""The documents a user wants to encode or index, from their own files."""

import dataclasses
import pathlib
from collections.abc import Sequence

from tokjax.data import json_lines

__all__ = ["Corpus", "full_texts", "load", "read_json_lines"]

_TEXT_SUFFIXES = (".txt", ".md")


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Documents in the order they were read.

  Attributes:
    ids: one string per document, unique.
    titles: one title per document, "" where there is none.
    bodies: one text per document, without the title.
  """

  ids: Sequence[str]
  titles: Sequence[str]
  bodies: Sequence[str]

  @property
  def texts(self) -> list[str]:
    """What is encoded or indexed: title, a space, body, stripped."""
    return full_texts(self.titles, self.bodies)


def full_texts(titles: Sequence[str], bodies: Sequence[str]) -> list[str]:
  """Title, a space and body of each document, without blanks at the ends.

  Args:
    titles: one per document, "" for none.
    bodies: one per document.

  Returns:
    One string per document.

  Example:
    >>> full_texts(["Lift", ""], ["of a wing", "drag"])
    ['Lift of a wing', 'drag']
  """
  pairs = zip(titles, bodies, strict=True)
  return [f"{title} {body}".strip() for title, body in pairs]


def load(path: str | pathlib.Path) -> Corpus:
  """Documents of a `.jsonl` file, a BEIR folder or a folder of text files.

  - `.jsonl`: one object per line with `_id` or `id`, `text`, maybe `title`.
  - a folder that holds `corpus.jsonl`: the documents of a BEIR data set.
  - any other folder: each `.txt` and `.md` file below it is one document,
    whose id is its path inside the folder; sorted by that id.

  Args:
    path: the file or folder.

  Returns:
    A `Corpus` with at least one document. Empty texts are kept.

  Raises:
    ValueError: if nothing is there, a file is of another kind, or a line
      cannot be read (the message names file and line).
  """
  path = pathlib.Path(path)
  if path.is_dir():
    if (path / "corpus.jsonl").is_file():
      return read_json_lines(path / "corpus.jsonl")
    return _read_folder(path)
  if not path.exists():
    raise ValueError(f"{path}: no such file or folder")
  if path.suffix != ".jsonl":
    raise ValueError(
      f"{path}: expected a .jsonl file, a BEIR folder or a folder of "
      f"{' and '.join(_TEXT_SUFFIXES)} files"
    )
  return read_json_lines(path)


def read_json_lines(
  path: pathlib.Path, *, id_fields: Sequence[str] = ("_id", "id")
) -> Corpus:
  """Documents of one JSON-lines file.

  Args:
    path: file with one object per line: an id, `text`, maybe `title`.
    id_fields: where the id may stand, the first present field counts.

  Returns:
    A `Corpus` with at least one document.

  Raises:
    ValueError: if the file is missing or empty, a line is not UTF-8 or not a
      JSON object, a field is missing, or an id comes twice.
  """
  places: dict[str, str] = {}
  titles, bodies = [], []
  for place, record in json_lines.records(path):
    key = json_lines.identifier(record, place, id_fields)
    if key in places:
      raise ValueError(f"{place}: id {key!r} was used at {places[key]}")
    places[key] = place
    titles.append(json_lines.text(record, place, "title", default=""))
    bodies.append(json_lines.text(record, place, "text"))
  if not places:
    raise ValueError(f"{path}: no documents")
  return Corpus(ids=list(places), titles=titles, bodies=bodies)


def _read_folder(folder: pathlib.Path) -> Corpus:
  files = {
    path.relative_to(folder).as_posix(): path
    for path in folder.rglob("*")
    if path.suffix in _TEXT_SUFFIXES and path.is_file()
  }
  if not files:
    raise ValueError(
      f"{folder}: no corpus.jsonl and no {' or '.join(_TEXT_SUFFIXES)} files"
    )
  ids = sorted(files)
  bodies = []
  for key in ids:
    try:
      bodies.append(files[key].read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
      line = error.object[: error.start].count(b"\n") + 1
      raise ValueError(f"{files[key]}:{line}: not UTF-8: {error}") from error
  return Corpus(ids=ids, titles=[""] * len(ids), bodies=bodies)

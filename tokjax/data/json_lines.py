"""JSON lines, read with errors that name the file and the line."""

import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

__all__ = ["decoded_lines", "identifier", "records", "text"]


def decoded_lines(path: pathlib.Path) -> Iterator[tuple[int, str]]:
  """Line number (from 1) and text of each line that is not blank.

  Args:
    path: a UTF-8 text file; a byte-order mark at its start is skipped.

  Returns:
    An iterator of (line number, line without its line break).

  Raises:
    ValueError: if the file is missing or a line is not UTF-8.
  """
  if not path.is_file():
    raise ValueError(f"{path}: no such file")
  with path.open("rb") as file:
    for number, raw in enumerate(file, start=1):
      try:
        line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
      except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{number}: not UTF-8: {error}") from error
      if line.strip():
        yield number, line.rstrip("\r\n")


def records(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
  """One JSON object per line, with the place it stands ("file:line").

  Args:
    path: a UTF-8 file with one JSON object per line; blank lines are skipped.

  Returns:
    An iterator of (place, object).

  Raises:
    ValueError: if the file is missing, a line is not UTF-8, not JSON, or not
      an object.
  """
  for number, line in decoded_lines(path):
    place = f"{path}:{number}"
    try:
      record = json.loads(line)
    except json.JSONDecodeError as error:
      raise ValueError(f"{place}: not JSON: {error}") from error
    if not isinstance(record, dict):
      kind = type(record).__name__
      raise ValueError(f"{place}: expected a JSON object, got {kind}")
    yield place, record


def identifier(
  record: dict[str, Any], place: str, names: Sequence[str] = ("_id",)
) -> str:
  """The id of a record as a string; integers are accepted and converted.

  Args:
    record: one JSON object.
    place: where it stands, for the message.
    names: fields to look in, the first present one counts.

  Returns:
    A string that is not empty.

  Raises:
    ValueError: if none of the fields is there, or it holds something else.
  """
  for name in names:
    if name in record:
      value = record[name]
      if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
      if not isinstance(value, str) or not value:
        raise ValueError(
          f"{place}: {name} must be a string that is not empty, got {value!r}"
        )
      return value
  raise ValueError(f"{place}: missing field {' or '.join(names)}")


def text(
  record: dict[str, Any], place: str, name: str, default: str | None = None
) -> str:
  """A text field of a record.

  Args:
    record: one JSON object.
    place: where it stands, for the message.
    name: of the field.
    default: what a missing or null field counts as; None: it must be there.

  Returns:
    The string as it stands.

  Raises:
    ValueError: if the field is missing without a default, or not a string.
  """
  value = record.get(name)
  if value is None and default is not None:
    return default
  if name not in record:
    raise ValueError(f"{place}: missing field {name}")
  if not isinstance(value, str):
    raise ValueError(f"{place}: {name} must be a string, got {value!r}")
  return value

"""Settings dataclasses as JSON, checked field by field when they are read."""

import dataclasses
import types
import typing
from typing import Any, TypeVar

__all__ = ["from_json", "to_json"]

Settings = TypeVar("Settings")


def to_json(settings: Any) -> dict[str, Any]:
  """A settings dataclass as what `json.dumps` takes.

  Args:
    settings: fields are numbers, strings, tuples of those, None, or again
      settings.

  Example:
    >>> from tokjax.retrieval import crisp
    >>> to_json(crisp.CrispConfig(**crisp.PRESETS["C25"]))["query_ratio"]
    0.25
  """
  return dataclasses.asdict(settings)


def from_json(kind: type[Settings], value: Any, *, source: str) -> Settings:
  """The settings that `to_json` took apart.

  Args:
    kind: the dataclass.
    value: what `json.loads` gave.
    source: where it stands, for messages; a path.

  Returns:
    The dataclass. Fields that are not there have their defaults.

  Raises:
    ValueError: for a field that the dataclass does not have, one that is
      needed and missing, or a value of another type; names source and field.

  Example:
    >>> from tokjax.retrieval import crisp
    >>> from_json(crisp.CrispConfig, {"query_cluster": 4}, source="a.json")
    Traceback (most recent call last):
    ValueError: a.json has unknown fields ['query_cluster']
  """
  if not isinstance(value, dict):
    raise ValueError(f"{source} must hold a JSON object, got {value!r}")
  fields = dataclasses.fields(kind)
  unknown = sorted(value.keys() - {field.name for field in fields})
  if unknown:
    raise ValueError(f"{source} has unknown fields {unknown}")
  missing = sorted(
    field.name
    for field in fields
    if field.name not in value
    and field.default is field.default_factory is dataclasses.MISSING
  )
  if missing:
    raise ValueError(f"{source} lacks the fields {missing}")
  hints = typing.get_type_hints(kind)
  read = {
    name: _read(hints[name], x, f"{source}: {name}")
    for name, x in value.items()
  }
  try:
    return kind(**read)
  except ValueError as error:  # the dataclass checks itself
    raise ValueError(f"{source}: {error}") from error


def _read(hint, value, where):
  """A value as its annotation says; its fields may be settings, or None."""
  origin, inner = typing.get_origin(hint), typing.get_args(hint)
  if origin in (types.UnionType, typing.Union):
    if value is None and type(None) in inner:
      return None
    (hint,) = (x for x in inner if x is not type(None))
    return _read(hint, value, where)
  if dataclasses.is_dataclass(hint):
    return from_json(hint, value, source=where)
  if origin is tuple and isinstance(value, (list, tuple)):
    return tuple(_read(inner[0], x, where) for x in value)
  if hint is float and type(value) is int:  # 1 stands for 1.0 in JSON
    return float(value)
  # True is an int to `isinstance`, but no number to us.
  fits = value in inner if origin is typing.Literal else type(value) is hint
  if not fits:
    wanted = hint.__name__ if isinstance(hint, type) else hint
    raise ValueError(f"{where} must be {wanted}, got {value!r}")
  return value

"""Files that are there whole or not at all."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

__all__ = ["replacing"]


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """A path to write to, which becomes `path` when the block ends well.

  Args:
    path: the file to write or replace; its folder is made.

  Yields:
    A path beside it. If the block fails, that file is removed and what was
    at `path` stays.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  aside = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    yield aside
    aside.replace(path)
  finally:
    aside.unlink(missing_ok=True)

"""Files that are there whole or not at all, and where they can be."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

__all__ = ["local_folder", "replacing"]


def local_folder(**folders: str | os.PathLike) -> pathlib.Path:
  """The path of one folder that must lie in a file system.

  Args:
    **folders: one path, by the name the message shall use.

  Returns:
    The path; nothing is made.

  Raises:
    ValueError: for a URL, such as that of a bucket.

  Example:
    >>> local_folder(folder="runs/a").name
    'a'
  """
  ((name, folder),) = folders.items()
  folder = os.fspath(folder)
  if "://" in folder:
    raise ValueError(
      f"{name} must be a path in a file system, got {folder!r}: mount the "
      "bucket (gs:// with gcsfuse) and name the mount, or copy a local folder "
      "there afterwards"
    )
  return pathlib.Path(folder)


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """A path to write to, which becomes `path` when the block ends well.

  Args:
    path: the file to write or replace; its folder is made.

  Yields:
    A path beside it. If the block fails, that file is removed and what was
    at `path` stays.

  Example:
    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "new" / "a.txt"
    >>> with replacing(path) as aside:
    ...   _ = aside.write_text("whole")
    >>> path.read_text()
    'whole'
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  aside = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    yield aside
    aside.replace(path)
  finally:
    aside.unlink(missing_ok=True)

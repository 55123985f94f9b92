"""Files under an on-disk index: arrays, manifests, locks and their errors.

`index_files` says what an index is; this module writes arrays through
TensorStore, creates manifests that appear whole or not at all, and turns
storage errors into messages that name the file or the folder.
"""

import contextlib
import hashlib
import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorstore as ts

try:
  import fcntl
except ImportError:  # not a POSIX system: the manifest alone guards writers
  fcntl = None

__all__ = [
  "LOCK",
  "DamagedIndexError",
  "WriterConflictError",
  "check_files",
  "commit",
  "files",
  "local_path",
  "manifest_name",
  "named_damage",
  "open_array",
  "read_manifest",
  "store",
  "versions",
  "write_arrays",
  "writer",
]

LOCK = "writer.lock"
_FORMAT = "tokjax token index"
_FORMAT_VERSIONS = (1, 2)  # see `index_files`
_CHUNK_BYTES = 32 << 20
_SMALL_FILE_BYTES = 1 << 20  # read and compared in full when opened
# One context, so that "memory://" names the same store in every call.
_CONTEXT = ts.Context()


class DamagedIndexError(ValueError):
  """A file of the index is missing, cut or changed; the message names it."""


class WriterConflictError(OSError):
  """Another writer holds the folder or has committed first."""


def local_path(folder: str) -> pathlib.Path | None:
  """The folder as a local path; None for a bucket."""
  if "://" not in folder:
    return pathlib.Path(folder)
  scheme, _, path = folder.partition("://")
  return pathlib.Path(path) if scheme == "file" else None


def store(folder: str) -> ts.KvStore:
  """The folder as a store of keys (file names) and values (bytes)."""
  local = local_path(folder)
  url = folder if local is None else f"file://{local.absolute()}"
  return ts.KvStore.open(url.rstrip("/") + "/", context=_CONTEXT).result()


def versions(folder: str) -> list[int]:
  """Numbers of all committed versions, ascending."""
  first, last = "manifest-", "manifest."  # "." follows "-"
  names = store(folder).list(ts.KvStore.KeyRange(first, last)).result()
  return sorted(
    int(name.decode()[len(first) : -len(".json")])
    for name in names
    if name.endswith(b".json")
  )


def manifest_name(version: int) -> str:
  """File name of a version's manifest."""
  return f"manifest-{version:08d}.json"


def read_manifest(folder: str, version: int) -> dict[str, Any]:
  """The manifest of a version.

  Raises:
    DamagedIndexError: if it is not what was written.
    ValueError: if it was written in a later format.
  """
  name = manifest_name(version)
  content = store(folder).read(name).result().value
  try:
    manifest = json.loads(content)
    digest = manifest.pop("sha256")
  except (ValueError, KeyError, AttributeError) as error:
    raise DamagedIndexError(
      f"index {folder} is damaged: {name} is not a whole manifest"
    ) from error
  if digest != _digest(manifest):
    raise DamagedIndexError(
      f"index {folder} is damaged: {name} (sha256 differs)"
    )
  for key, accepted in (
    ("format", (_FORMAT,)), ("format_version", _FORMAT_VERSIONS),
  ):  # fmt: skip
    if manifest.get(key) not in accepted:
      raise ValueError(
        f"{name} in {folder} must have {key} "
        f"{' or '.join(map(repr, accepted))}, got {manifest.get(key)!r}"
      )
  return manifest


def commit(folder: str, manifest: dict[str, Any]) -> dict[str, Any]:
  """Creates a manifest, which must be the next version.

  TensorStore's file driver writes aside, syncs and renames, so the manifest is
  there whole or not at all; the condition on its generation makes the creation
  fail if the name is taken, in buckets as well.

  Returns:
    The manifest with the format filled in.

  Raises:
    WriterConflictError: if the version exists.
    OSError: if it could not be written.
  """
  manifest = {"format": _FORMAT, "format_version": 1, **manifest}
  name = manifest_name(manifest["version"])
  content = json.dumps({**manifest, "sha256": _digest(manifest)}, indent=1)
  files_of = store(folder)
  before = files_of.read(name).result()
  created = before.state == "missing"
  if created:
    with _named_failure(folder, len(content)):
      stamp = files_of.write(
        name, content.encode(), if_equal=before.stamp.generation
      ).result()
    created = bool(stamp.generation)  # empty if the condition did not hold
  if not created:
    raise WriterConflictError(
      f"another writer has committed {name} in {folder}; open the index "
      "again and repeat the change"
    )
  return manifest


def write_arrays(
  folder: str, arrays: dict[str, np.ndarray]
) -> dict[str, dict[str, Any]]:
  """Writes arrays in chunks of whole rows; describes the files they became.

  Args:
    folder: the index.
    arrays: by path within it; the paths must be new.

  Returns:
    By path, the dtype, the shape, and size and sha256 of every file.

  Raises:
    OSError: if there is no room; names the folder and the bytes needed.
  """
  needed = sum(array.nbytes for array in arrays.values())
  _check_room(folder, needed)
  files_of, described = store(folder), {}
  for path, array in arrays.items():
    array = np.ascontiguousarray(array)
    with _named_failure(folder, needed):
      target = ts.open(
        _spec(folder, path),
        create=True,
        dtype=array.dtype.name,
        shape=array.shape,
        chunk_layout=ts.ChunkLayout(chunk_shape=_chunk_shape(array)),
        codec=_CODECS,
        context=_CONTEXT,
      ).result()
      target.write(array).result()
    prefix, entries = f"{path}/", {}
    keys = files_of.list(ts.KvStore.KeyRange(prefix, prefix[:-1] + "0"))
    for key in sorted(keys.result()):
      content = files_of.read(key).result().value
      entries[key.decode()[len(prefix) :]] = [
        len(content),
        hashlib.sha256(content).hexdigest(),
      ]
    described[path] = {
      "dtype": array.dtype.name,
      "shape": list(array.shape),
      "files": entries,
    }
  return described


def open_array(folder: str, path: str) -> ts.TensorStore:
  """A stored array, read in the parts that are asked for."""
  return ts.open(_spec(folder, path), read=True, context=_CONTEXT).result()


def files(manifest: dict[str, Any]) -> dict[str, tuple[int, str]]:
  """Size and sha256 of every file of a version, by name."""
  return {
    f"{path}/{name}": (size, digest)
    for path, array in manifest["arrays"].items()
    for name, (size, digest) in array["files"].items()
  }


def check_files(folder: str, manifest: dict[str, Any]) -> None:
  """Existence and (locally) size of all files, sha256 of the small ones.

  Raises:
    DamagedIndexError: naming every file that is missing or differs.
  """
  local, files_of, damaged = local_path(folder), store(folder), []
  present = None
  if local is None:
    present = {name.decode() for name in files_of.list().result()}
  for name, (size, digest) in files(manifest).items():
    if present is not None:
      found = size if name in present else None
    else:
      file = local / name
      found = file.stat().st_size if file.is_file() else None
    if found is None:
      damaged.append(f"{name} (missing)")
    elif found != size:
      damaged.append(f"{name} ({found} bytes instead of {size})")
    elif size <= _SMALL_FILE_BYTES:
      content = files_of.read(name).result().value
      if hashlib.sha256(content).hexdigest() != digest:
        damaged.append(f"{name} (sha256 differs)")
  if damaged:
    raise DamagedIndexError(f"index {folder} is damaged: {', '.join(damaged)}")


@contextlib.contextmanager
def writer(folder: str) -> Iterator[None]:
  """Holds the lock of a local folder; the system frees it if we are killed.

  Raises:
    WriterConflictError: if another process or thread holds it.
  """
  local = local_path(folder)
  if local is None or fcntl is None:
    yield
    return
  if not local.is_dir():
    raise FileNotFoundError(f"no index in {folder}: no such folder")
  with open(local / LOCK, "ab") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise WriterConflictError(
        f"another writer is at work in {folder} (it holds {LOCK})"
      ) from error
    yield


@contextlib.contextmanager
def named_damage(folder: str) -> Iterator[None]:
  """Turns TensorStore's errors about stored bytes into DamagedIndexError."""
  try:
    yield
  except DamagedIndexError:
    raise
  except ValueError as error:  # the text names the file
    raise DamagedIndexError(f"index {folder} is damaged: {error}") from error


@contextlib.contextmanager
def _named_failure(folder, needed):
  """Turns a failed write into an OSError with the folder and its needs."""
  try:
    yield
  except (ValueError, OSError) as error:
    raise OSError(
      f"could not write to {folder} ({needed} bytes needed): {error}"
    ) from error


def _check_room(folder, needed):
  local = local_path(folder)
  if local is None:
    return
  free = shutil.disk_usage(local).free
  if free < needed:
    raise OSError(
      f"no room in {folder}: {needed} bytes needed, {free} bytes free"
    )


# Every chunk ends in a crc32c of its bytes, checked whenever it is read.
_CODECS = ts.CodecSpec({"driver": "zarr3", "codecs": ["bytes", "crc32c"]})


def _spec(folder, path):
  return {"driver": "zarr3", "kvstore": (store(folder) / path).spec().to_json()}


def _chunk_shape(array):
  row = max(1, array.nbytes // max(1, array.shape[0]))
  rows = max(1, min(array.shape[0], _CHUNK_BYTES // row))
  return [rows, *(max(1, size) for size in array.shape[1:])]


def _digest(manifest):
  text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
  return hashlib.sha256(text.encode()).hexdigest()

"""The index on disk: a folder or bucket of immutable files and manifests.

    manifest-00000002.json     what belongs to version 2, with sizes and sha256
    codec-1-9f3a/...           arrays of the codec
    segment-2-71c0/...         documents of one `add`: payload, offsets, ids,
                               and what else was given of them

Every change writes new files first and then one new manifest, which exists
either whole or not at all; the highest number is the current version. So a
writer killed at any moment leaves the version before it readable, and a reader
keeps the version it opened while others are written. Nothing is removed until
`vacuum`. Arrays are zarr3 chunks with a crc32c each, read and written by
TensorStore; ids are UTF-8 bytes with offsets. Deleting marks documents, and
`compact` rewrites the folder without them.

Two writers: a lock on the folder lets one in (local file systems), and the
manifest is created only if its number is still free (also in buckets).

Manifests have format version 1, or 2 where rows have word ids: whoever does not
know those must not search such rows.
"""

import os
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from tokjax import checks
from tokjax.retrieval import codecs
from tokjax.retrieval import index_storage as storage
from tokjax.retrieval.index_reader import Documents, StoredIndex
from tokjax.retrieval.index_storage import (
  DamagedIndexError,
  WriterConflictError,
)

__all__ = [
  "DamagedIndexError",
  "Documents",
  "StoredIndex",
  "WriterConflictError",
  "add",
  "compact",
  "create",
  "delete",
  "open_index",
  "vacuum",
]


def create(
  folder: str | os.PathLike,
  codec: codecs.Codec,
  *,
  metadata: dict[str, Any] | None = None,
) -> StoredIndex:
  """An empty index, version 1.

  Args:
    folder: a local path, or a URL that TensorStore opens ("gs://bucket/path",
      "s3://bucket/path"); must hold no index.
    codec: how all its rows are encoded.
    metadata: JSON-ready facts to keep with it: model name and sha256, limits.

  Returns:
    The index, opened.

  Raises:
    WriterConflictError: if there is an index already.
    OSError: if the disk is full or not writable.

  Example:
    >>> import tempfile
    >>> import numpy as np
    >>> from tokjax.retrieval import codecs, index_files
    >>> folder = tempfile.mkdtemp()
    >>> codec = codecs.FloatCodec(dim=2)
    >>> _ = index_files.create(folder, codec)
    >>> rows = {"values": np.eye(2, dtype=np.float32)}
    >>> index_files.add(folder, ["a", "b"], rows, np.array([0, 1, 2])).version
    2
    >>> index_files.delete(folder, ["a"]).ids()
    ['b']
  """
  folder = os.fspath(folder)
  if (local := storage.local_path(folder)) is not None:
    local.mkdir(parents=True, exist_ok=True)
  with storage.writer(folder):
    if versions := storage.versions(folder):
      raise WriterConflictError(
        f"folder {folder} already holds an index, version {versions[-1]}"
      )
    settings, arrays = codecs.to_arrays(codec)
    prefix = f"codec-1-{secrets.token_hex(4)}"
    paths = {name: f"{prefix}/{name}" for name in arrays}
    written = storage.write_arrays(
      folder, {paths[name]: array for name, array in arrays.items()}
    )
    manifest = {
      "version": 1,
      "metadata": metadata or {},
      "codec": {"settings": settings, "arrays": paths},
      "segments": [],
      "arrays": written,
    }
    return _commit(folder, manifest)


def open_index(
  folder: str | os.PathLike, version: int | None = None
) -> StoredIndex:
  """A version of an index, opened for reading without loading it.

  Checks that every file of the version exists and, on a local file system,
  has its full size, and reads those below 1 MiB to compare their sha256.
  Larger files carry a crc32c per chunk, which is checked whenever a chunk is
  read; `verify` checks all of them now.

  Args:
    folder: as given to `create`.
    version: number of the version; None for the newest.

  Returns:
    The opened index. It goes on working while other versions are written.

  Raises:
    FileNotFoundError: if there is no such index or version.
    DamagedIndexError: naming the file that is missing, cut or changed.
  """
  folder = os.fspath(folder)
  versions = storage.versions(folder)
  if not versions or (version is not None and version not in versions):
    found = f"versions {versions}" if versions else "no manifest"
    wanted = "" if version is None else f" version {version}"
    raise FileNotFoundError(f"no index{wanted} in {folder}: found {found}")
  manifest = storage.read_manifest(
    folder, versions[-1] if version is None else version
  )
  storage.check_files(folder, manifest)
  return StoredIndex(folder, manifest)


def add(
  folder: str | os.PathLike,
  ids: Sequence[str],
  payload: dict[str, Any],
  offsets: np.ndarray,
  *,
  vectors: dict[str, Any] | None = None,
  texts: Sequence[str] | None = None,
  word_ids: np.ndarray | None = None,
) -> StoredIndex:
  """Adds documents as a new segment and commits a new version.

  Args:
    folder: as given to `create`.
    ids: one string per document, none of them in the index.
    payload: rows encoded by the index's codec, leading axis T.
    offsets: document i owns rows offsets[i]:offsets[i + 1].
    vectors: further arrays with a row per document; the same names in every
      segment.
    texts: one text per document, to be shown; all segments have them or none.
    word_ids: uint32[T], which word each row stands for; all segments have them
      or none.

  Returns:
    The new version, opened.

  Raises:
    ValueError: for an id that exists, or sizes or names that disagree.
    TypeError: if word ids are not uint32.
    WriterConflictError: if another writer is at work; nothing has changed.
    OSError: if the disk is full; nothing has changed.
  """
  folder = os.fspath(folder)
  vectors = dict(vectors or {})
  offsets = np.asarray(offsets, np.int64)
  checks.same_size(ids=len(ids), offsets_documents=len(offsets) - 1)
  for name, array in vectors.items():
    checks.same_size(**{"ids": len(ids), f"vectors_{name}": array.shape[0]})
  if texts is not None:
    checks.same_size(ids=len(ids), texts=len(texts))
  for name, array in payload.items():
    checks.same_size(
      **{"offsets_last": int(offsets[-1]), f"payload_{name}": array.shape[0]}
    )
  if word_ids is not None:
    checks.same_size(offsets_last=int(offsets[-1]), word_ids=len(word_ids))
    checks.has_dtype(np.uint32, word_ids=word_ids)
  with storage.writer(folder):
    current = open_index(folder)
    known, seen = set(current.ids()), set()
    for name in ids:
      if name in known or name in seen:
        raise ValueError(f"id {name!r} is in the index or given twice")
      seen.add(name)
    for segment in current.manifest["segments"][:1]:
      checks.one_of((segment["vectors"],), vectors_names=sorted(vectors))
      checks.one_of((segment["payload"],), payload_names=sorted(payload))
      checks.one_of((segment["texts"],), has_texts=texts is not None)
      checks.one_of(
        (segment.get("word_ids", False),), has_word_ids=word_ids is not None
      )
    documents = Documents(payload, offsets, list(ids), vectors, texts, word_ids)
    return _commit_segments(current, current.manifest["segments"], documents)


def delete(folder: str | os.PathLike, ids: Sequence[str]) -> StoredIndex:
  """Marks documents as deleted and commits a new version.

  Args:
    folder: as given to `create`.
    ids: documents to delete; they may be added again afterwards.

  Returns:
    The new version, opened.

  Raises:
    ValueError: for an id that is not in the index.
    WriterConflictError: if another writer is at work.
  """
  folder = os.fspath(folder)
  with storage.writer(folder):
    current = open_index(folder)
    wanted, segments = set(ids), []
    for segment in current.manifest["segments"]:
      deleted = set(segment["deleted"])
      for place, name in enumerate(current.segment_ids(segment)):
        if name in wanted and place not in deleted:
          deleted.add(place)
          wanted.remove(name)
      segments.append({**segment, "deleted": sorted(deleted)})
    if wanted:
      raise ValueError(f"ids not in the index: {sorted(wanted)[:5]}")
    manifest = {**current.manifest, "segments": segments}
    return _commit(folder, {**manifest, "version": current.version + 1})


def compact(folder: str | os.PathLike) -> StoredIndex:
  """Rewrites the index as one segment without deleted documents.

  Old files stay until `vacuum`, for readers of earlier versions.

  Args:
    folder: as given to `create`.

  Returns:
    The new version, opened.

  Raises:
    WriterConflictError: if another writer is at work.
    OSError: if the disk has no room for the new segment.
  """
  folder = os.fspath(folder)
  with storage.writer(folder):
    current = open_index(folder)
    if not current.manifest["segments"]:
      return current
    return _commit_segments(current, [], current.load())


def vacuum(folder: str | os.PathLike) -> list[str]:
  """Removes every file that the newest version does not use.

  Readers of earlier versions lose them. What a killed writer left goes too.

  Args:
    folder: as given to `create`.

  Returns:
    Names of the removed files.

  Raises:
    WriterConflictError: if a writer is at work.
  """
  folder = os.fspath(folder)
  with storage.writer(folder):
    current = open_index(folder)
    store = storage.store(folder)
    used = {
      *storage.files(current.manifest),
      storage.manifest_name(current.version),
      storage.LOCK,
    }
    names = [name.decode() for name in store.list().result()]
    removed = sorted(name for name in names if name not in used)
    # Manifests first: a version is never listed with part of its files.
    for name in sorted(removed, key=lambda name: "/" in name):
      store.delete_range(ts.KvStore.KeyRange(name, name + "\0")).result()
    return removed


def _commit(folder, manifest):
  return StoredIndex(folder, storage.commit(folder, manifest))


def _commit_segments(current, segments, documents):
  """The next version: the given segments and one with these documents."""
  version = current.version + 1
  # A random part, as another writer may be at the same version.
  name = f"segment-{version}-{secrets.token_hex(4)}"
  arrays = {
    "offsets": np.asarray(documents.offsets, np.int64),
    **_strings("id", documents.ids),
    **_named("payload", documents.payload),
    **_named("vectors", documents.vectors),
  }
  if documents.texts is not None:
    arrays |= _strings("text", documents.texts)
  format_version = 1
  if documents.word_ids is not None:
    arrays["word_ids"] = documents.word_ids
    format_version = 2
  arrays = {f"{name}/{key}": x for key, x in arrays.items()}
  written = storage.write_arrays(current.folder, arrays)
  segment = {
    "name": name,
    "num_documents": len(documents.ids),
    "payload": sorted(documents.payload),
    "vectors": sorted(documents.vectors),
    "texts": documents.texts is not None,
    "deleted": [],
  }
  if format_version == 2:
    segment["word_ids"] = True
  kept = tuple(f"{entry['name']}/" for entry in segments)
  kept += tuple(current.manifest["codec"]["arrays"].values())
  old = (
    {
      path: entry
      for path, entry in current.manifest["arrays"].items()
      if path.startswith(kept)
    }
    if kept
    else {}
  )
  return _commit(
    current.folder,
    {
      **current.manifest,
      "format_version": format_version,
      "version": version,
      "segments": [*segments, segment],
      "arrays": {**old, **written},
    },
  )


def _strings(name, texts):
  """Strings as UTF-8 bytes back to back, and where each begins."""
  encoded = [text.encode() for text in texts]
  ends = np.cumsum([0, *map(len, encoded)])
  return {
    f"{name}_offsets": ends.astype(np.int64),
    f"{name}_bytes": np.frombuffer(b"".join(encoded), np.uint8),
  }


def _named(kind, arrays):
  return {f"{kind}.{name}": np.asarray(x) for name, x in arrays.items()}

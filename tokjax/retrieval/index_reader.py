"""One version of an index on disk, opened for reading."""

import dataclasses
import hashlib
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

from tokjax.retrieval import codecs
from tokjax.retrieval import index_storage as storage

__all__ = ["Documents", "StoredIndex"]


class Documents(NamedTuple):
  """Stored documents that have not been deleted, on the host.

  Attributes:
    payload: encoded rows by name, leading axis T.
    offsets: document i owns rows offsets[i]:offsets[i + 1], int64.
    ids: one string per document.
    vectors: further arrays with a row per document, by name.
    texts: one text per document; None if none were given.
    word_ids: which word each row stands for, uint32[T]; None if none were
      given.
  """

  payload: dict[str, np.ndarray]
  offsets: np.ndarray
  ids: list[str]
  vectors: dict[str, np.ndarray]
  texts: list[str] | None = None
  word_ids: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class StoredIndex:
  """One version of an index, opened for reading; made by
  `index_files.open_index`.

  Attributes:
    folder: where it is.
    manifest: the parsed manifest.
  """

  folder: str
  manifest: dict[str, Any]

  @property
  def version(self) -> int:
    """Number of the version that was opened."""
    return self.manifest["version"]

  @property
  def metadata(self) -> dict[str, Any]:
    """What was given to `create`, such as the sha256 of the model."""
    return self.manifest["metadata"]

  @property
  def num_documents(self) -> int:
    """Documents that have not been deleted."""
    return sum(
      segment["num_documents"] - len(segment["deleted"])
      for segment in self.manifest["segments"]
    )

  @property
  def num_bytes(self) -> int:
    """Bytes of all files of this version."""
    return sum(size for size, _ in storage.files(self.manifest).values())

  def codec(self) -> codecs.Codec:
    """The codec that encodes and decodes the rows."""
    settings = self.manifest["codec"]
    names = settings["arrays"]
    arrays = {name: self._read(path) for name, path in names.items()}
    return codecs.from_arrays(settings["settings"], arrays)

  def array(self, path: str) -> ts.TensorStore:
    """A stored array that reads only what is asked of it.

    Args:
      path: a key of `manifest["arrays"]`, such as
        "segment-2-71c0/payload.values".

    Raises:
      DamagedIndexError: if its metadata cannot be read.
    """
    with storage.named_damage(self.folder):
      return storage.open_array(self.folder, path)

  def load(self) -> Documents:
    """All documents that have not been deleted, in the order they were added.

    Raises:
      DamagedIndexError: if a file fails its checksum.
    """
    parts = [self._load(segment) for segment in self.manifest["segments"]]
    if not parts:
      none = np.zeros(1, np.int64)
      return Documents(payload={}, offsets=none, ids=[], vectors={})
    lengths = np.concatenate([np.diff(part.offsets) for part in parts])
    return Documents(
      payload=_join([part.payload for part in parts]),
      offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
      ids=[name for part in parts for name in part.ids],
      vectors=_join([part.vectors for part in parts]),
      texts=None
      if parts[0].texts is None
      else [text for part in parts for text in part.texts],
      word_ids=None
      if parts[0].word_ids is None
      else np.concatenate([part.word_ids for part in parts]),
    )

  def ids(self) -> list[str]:
    """Ids of the documents that have not been deleted."""
    return [
      name
      for segment in self.manifest["segments"]
      for name in _without(self.segment_ids(segment), segment["deleted"])
    ]

  def verify(self) -> None:
    """Reads every file and compares its size and sha256 with the manifest.

    Raises:
      DamagedIndexError: naming every file that is missing or differs.
    """
    store, damaged = storage.store(self.folder), []
    for name, (size, digest) in storage.files(self.manifest).items():
      result = store.read(name).result()
      content = result.value
      if result.state == "missing":
        damaged.append(f"{name} (missing)")
      elif len(content) != size:
        damaged.append(f"{name} ({len(content)} bytes instead of {size})")
      elif hashlib.sha256(content).hexdigest() != digest:
        damaged.append(f"{name} (sha256 differs)")
    if damaged:
      raise storage.DamagedIndexError(
        f"index {self.folder} is damaged: {', '.join(damaged)}"
      )

  def _read(self, path):
    with storage.named_damage(self.folder):
      return np.asarray(self.array(path).read().result())

  def segment_ids(self, segment: dict[str, Any]) -> list[str]:
    """Ids of a segment of the manifest, deleted ones included."""
    return self._strings(segment, "id")

  def _strings(self, segment, kind):
    name = segment["name"]
    text = self._read(f"{name}/{kind}_bytes").tobytes()
    ends = self._read(f"{name}/{kind}_offsets")
    return [
      text[start:end].decode()
      for start, end in zip(ends[:-1], ends[1:], strict=True)
    ]

  def _load(self, segment):
    name, deleted = segment["name"], segment["deleted"]
    offsets = self._read(f"{name}/offsets")
    payload = {
      key: self._read(f"{name}/payload.{key}") for key in segment["payload"]
    }
    vectors = {
      key: self._read(f"{name}/vectors.{key}") for key in segment["vectors"]
    }
    ids = self.segment_ids(segment)
    texts = self._strings(segment, "text") if segment["texts"] else None
    word_ids = None
    if segment.get("word_ids"):  # only manifests of format version 2 say so
      word_ids = self._read(f"{name}/word_ids")
    if not deleted:
      return Documents(payload, offsets, ids, vectors, texts, word_ids)
    keep = np.ones(len(ids), bool)
    keep[deleted] = False
    lengths = np.diff(offsets)
    rows = np.repeat(keep, lengths)
    return Documents(
      payload={key: x[rows] for key, x in payload.items()},
      offsets=np.concatenate([[0], np.cumsum(lengths[keep])]),
      ids=_without(ids, deleted),
      vectors={key: x[keep] for key, x in vectors.items()},
      texts=None if texts is None else _without(texts, deleted),
      word_ids=None if word_ids is None else word_ids[rows],
    )


def _join(parts):
  return {
    name: np.concatenate([part[name] for part in parts]) for name in parts[0]
  }


def _without(items, places):
  places = set(places)
  return [item for place, item in enumerate(items) if place not in places]

"""Indexes on disk: versions, deletion, killed writers, damage, conflicts."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from tokjax.retrieval import codecs, index_files, index_storage

DIM = 8


def documents(seed, lengths, prefix="d"):
  random = np.random.default_rng(seed)
  offsets = np.concatenate([[0], np.cumsum(lengths)])
  rows = random.standard_normal((offsets[-1], DIM)).astype(np.float32)
  ids = [f"{prefix}{i}-Ü" for i in range(len(lengths))]
  return ids, {"values": rows}, offsets


@pytest.fixture
def folder(tmp_path):
  path = tmp_path / "index"
  index_files.create(
    path, codecs.FloatCodec(DIM), metadata={"model_sha256": "ab"}
  )
  index_files.add(path, *documents(0, [3, 0, 5]))
  return path


def test_what_was_added_is_read(folder):
  ids, payload, offsets = documents(0, [3, 0, 5])
  index = index_files.open_index(folder)
  found = index.load()
  assert found.ids == ids == index.ids()
  assert index.metadata == {"model_sha256": "ab"}
  assert index.num_documents == 3 and index.version == 2
  np.testing.assert_array_equal(found.offsets, offsets)
  np.testing.assert_array_equal(found.payload["values"], payload["values"])


@pytest.mark.parametrize("name", codecs.NAMES)
def test_codec_survives(tmp_path, name):
  import jax

  rows = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)
  codec = codecs.train(name, jax.random.key(0), rows, num_centroids=4)
  payload = codecs.encode_corpus(codec, rows)
  index_files.create(tmp_path, codec)
  index_files.add(tmp_path, ["a"], payload, np.array([0, 64]))
  index = index_files.open_index(tmp_path)
  want = codec.decode(codec.encode(jax.numpy.asarray(rows)))
  got = index.codec().decode(
    jax.tree.map(jax.numpy.asarray, index.load().payload)
  )
  np.testing.assert_array_equal(got, want)


def test_lazy_array_reads_a_part(folder):
  index = index_files.open_index(folder)
  name = index.manifest["segments"][0]["name"]
  part = index.array(f"{name}/payload.values")[2:4].read().result()
  want = documents(0, [3, 0, 5])[1]["values"][2:4]
  np.testing.assert_array_equal(part, want)


def test_delete_then_add_then_compact(folder):
  ids, payload, offsets = documents(0, [3, 0, 5])
  index_files.delete(folder, [ids[0]])
  more_ids, more, more_offsets = documents(1, [2], prefix="x")
  index_files.add(folder, more_ids, more, more_offsets)
  # A deleted id is free again.
  index_files.add(folder, [ids[0]], more, more_offsets)
  want = np.concatenate([payload["values"][3:], more["values"], more["values"]])
  for index in (index_files.open_index(folder), index_files.compact(folder)):
    found = index.load()
    assert found.ids == [ids[1], ids[2], more_ids[0], ids[0]]
    np.testing.assert_array_equal(found.offsets, [0, 0, 5, 7, 9])
    np.testing.assert_array_equal(found.payload["values"], want)
  assert len(index.manifest["segments"]) == 1


def test_vectors_follow_their_documents(tmp_path):
  index_files.create(tmp_path, codecs.FloatCodec(DIM))
  ids, payload, offsets = documents(0, [1, 2, 3])
  vectors = {"mean": np.arange(6, dtype=np.float32).reshape(3, 2)}
  index_files.add(tmp_path, ids, payload, offsets, vectors=vectors)
  found = index_files.delete(tmp_path, [ids[1]]).load()
  np.testing.assert_array_equal(found.vectors["mean"], [[0, 1], [4, 5]])
  with pytest.raises(ValueError, match="vectors_names"):
    index_files.add(tmp_path, ["new"], *documents(1, [1])[1:])


def test_texts_follow_their_documents(tmp_path):
  index_files.create(tmp_path, codecs.FloatCodec(dim=DIM))
  ids, payload, offsets = documents(0, [2, 1])
  texts = ["Auftrieb für Flügel", ""]
  index_files.add(tmp_path, ids, payload, offsets, texts=texts)
  more_ids, more, more_offsets = documents(1, [3], prefix="x")
  with pytest.raises(ValueError, match="has_texts must be one of True"):
    index_files.add(tmp_path, more_ids, more, more_offsets)
  index_files.add(tmp_path, more_ids, more, more_offsets, texts=["third"])
  assert index_files.open_index(tmp_path).load().texts == [*texts, "third"]
  index_files.delete(tmp_path, ids[:1])
  assert index_files.compact(tmp_path).load().texts == ["", "third"]


def test_size_on_disk_is_that_of_the_files(folder):
  found = index_files.vacuum(folder) is not None
  stored = index_files.open_index(folder)
  data = [p for p in folder.rglob("*") if p.is_file() and "/" in str(
    p.relative_to(folder))]  # fmt: skip
  assert found and stored.num_bytes == sum(p.stat().st_size for p in data)


def test_reader_keeps_its_version_while_others_are_written(folder):
  reader = index_files.open_index(folder)
  ids, payload, _ = documents(0, [3, 0, 5])
  index_files.delete(folder, ids[:2])
  index_files.compact(folder)
  found = reader.load()
  assert found.ids == ids
  np.testing.assert_array_equal(found.payload["values"], payload["values"])
  assert index_files.open_index(folder, version=2).ids() == ids
  assert index_files.open_index(folder).ids() == ids[2:]


def test_vacuum_keeps_only_the_newest(folder):
  index_files.delete(folder, [documents(0, [3, 0, 5])[0][0]])
  newest = index_files.compact(folder)
  left_over = pathlib.Path(folder) / "segment-9-dead" / "offsets"
  left_over.mkdir(parents=True)
  (left_over / "zarr.json").write_text("half")
  removed = index_files.vacuum(folder)
  assert "segment-9-dead/offsets/zarr.json" in removed
  assert "manifest-00000002.json" in removed
  newest.verify()
  with pytest.raises(FileNotFoundError, match="version 2"):
    index_files.open_index(folder, version=2)
  assert index_files.vacuum(folder) == []


def files_of(folder, text):
  return [
    path
    for path in sorted(pathlib.Path(folder).rglob("*"))
    if path.is_file() and text in str(path)
  ]


@pytest.mark.parametrize("kind", ["payload.values", "offsets", "id_bytes"])
def test_truncated_file_is_named_when_opened(folder, kind):
  path = files_of(folder, f"{kind}/c/")[0]
  os.truncate(path, path.stat().st_size - 1)
  with pytest.raises(index_files.DamagedIndexError, match=f"{kind}.*bytes"):
    index_files.open_index(folder)


def test_missing_file_is_named_when_opened(folder):
  files_of(folder, "payload.values/zarr.json")[0].unlink()
  with pytest.raises(index_files.DamagedIndexError, match="zarr.json.*missing"):
    index_files.open_index(folder)


def flip(path, place):
  content = bytearray(path.read_bytes())
  content[place] ^= 1
  path.write_bytes(content)


def test_changed_small_file_is_named_when_opened(folder):
  flip(files_of(folder, "payload.values/c/")[0], 10)
  with pytest.raises(
    index_files.DamagedIndexError, match="payload.values.*sha"
  ):
    index_files.open_index(folder)


def test_changed_large_file_is_named_by_load_and_verify(folder, monkeypatch):
  monkeypatch.setattr(index_storage, "_SMALL_FILE_BYTES", 0)
  flip(files_of(folder, "payload.values/c/")[0], 10)
  index = index_files.open_index(folder)
  for read in (index.load, index.verify):
    with pytest.raises(index_files.DamagedIndexError, match="payload.values"):
      read()


@pytest.mark.parametrize("place", [0, 60, -5])
def test_changed_manifest_is_named(folder, place):
  path = pathlib.Path(folder) / "manifest-00000002.json"
  flip(path, place)
  with pytest.raises(index_files.DamagedIndexError, match=path.name):
    index_files.open_index(folder)
  assert index_files.open_index(folder, version=1).num_documents == 0


def test_ids_must_be_new_and_known(folder):
  ids, payload, offsets = documents(0, [3, 0, 5])
  with pytest.raises(ValueError, match="d0-Ü"):
    index_files.add(folder, ids, payload, offsets)
  with pytest.raises(ValueError, match="nobody"):
    index_files.delete(folder, ["nobody"])
  with pytest.raises(ValueError, match="ids=1, offsets_documents=3"):
    index_files.add(folder, ["x"], payload, offsets)
  assert index_files.open_index(folder).version == 2


def test_second_writer_is_refused(folder):
  with index_storage.writer(str(folder)):
    with pytest.raises(index_files.WriterConflictError, match="writer.lock"):
      index_files.delete(folder, ["d0-Ü"])
  with pytest.raises(index_files.WriterConflictError, match="already holds"):
    index_files.create(folder, codecs.FloatCodec(DIM))


def test_taken_version_is_not_overwritten(folder):
  """Where there is no lock (buckets), the manifest decides."""
  index = index_files.open_index(folder)
  manifest = {**index.manifest, "version": index.version + 1}
  index_storage.commit(str(folder), manifest)
  before = (pathlib.Path(folder) / "manifest-00000003.json").read_bytes()
  with pytest.raises(
    index_files.WriterConflictError, match="manifest-00000003"
  ):
    index_storage.commit(str(folder), {**manifest, "metadata": {"other": 1}})
  after = (pathlib.Path(folder) / "manifest-00000003.json").read_bytes()
  assert before == after


def test_works_in_a_store_that_is_no_file_system():
  url = "memory://bucket/index"
  index_files.create(url, codecs.FloatCodec(DIM))
  ids, payload, offsets = documents(0, [3, 0, 5])
  index_files.add(url, ids, payload, offsets)
  index = index_files.delete(url, ids[:1])
  index.verify()
  np.testing.assert_array_equal(
    index.load().payload["values"], payload["values"][3:]
  )
  index_files.compact(url)
  index_files.vacuum(url)
  assert index_files.open_index(url).ids() == ids[1:]


def test_full_disk_names_folder_and_bytes(folder, monkeypatch):
  full = shutil.disk_usage(folder)._replace(free=10)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
  with pytest.raises(OSError, match=r"index: \d+ bytes needed, 10 bytes free"):
    index_files.add(folder, *documents(1, [2], prefix="x"))
  assert index_files.open_index(folder).version == 2


WRITER = """
import os, resource, signal, sys
import numpy as np
from tokjax.retrieval import index_files, index_storage
folder, moment = sys.argv[1:]

def die_after(name, calls):
  original, left = getattr(index_storage, name), [calls]
  def wrapped(*args, **kwargs):
    if not left[0]:
      os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    return original(*args, **kwargs)
  setattr(index_storage, name, wrapped)

if moment == "before any file":
  die_after("write_arrays", 0)
elif moment == "between arrays":
  die_after("_spec", 3)
elif moment == "before the manifest":
  die_after("commit", 0)
elif moment == "no room":
  resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
elif moment == "while writing":
  import threading
  threading.Timer(0.15, os.kill, (os.getpid(), signal.SIGKILL)).start()
rows = np.random.default_rng(0).standard_normal((1 << 20, 8), np.float32)
index_files.add(
    folder, ["big", "empty"], {"values": rows}, np.array([0, 1 << 20, 1 << 20])
)
"""
KILLED = [
  "before any file",
  "between arrays",
  "while writing",
  "before the manifest",
]


def test_killed_writer_leaves_the_version_before(folder, tmp_path):
  """Real processes, ended by SIGKILL at several moments of an `add`."""
  started = {}
  for moment in [*KILLED, "no room"]:
    copy = tmp_path / moment.replace(" ", "-")
    shutil.copytree(folder, copy)
    started[moment] = (
      copy,
      subprocess.Popen(
        [sys.executable, "-c", WRITER, str(copy), moment],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        cwd=pathlib.Path(__file__).parents[2],
        stderr=subprocess.PIPE,
        text=True,
      ),
    )
  ids = documents(0, [3, 0, 5])[0]
  for moment, (copy, process) in started.items():
    error = process.communicate(timeout=120)[1]
    if moment == "no room":  # a real failing write, not a check before it
      assert process.returncode == 1 and "OSError" in error, error
      assert str(copy) in error and "bytes needed" in error
    else:
      assert process.returncode == -signal.SIGKILL, (moment, error)
    index = index_files.open_index(copy)
    assert (index.version, index.ids()) == (2, ids), moment
    index.verify()
    # The lock went with the process; the folder can be written and cleaned.
    assert index_files.add(copy, *documents(2, [4], "n")).version == 3
    index_files.vacuum(copy)
    index_files.open_index(copy).verify()


def test_readers_during_updates(folder):
  """Every opening during a row of commits sees one whole version."""
  import threading

  ids = documents(0, [3, 0, 5])[0]
  failures, stop = [], threading.Event()

  def read():
    while not stop.is_set():
      try:
        found = index_files.open_index(folder).load()
        assert found.ids[:3] == ids
        assert len(found.offsets) == len(found.ids) + 1
      except Exception as error:  # carried to the test's own thread
        failures.append(error)
        return

  readers = [threading.Thread(target=read) for _ in range(2)]
  for reader in readers:
    reader.start()
  for number in range(6):
    index_files.add(folder, *documents(number, [2], prefix=f"n{number}"))
  stop.set()
  for reader in readers:
    reader.join()
  assert not failures
  assert index_files.open_index(folder).num_documents == 9

"""CIFAR-10 from an archive of arrays and from the binary batches."""

import pickle

import numpy as np
import pytest

from tokjax.data import cifar10


def arrays(train=7, test=4):
  rng = np.random.default_rng(0)
  found = {"classes": np.array(cifar10.CLASSES)}
  for name, count in (("train", train), ("test", test)):
    shape = (count, 32, 32, 3)
    found[f"{name}_x"] = rng.integers(0, 256, shape).astype(np.uint8)
    found[f"{name}_y"] = rng.integers(0, 10, count).astype(np.uint8)
  return found


def write_binary(path, images, labels):
  planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
  path.write_bytes(np.concatenate([labels[:, None], planes], 1).tobytes())


def assert_same(got, images, labels):
  np.testing.assert_array_equal(got.images, images)
  np.testing.assert_array_equal(got.labels, labels)
  assert got.classes == cifar10.CLASSES and got.labels.dtype == np.int32


@pytest.mark.parametrize("as_folder", [False, True])
def test_reads_an_archive(as_folder, tmp_path):
  want = arrays()
  np.savez(tmp_path / "cifar10.npz", **want)
  path = tmp_path if as_folder else tmp_path / "cifar10.npz"
  train, test = cifar10.load(path)
  assert_same(train, want["train_x"], want["train_y"])
  assert_same(test, want["test_x"], want["test_y"])


def test_reads_binary_batches(tmp_path):
  want = arrays()
  x, y = want["train_x"], want["train_y"]
  write_binary(tmp_path / "data_batch_1.bin", x[:3], y[:3])
  write_binary(tmp_path / "data_batch_2.bin", x[3:], y[3:])
  write_binary(tmp_path / "test_batch.bin", want["test_x"], want["test_y"])
  train, test = cifar10.load(tmp_path)
  assert_same(train, x, y)
  assert_same(test, want["test_x"], want["test_y"])


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"test_y": None}, r"lacks \['test_y'\]"),
    ({"train_x": np.zeros((7, 28, 28, 3), np.uint8)}, r"\[n, 32, 32, 3\]"),
    ({"train_x": np.zeros((7, 32, 32, 3))}, "images must be uint8"),
    ({"train_y": np.arange(4, 11)}, "largest_label must lie in 0..9"),
    ({"train_y": np.zeros(6, int)}, "images=7, labels=6"),
    ({"classes": np.array(["cat"])}, "classes must be those of CIFAR-10"),
  ],
)
def test_wrong_archives_are_named(changes, message, tmp_path):
  found = {k: v for k, v in {**arrays(), **changes}.items() if v is not None}
  np.savez(tmp_path / "bad.npz", **found)
  with pytest.raises(ValueError, match=f"bad.npz is not CIFAR-10: .*{message}"):
    cifar10.load(tmp_path / "bad.npz")


def test_pickles_are_not_opened(tmp_path):
  class Bomb:
    def __reduce__(self):
      return (pytest.fail, ("a pickle was opened",))

  path = tmp_path / "bad.npz"
  path.write_bytes(pickle.dumps(Bomb()))
  with pytest.raises(ValueError, match="bad.npz is not CIFAR-10"):
    cifar10.load(path)
  held = arrays()
  held["train_y"] = np.array([Bomb()] * 7, dtype=object)
  np.savez(path, **held)
  with pytest.raises(ValueError, match="bad.npz is not CIFAR-10"):
    cifar10.load(path)


def test_cut_files_are_named(tmp_path):
  path = tmp_path / "cifar10.npz"
  np.savez(path, **arrays())
  path.write_bytes(path.read_bytes()[:5000])
  with pytest.raises(ValueError, match="cifar10.npz is not CIFAR-10"):
    cifar10.load(path)
  folder = tmp_path / "binary"
  folder.mkdir()
  with pytest.raises(FileNotFoundError, match="binary must be an .npz file"):
    cifar10.load(folder)
  (folder / "test_batch.bin").write_bytes(b"\0" * 3073)
  with pytest.raises(FileNotFoundError, match="no data_batch_1.bin"):
    cifar10.load(folder)
  (folder / "data_batch_1.bin").write_bytes(b"\0" * 3000)
  with pytest.raises(ValueError, match="records of 3073 bytes, got 3000"):
    cifar10.load(folder)
  (folder / "data_batch_1.bin").write_bytes(b"\x0b" * 3073)
  with pytest.raises(ValueError, match="data_batch_1.bin is not CIFAR-10"):
    cifar10.load(folder)


def test_real_subset(shared_data):
  train, test = cifar10.load(shared_data / "images-cifar10")
  assert (np.bincount(train.labels) == 1500).all()
  assert (np.bincount(test.labels) == 300).all()
  assert 100 < train.images.mean() < 140

"""Images from folders, archives and TFDS tables that are made here."""

import io
import json

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

from tokjax.data import image_batches, image_sets
from tokjax.data.image_batches import ImageSet
from tokjax.data.image_crops import RandomResizedCrop, centre_crop


def picture(height=9, width=12, seed=0, channels=3):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (height, width, channels)).astype(np.uint8)


def save(path, image):
  path.parent.mkdir(parents=True, exist_ok=True)
  PIL.Image.fromarray(image).save(path)


def test_folder(tmp_path):
  images = [picture(seed=seed) for seed in range(3)]
  for name, image in zip(("b.png", "a.png", "c.png"), images, strict=True):
    save(tmp_path / name, image)
  (tmp_path / "README.md").write_text("not an image")
  want = np.stack([images[1], images[0], images[2]])
  np.testing.assert_array_equal(image_sets.load(tmp_path), want)
  opened = image_sets.open_images(tmp_path)
  assert len(opened) == 3
  np.testing.assert_array_equal(opened[np.int64(2)], want[2])
  with pytest.raises(IndexError, match="row must lie in 0..2, got 3"):
    opened[3]
  got = image_sets.load(tmp_path, size=6, num_images=2, resample="box")
  small = [centre_crop(x, 6, resample="box") for x in want[[0, 1]]]
  np.testing.assert_array_equal(got, small)


def test_folder_of_classes(tmp_path):
  names = ("val/dog/a.png", "val/cat/b.png", "train/cat/c.png")
  for seed, name in enumerate(names):
    save(tmp_path / name, picture(seed=seed))
  (tmp_path / "val" / "LICENSE").write_text("not an image")
  got = image_sets.load(tmp_path, split="val")
  np.testing.assert_array_equal(got, [picture(seed=1), picture(seed=0)])


def test_several_shapes_need_a_size(tmp_path):
  save(tmp_path / "a.png", picture(9, 12))
  save(tmp_path / "b.png", picture(12, 9))
  with pytest.raises(ValueError, match=r"2 shapes.*\(9, 12\) and \(12, 9\)"):
    image_sets.load(tmp_path)
  assert image_sets.load(tmp_path, size=8).shape == (2, 8, 8, 3)


def test_archive(tmp_path):
  images = np.stack([picture(seed=seed) for seed in range(5)])
  path = tmp_path / "a.npz"
  np.savez(path, images=images, test_x=images[:2, ..., :1], names=["a"])
  np.testing.assert_array_equal(image_sets.load(path), images)
  got = image_sets.load(path, num_images=3)
  np.testing.assert_array_equal(got, images[[0, 1, 3]])
  grey = image_sets.load(path, split="test")
  np.testing.assert_array_equal(grey, np.repeat(images[:2, ..., :1], 3, -1))


@pytest.mark.parametrize(
  ("arrays", "message"),
  [
    ({"x": picture()}, "key must be one of 'x', got 'images'"),
    ({"images": picture()}, r"images must be uint8 \[n.*uint8 \[9, 12, 3\]"),
    ({"images": picture()[None] / 255}, "images must be uint8.*float64"),
    ({"images": picture()[None, ..., :2]}, "channels must be one of 1, 3"),
    ({"images": picture()[None][:0]}, r"images must be uint8.*\[0, 9"),
    ({"images": np.array([{}])}, "allow_pickle=False"),
  ],
)
def test_archives_are_checked(arrays, message, tmp_path):
  np.savez(tmp_path / "a.npz", **arrays)
  with pytest.raises(ValueError, match=f"a.npz holds no images: .*{message}"):
    image_sets.load(tmp_path / "a.npz")


def test_damaged_and_missing_files(tmp_path):
  with pytest.raises(FileNotFoundError, match="no images at"):
    image_sets.load(tmp_path / "nothing")
  with pytest.raises(ValueError, match="no .png or .jpg image in"):
    image_sets.load(tmp_path)
  np.savez(tmp_path / "a.npz", images=picture()[None])
  whole = (tmp_path / "a.npz").read_bytes()
  (tmp_path / "a.npz").write_bytes(whole[: len(whole) // 2])
  with pytest.raises(ValueError, match="a.npz holds no images"):
    image_sets.load(tmp_path / "a.npz")
  save(tmp_path / "b.png", picture())
  whole = (tmp_path / "b.png").read_bytes()
  (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])
  with pytest.raises(ValueError, match="b.png is not a whole image"):
    image_sets.load(tmp_path)
  with pytest.raises(ValueError, match="num_images must lie in 1..1, got 2"):
    image_sets.load(tmp_path, num_images=2)


class Pictures(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A set as TFDS prepares one; images are files, which needs no TensorFlow."""

  VERSION = tfds.core.Version("1.0.0")
  url_infos = None
  name = "pictures"

  def _info(self):
    features = {"image": tfds.features.Image(), "label": np.int32}
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(features),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    for row in range(3):
      file = io.BytesIO()
      PIL.Image.fromarray(picture(9 + row, seed=row)).save(file, "png")
      file.seek(0)
      yield row, {"image": file, "label": row}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tfds")
  builder = Pictures(data_dir=folder)
  builder.download_and_prepare(file_format="array_record")
  return folder


def test_tfds(prepared):
  opened = image_sets.open_images(
    "tfds:pictures", split="train", data_dir=prepared
  )
  for row in range(3):
    np.testing.assert_array_equal(opened[row], picture(9 + row, seed=row))
  for name in ("tfds:pictures/1.0.0", "tfds:pictures:1.0.0"):
    got = image_sets.load(name, 4, split="train", data_dir=prepared)
    assert got.shape == (3, 4, 4, 3)


def test_batches_of_what_is_read_when_asked_for(prepared):
  opened = image_sets.open_images(
    "tfds:pictures", split="train", data_dir=prepared
  )
  batches = image_batches.build(
    ImageSet(opened), batch_size=2, seed=0, crop=RandomResizedCrop(4)
  )
  assert batches[5].keys() == {"images"}
  assert batches[5]["images"].shape == (2, 4, 4, 3)


def test_tfds_that_is_not_there(prepared, tmp_path):
  with pytest.raises(FileNotFoundError, match="`tfds build mnist --file_for"):
    image_sets.load("tfds:mnist", split="train", data_dir=prepared)
  with pytest.raises(ValueError, match="split must be one of 'train', got Non"):
    image_sets.load("tfds:pictures", data_dir=prepared)
  for version in ("1.0.0", "1.1.0"):
    (tmp_path / "two" / version).mkdir(parents=True)
    (tmp_path / "two" / version / "dataset_info.json").write_text("{}")
  with pytest.raises(ValueError, match=r"holds \['1.0.0', '1.1.0'\]: name one"):
    image_sets.load("tfds:two", split="train", data_dir=tmp_path)


def test_tfds_of_another_format(prepared, tmp_path):
  source = prepared / "pictures" / "1.0.0"
  target = tmp_path / "pictures" / "1.0.0"
  target.mkdir(parents=True)
  for path in source.iterdir():
    name = path.name.replace("array_record", "tfrecord")
    (target / name).write_bytes(path.read_bytes())
  info = json.loads((target / "dataset_info.json").read_text())
  info["fileFormat"] = "tfrecord"
  (target / "dataset_info.json").write_text(json.dumps(info))
  with pytest.raises(ValueError, match="is not ArrayRecord"):
    image_sets.load("tfds:pictures", split="train", data_dir=tmp_path)


def test_real_photographs(shared_data):
  folder = shared_data / "images-imagenet-samples"
  small = image_sets.load(folder / "images64.npz", num_images=5)
  assert small.shape == (5, 64, 64, 3)
  large = image_sets.load(folder, size=64, num_images=5, resample="lanczos")
  # The same five; the archive was made of the photographs before JPEG.
  assert np.abs(small.astype(int) - large).mean() < 3
  kodak = image_sets.load(shared_data / "images-kodak", 32, num_images=2)
  assert kodak.shape == (2, 32, 32, 3)

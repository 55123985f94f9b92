"""Images as the published processors prepare them."""

import dataclasses
import json
import pathlib

import numpy as np
import PIL.Image
import pytest

from tokjax.models import images

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
NAMES = ("clip", "siglip", "dinov2", "deit", "vit")
SIZES = {"clip": 24, "siglip": 18, "dinov2": 24, "deit": 24, "vit": 18}


def picture(height=30, width=44):
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (height, width, 3)).astype(np.uint8)


# Pillow's own resampling rounds to 8 bits as the processors' does, so what is
# left is float32: 1e-6 of values of size 2.
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_stored_processors(name):
  stored = np.load(GOLDEN / "image_processors.npz")
  config = json.loads(str(stored[f"{name}_json"]))
  preparation = images.preparation_from_json(config)
  for way, image in (
    ("wide", stored["image"]),
    ("high", stored["image"].transpose(1, 0, 2)),
  ):
    (got,) = images.prepare([image], preparation)
    np.testing.assert_allclose(got, stored[f"{name}_{way}"], atol=2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_named_preparations_are_those_of_the_processors(name):
  stored = np.load(GOLDEN / "image_processors.npz")
  config = json.loads(str(stored[f"{name}_json"]))
  small = images.preparation_from_json(config)
  ours = images.PREPARATIONS[name]
  if name in ("dinov2", "deit"):  # used with other numbers than the default
    small = dataclasses.replace(small, mean=ours.mean, std=ours.std)
  crop = None if ours.crop is None else 20
  want = dataclasses.replace(ours, size=SIZES[name], crop=crop)
  assert small == want


def test_crop_takes_the_centre():
  image = picture(8, 8)
  plain = images.Preparation(
    size=8, crop=4, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
  )
  (got,) = images.prepare([image], plain)
  np.testing.assert_allclose(got, image[2:6, 2:6] / 255, atol=1e-6)


def test_images_of_several_sizes_make_one_batch():
  batch = [picture(30, 44), picture(51, 26), picture(24, 24)]
  preparation = images.Preparation(size=24, crop=20)
  got = images.prepare(batch, preparation)
  assert got.shape == (3, 20, 20, 3) and got.dtype == np.float32
  for image, row in zip(batch, got, strict=True):
    np.testing.assert_array_equal(images.prepare([image], preparation)[0], row)


def test_normalize_is_the_formula():
  image = picture(3, 2)
  preparation = images.PREPARATIONS["clip"]
  want = (image / 255 - preparation.mean) / preparation.std
  got = images.normalize(image, preparation)
  np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK"])
def test_read_gives_rgb(mode, tmp_path):
  source = PIL.Image.fromarray(picture()).convert(mode)
  path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
  source.save(path)
  got = images.read(path)
  assert got.shape == (30, 44, 3) and got.dtype == np.uint8
  np.testing.assert_array_equal(got, np.asarray(source.convert("RGB")))


def test_damaged_files_are_named(tmp_path):
  path = tmp_path / "cut.png"
  PIL.Image.fromarray(picture()).save(path)
  path.write_bytes(path.read_bytes()[:200])
  with pytest.raises(ValueError, match="cut.png is not a whole image"):
    images.read(path)
  path.write_text("no image at all")
  with pytest.raises(ValueError, match="cut.png is not a whole image"):
    images.read(path)
  with pytest.raises(FileNotFoundError):
    images.read(tmp_path / "nowhere.png")


@pytest.mark.unchecked
@pytest.mark.parametrize(
  ("batch", "changes", "message"),
  [
    ([], {}, "at least one image"),
    ([np.zeros((9, 9, 3))], {}, r"uint8 \[height, width, 3\], got float64"),
    ([np.zeros((9, 9), np.uint8)], {}, r"got uint8 \[9, 9\]"),
    ([picture()], {"resample": "area"}, "resample must be one of 'bicubic'"),
    ([picture()], {"crop": 30}, "crop must lie in 1..24, got 30"),
    ([picture()], {"crop": None}, "must come out as squares"),
  ],
)
def test_errors_name_the_argument(batch, changes, message):
  preparation = images.Preparation(size=24, crop=20)
  with pytest.raises(ValueError, match=message):
    images.prepare(batch, dataclasses.replace(preparation, **changes))


def settings(**changes):
  return {
    "size": {"shortest_edge": 24},
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    **changes,
  }


@pytest.mark.parametrize(
  ("kind", "whole"),
  [("CLIPFeatureExtractor", False), ("ViTImageProcessor", True)],
)
def test_old_files_name_one_number(kind, whole):
  key = "image_processor_type" if "Image" in kind else "feature_extractor_type"
  got = images.preparation_from_json(settings(size=24, **{key: kind}))
  assert (got.size, got.whole, got.crop) == (24, whole, None)


@pytest.mark.unchecked
@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"do_rescale": False}, "do_rescale must be one of True"),
    ({"rescale_factor": 1.0}, "rescale_factor must be 1/255, got 1.0"),
    ({"resample": 5}, "resample must be one of"),
    ({"size": {"height": 3, "width": 4}}, "size must have equal sides"),
    ({"size": 24}, "size 24 needs image_processor_type"),
  ],
)
def test_steps_that_we_do_not_have(changes, message):
  with pytest.raises(ValueError, match=message):
    images.preparation_from_json(settings(**changes))


def test_real_photographs_come_out_in_range(shared_data):
  paths = sorted((shared_data / "images-imagenet-samples").glob("*.jpg"))[:3]
  batch = images.prepare(
    [images.read(path) for path in paths], images.PREPARATIONS["clip"]
  )
  assert batch.shape == (3, 224, 224, 3)
  assert -2 < batch.min() < batch.max() < 2.7 and 0.3 < batch.std() < 1.5


def test_images_of_a_folder_come_in_the_order_of_their_names(tmp_path):
  for name in ("b.JPG", "a.png", "c.jpeg", "notes.txt"):
    (tmp_path / name).touch()
  (tmp_path / "more").mkdir()
  names = [path.name for path in images.in_folder(tmp_path)]
  assert names == ["a.png", "b.JPG", "c.jpeg"]
  with pytest.raises(ValueError, match="no .png or .jpg image in"):
    images.in_folder(tmp_path / "more")

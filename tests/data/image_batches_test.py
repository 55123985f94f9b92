"""Images, with and without labels, and their augmented batches."""

import numpy as np
import pytest

from tokjax.data import image_batches
from tokjax.data.image_batches import ImageSet
from tokjax.data.image_crops import RandomResizedCrop


def images(count=10, side=6):
  rng = np.random.default_rng(0)
  x = rng.integers(1, 256, (count, side, side, 3)).astype(np.uint8)
  return ImageSet(x, np.arange(count) % 3, ("a", "b", "c"))


def which(data, image):
  """Rows of the set that an image equals."""
  return np.flatnonzero((data.images == image).all((1, 2, 3)))


def test_every_epoch_shows_each_image_once_with_its_label():
  data = images()
  batches = image_batches.build(data, batch_size=5, seed=1, num_epochs=3)
  assert len(batches) == 6
  orders = []
  for epoch in range(3):
    rows = []
    for step in (2 * epoch, 2 * epoch + 1):
      batch = batches[step]
      assert batch["labels"].dtype == np.int32
      for image, label in zip(batch["images"], batch["labels"], strict=True):
        (row,) = which(data, image)
        assert data.labels[row] == label
        rows.append(int(row))
    assert sorted(rows) == list(range(10))
    orders.append(tuple(rows))
  assert len(set(orders)) == 3


def test_same_seed_same_batches():
  def draw(seed):
    found = image_batches.build(
      images(), batch_size=4, seed=seed, shift=2, flip=True
    )
    return found[7]["images"]

  np.testing.assert_array_equal(draw(3), draw(3))
  assert (draw(3) != draw(4)).any()


def test_flips_mirror_about_half():
  data = images()
  batches = image_batches.build(data, batch_size=10, seed=0, flip=True)
  mirrored = 0
  for step in range(20):
    for image in batches[step]["images"]:
      plain, turned = which(data, image), which(data, image[:, ::-1])
      assert len(plain) + len(turned) == 1
      mirrored += len(turned)
  assert 70 < mirrored < 130


def test_shifts_move_by_every_offset_and_fill_with_black():
  data = images(count=1)
  batches = image_batches.build(data, batch_size=1, seed=0, shift=1)
  padded = np.pad(data.images[0], ((1, 1), (1, 1), (0, 0)))
  seen = set()
  for step in range(200):
    image = batches[step]["images"][0]
    matches = [
      (i, j)
      for i in range(3)
      for j in range(3)
      if (image == padded[i : i + 6, j : j + 6]).all()
    ]
    assert len(matches) == 1
    seen |= set(matches)
  assert len(seen) == 9


def test_images_without_labels():
  data = images()
  settings = {"batch_size": 4, "seed": 0, "shift": 1, "flip": True}
  want = image_batches.build(data, **settings)[3]
  bare = ImageSet(data.images)
  assert bare.num_images == 10 and bare.labels is None
  found = image_batches.build(bare, **settings)[3]
  assert found.keys() == {"images"}
  np.testing.assert_array_equal(found["images"], want["images"])


def test_crops_of_images_of_any_size():
  """Every batch holds crops of the images of its rows; seeds change them."""
  ragged = [np.full((5 + i, 9 - i, 3), i, np.uint8) for i in range(4)]
  ragged[3] = images(count=1, side=8).images[0]
  data = ImageSet(ragged, np.arange(4), ("a", "b", "c", "d"))
  crop = RandomResizedCrop(4)
  seen = []
  for seed in (0, 0, 1):
    batches = image_batches.build(data, batch_size=2, seed=seed, crop=crop)
    for step in range(6):
      batch = batches[step]
      assert batch["images"].shape == (2, 4, 4, 3)
      for image, label in zip(batch["images"], batch["labels"], strict=True):
        if label < 3:  # of one colour
          assert (image == label).all()
        else:
          seen.append(image)
  assert len(seen) == 9
  np.testing.assert_array_equal(seen[:3], seen[3:6])
  assert len({x.tobytes() for x in seen[3:]}) == 6


@pytest.mark.parametrize("crop", [None, RandomResizedCrop(4)])
def test_processes_share_one_batch(crop):
  settings = {"batch_size": 4, "seed": 2, "shift": 1, "flip": True}
  settings["crop"] = crop
  whole = image_batches.build(images(), **settings)
  parts = [
    image_batches.build(images(), process_index=i, process_count=2, **settings)
    for i in range(2)
  ]
  for step in range(5):
    for name in ("images", "labels"):
      both = np.concatenate([part[step][name] for part in parts])
      np.testing.assert_array_equal(both, whole[step][name])


@pytest.mark.unchecked
@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"images": np.zeros((2, 4, 4, 3))}, "images must be uint8, got float64"),
    ({"images": np.zeros((2, 4, 4), np.uint8)}, "images must have 4 axes"),
    ({"images": []}, "images must hold at least one image"),
    ({"labels": np.array([0])}, "images=2, labels=1"),
    ({"labels": np.array([0.0, 1.0])}, "labels must be integers"),
    ({"labels": np.array([0, 2])}, "largest_label must lie in 0..1, got 2"),
    ({"labels": np.array([-1, 0])}, "smallest_label must lie in 0..1"),
  ],
)
def test_sets_are_checked(changes, message):
  fields = {
    "images": np.zeros((2, 4, 4, 3), np.uint8),
    "labels": np.array([0, 1]),
    "classes": ("a", "b"),
  }
  assert ImageSet(**fields).num_images == 2
  with pytest.raises(ValueError, match=message):
    ImageSet(**{**fields, **changes})


@pytest.mark.unchecked
@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"batch_size": 11}, "batch_size must lie in 1..10"),
    ({"shift": 6}, "shift must lie in 0..5"),
    ({"process_count": 3}, "batch_size must be a multiple of 3"),
    ({"process_index": 1}, "process_index must lie in 0..0"),
    ({"num_epochs": 0}, "num_epochs must lie in 1"),
    ({"crop": RandomResizedCrop(4), "shift": 4}, "shift must lie in 0..3"),
  ],
)
def test_settings_are_checked(changes, message):
  settings = {"batch_size": 4, "seed": 0, **changes}
  with pytest.raises(ValueError, match=message):
    image_batches.build(images(), **settings)


def test_images_of_any_size_need_a_crop():
  data = ImageSet([np.zeros((4, 5, 3), np.uint8)])
  with pytest.raises(ValueError, match="crop must be set"):
    image_batches.build(data, batch_size=1, seed=0)

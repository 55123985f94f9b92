"""Crops: what is cut, by Pillow's own words; draws by their distribution."""

import grain
import numpy as np
import PIL.Image
import pytest

from tokjax.data.image_crops import RandomResizedCrop, centre_crop


def picture(height, width, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (height, width, 3)).astype(np.uint8)


def places(height, width):
  """An image whose pixels say where they are: row, column, 0."""
  rows, columns = np.indices((height, width))
  return np.stack([rows, columns, 0 * rows], axis=-1).astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), [(30, 41), (41, 30), (9, 25)])
def test_centre_crop(height, width):
  image = picture(height, width)
  shorter = min(height, width)
  new = height * 12 // shorter, width * 12 // shorter
  whole = PIL.Image.fromarray(image).resize(
    new[::-1], PIL.Image.Resampling.LANCZOS
  )
  left, top = (new[1] - 12) // 2, (new[0] - 12) // 2
  want = whole.crop((left, top, left + 12, top + 12))
  got = centre_crop(image, 12, resample="lanczos")
  np.testing.assert_array_equal(got, np.asarray(want))


def test_a_square_of_that_size_stays():
  image = picture(12, 12)
  np.testing.assert_array_equal(centre_crop(image, 12), image)
  wide = picture(12, 20)
  np.testing.assert_array_equal(centre_crop(wide, 12), wide[:, 4:16])


def test_whole_square_is_only_resized():
  crop = RandomResizedCrop(
    8, area=(1.0, 1.0), aspect=(1.0, 1.0), resample="box"
  )
  image = picture(16, 16)
  got = crop.random_map(image, np.random.default_rng(0))
  blocks = image.reshape(8, 2, 8, 2, 3).mean((1, 3))
  assert np.abs(got - blocks).max() <= 1  # Pillow rounds after each axis


def test_rectangles_lie_in_the_image_and_have_the_area_and_shape():
  """Corners of what was cut, from an image that shows its places."""
  height, width = 200, 160
  crop = RandomResizedCrop(
    64, area=(0.1, 0.5), aspect=(0.5, 2.0), resample="box"
  )
  areas, aspects, tops, ends = [], [], [], []
  for seed in range(400):
    rng = np.random.default_rng(seed)
    got = crop.random_map(places(height, width), rng).astype(int)
    assert got.shape == (64, 64, 3)
    # A box of a 64th of the side has its mean half such a box from the edge.
    high = (got[-1, 0, 0] - got[0, 0, 0]) * 64 / 63
    wide = (got[0, -1, 1] - got[0, 0, 1]) * 64 / 63
    areas.append(high * wide / (height * width))
    aspects.append(wide / high)
    tops.append(got[0, 0, 0] - high / 128)
    ends.append(height - got[-1, 0, 0] - high / 128)
  assert 0.08 < min(areas) < 0.13 and 0.4 < max(areas) < 0.53
  assert 0.46 < min(aspects) < 0.6 and 1.7 < max(aspects) < 2.15
  assert abs(np.mean(np.log(aspects))) < 0.1
  assert abs(np.mean(tops) - np.mean(ends)) < 10


def test_what_never_fits_is_cut_from_the_centre():
  crop = RandomResizedCrop(
    5, area=(1.0, 1.0), aspect=(1.0, 1.0), resample="box"
  )
  rng = np.random.default_rng(0)
  for image, cut in (
    (places(10, 40), places(10, 40)[:, 15:25]),
    (places(40, 10), places(40, 10)[15:25]),
  ):
    got = crop.random_map(image, rng)
    want = cut.reshape(5, 2, 5, 2, 3).mean((1, 3))
    assert np.abs(got - want).max() <= 1


def test_is_a_transformation_of_grain():
  images = [picture(20, 30, seed) for seed in range(4)]
  crop = RandomResizedCrop(8)

  def draw(seed):
    data = grain.MapDataset.source(images).seed(seed).random_map(crop)
    return np.stack([data[i] for i in (2, 0, 1)])

  np.testing.assert_array_equal(draw(1), draw(1))
  assert (draw(1) != draw(2)).any()


@pytest.mark.unchecked
def test_errors():
  with pytest.raises(ValueError, match="size must lie in 1"):
    RandomResizedCrop(0)
  with pytest.raises(ValueError, match="area_high must lie in 0..1, got 2"):
    RandomResizedCrop(4, area=(0.5, 2))
  with pytest.raises(ValueError, match="area must rise from above 0"):
    RandomResizedCrop(4, area=(0.5, 0.4))
  with pytest.raises(ValueError, match="aspect must rise from above 0"):
    RandomResizedCrop(4, aspect=(0, 1))
  with pytest.raises(ValueError, match="resample must be one of 'bicubic'"):
    centre_crop(picture(4, 4), 4, resample="nearest")
  with pytest.raises(ValueError, match="image must be uint8.*got float64"):
    centre_crop(picture(4, 4) / 255, 4)
  with pytest.raises(ValueError, match=r"image must be.*\[4, 4, 1\]"):
    RandomResizedCrop(4).random_map(picture(4, 4)[..., :1], None)

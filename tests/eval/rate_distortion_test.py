"""JPEG and WebP: sizes, quality and budgets on a real photograph."""

import io

import numpy as np
import PIL.Image
import pytest
import skimage.data
import skimage.metrics

from tokjax.eval import rate_distortion


@pytest.fixture(scope="module")
def images():
  """Two 48 x 40 parts of a photograph."""
  photo = skimage.data.astronaut()[::4, ::4]
  return np.stack([photo[:48, 20:60], photo[60:108, 40:80]])


def written(image, codec, **settings):
  file = io.BytesIO()
  PIL.Image.fromarray(image).save(file, codec, **settings)
  return len(file.getvalue()), np.asarray(PIL.Image.open(file))


# A table of the publications: tokens, codes, side, bytes, bits per pixel.
@pytest.mark.parametrize(
  ("num_tokens", "num_codes", "side", "num_bytes", "rate"),
  [
    (32, 4096, 256, 48, 0.00586),
    (128, 4096, 256, 192, 0.02344),
    (256, 16384, 256, 448, 0.05469),
    (680, 4096, 256, 1020, 0.12451),
    (32, 8192, 224, 52, 0.00829),
    (128, 8192, 256, 208, 0.02539),
  ],
)
def test_rate_of_tokens(num_tokens, num_codes, side, num_bytes, rate):
  got = rate_distortion.bits_per_pixel(num_tokens, num_codes, side, side)
  assert got == pytest.approx(rate, abs=5e-6)
  assert rate_distortion.token_bytes(num_tokens, num_codes) == num_bytes


def test_tokens_are_packed_bit_to_bit():
  assert rate_distortion.token_bytes(3, 1000) == 4  # 29.9 bits
  assert rate_distortion.bits_per_pixel(2.5, 4, 1, 10) == 0.5


def test_jpeg_is_the_smallest_of_its_ways(images):
  found = rate_distortion.code(images[0], "jpeg", 30)
  pixel = np.full((1, 1, 3), 128, np.uint8)
  files, payloads = [], []
  for way in ({}, {"optimize": True}, {"optimize": True, "progressive": True}):
    size, image = written(images[0], "jpeg", quality=30, **way)
    np.testing.assert_array_equal(found.image, image)  # the same coefficients
    files.append(size)
    payloads.append(size - written(pixel, "jpeg", quality=30, **way)[0])
  assert len(set(files)) == 3 and len(set(payloads)) == 3
  assert found.file_bytes == min(files)
  assert found.payload_bytes == min(payloads)
  assert found.file_bytes - found.payload_bytes > 250


def test_webp(images):
  found = rate_distortion.code(images[0], "webp", 30)
  size, image = written(images[0], "webp", quality=30, method=6)
  assert found.file_bytes == size
  assert 30 <= size - found.payload_bytes <= 50
  np.testing.assert_array_equal(found.image, image)


@pytest.mark.parametrize("codec", ["jpeg", "webp"])
def test_curve(images, codec):
  low, high = rate_distortion.rate_distortion(images, codec, (10, 80))
  for point, quality in ((low, 10), (high, 80)):
    coded = [rate_distortion.code(image, codec, quality) for image in images]
    assert point[:2] == (codec, quality)
    assert point.file_bytes == np.mean([one.file_bytes for one in coded])
    assert point.payload_bytes == np.mean([one.payload_bytes for one in coded])
    assert point.bits_per_pixel == 8 * point.file_bytes / (48 * 40)
    assert point.payload_bits_per_pixel == 8 * point.payload_bytes / (48 * 40)
    want = np.mean(
      [
        skimage.metrics.peak_signal_noise_ratio(image, one.image)
        for image, one in zip(images, coded, strict=True)
      ]
    )
    assert point.psnr == pytest.approx(want, rel=1e-5)
  assert low.file_bytes < high.file_bytes
  assert low.psnr + 3 < high.psnr and low.ssim < high.ssim < 1


@pytest.mark.parametrize("count_header", [False, True])
def test_budget_is_used_up(images, count_header):
  field = "file_bytes" if count_header else "payload_bytes"
  qualities = range(0, 101, 5)
  sizes = np.array(
    [
      [
        getattr(rate_distortion.code(image, "webp", quality), field)
        for quality in qualities
      ]
      for image in images
    ]
  )
  budget = int(np.sort(sizes[0])[8])
  found = rate_distortion.at_budget(
    images,
    "webp",
    budget,
    count_header=count_header,
    qualities=qualities,
  )
  for row in range(2):
    best = max(q for q in qualities if sizes[row][q // 5] <= budget)
    assert found.quality[row] == best
    assert found.num_bytes[row] == sizes[row][best // 5] <= budget
    image = rate_distortion.code(images[row], "webp", best).image
    want = skimage.metrics.peak_signal_noise_ratio(images[row], image)
    assert found.psnr[row] == pytest.approx(want, rel=1e-5)


def test_what_does_not_fit_has_no_quality(images):
  """A file of JPEG starts with 280 bytes of tables."""
  found = rate_distortion.at_budget(images, "jpeg", 250, qualities=(0, 50))
  assert found.quality.tolist() == [-1, -1]
  assert found.num_bytes.tolist() == [0, 0]
  assert np.isnan(found.psnr).all() and np.isnan(found.ssim).all()
  found = rate_distortion.at_budget(
    images, "jpeg", 250, count_header=False, qualities=(0, 50)
  )
  assert (found.quality >= 0).all() and np.isfinite(found.psnr).all()


@pytest.mark.unchecked
def test_errors(images):
  with pytest.raises(ValueError, match="codec must be one of 'jpeg', 'webp'"):
    rate_distortion.code(images[0], "gif", 10)
  with pytest.raises(ValueError, match="quality must lie in 0..100, got 101"):
    rate_distortion.code(images[0], "jpeg", 101)
  with pytest.raises(ValueError, match="image must be uint8.*got float64"):
    rate_distortion.code(images[0] / 255, "jpeg", 10)
  with pytest.raises(ValueError, match=r"images must be uint8 \[n, height"):
    rate_distortion.rate_distortion(images[0], "jpeg", (10,))
  with pytest.raises(ValueError, match="num_bytes must lie in 1"):
    rate_distortion.at_budget(images, "jpeg", 0)
  with pytest.raises(ValueError, match="num_codes must lie in 1"):
    rate_distortion.bits_per_pixel(1, 0, 4, 4)

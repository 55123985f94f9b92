"""PSNR, SSIM and MS-SSIM against scikit-image and sums by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import skimage.metrics

from tests.compiled import compiled
from tokjax.eval import image_quality

image_quality = compiled(image_quality, leave=("smallest_side",))


def pair(seed=0, batch=3, height=26, width=24, noise=0.1):
  """Smooth images with noisy copies, float64 in 0..1."""
  rng = np.random.default_rng(seed)
  images = rng.random((batch, height, width, 3))
  images = scipy.ndimage.gaussian_filter(images, (0, 2, 2, 0))
  images = (images - images.min()) / np.ptp(images)
  noisy = images + noise * rng.normal(size=images.shape)
  return images, np.clip(noisy, 0, 1)


def call(metric, images, others, **settings):
  low = np.float32(images), np.float32(others)
  return np.asarray(getattr(image_quality, metric)(*low, **settings))


def skimage_ssim(one, two):
  return skimage.metrics.structural_similarity(
    one,
    two,
    data_range=1.0,
    channel_axis=-1,
    gaussian_weights=True,
    sigma=1.5,
    use_sample_covariance=False,
  )


def test_psnr_is_that_of_scikit_image():
  images, noisy = pair()
  want = [
    skimage.metrics.peak_signal_noise_ratio(one, two, data_range=1.0)
    for one, two in zip(images, noisy, strict=True)
  ]
  np.testing.assert_allclose(call("psnr", images, noisy), want, rtol=1e-5)


def test_ssim_is_that_of_scikit_image():
  images, noisy = pair()
  want = [skimage_ssim(*both) for both in zip(images, noisy, strict=True)]
  assert 0.1 < min(want) < max(want) < 0.95
  np.testing.assert_allclose(call("ssim", images, noisy), want, atol=1e-5)


def test_worked_examples():
  """Flat images have no structure: only the luminance counts."""
  dark, light = np.full((1, 24, 24, 1), 0.25), np.full((1, 24, 24, 1), 0.75)
  assert call("psnr", dark, dark + 0.1)[0] == pytest.approx(20, abs=1e-4)
  luminance = (2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4)
  got = call("ssim", dark, light)[0]
  assert got == pytest.approx(luminance, abs=1e-5)
  got = call("ms_ssim", dark, light, num_scales=2)[0]
  weight = 0.2856 / (0.0448 + 0.2856)
  assert got == pytest.approx(luminance**weight, abs=1e-5)
  # Black pixels with white ones in their places: the smallest SSIM there is.
  rng = np.random.default_rng(0)
  board = (rng.random((1, 24, 24, 1)) > 0.5).astype(float)
  assert call("ssim", board, 1 - board)[0] < -0.9
  assert call("ms_ssim", board, 1 - board, num_scales=2)[0] == 0


def by_hand_ms_ssim(one, two, weights):
  """One channel of one image; filters of SciPy, scales by loops."""
  product = 1.0
  for scale, weight in enumerate(weights):
    distance = np.arange(11) - 5
    window = np.exp(-(distance**2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2

    def windowed(x, window=window):
      return scipy.ndimage.correlate(x, window)[5:-5, 5:-5]

    mean_one, mean_two = windowed(one), windowed(two)
    both = windowed(one * two) - mean_one * mean_two
    variances = windowed(one**2) - mean_one**2 + windowed(two**2) - mean_two**2
    factor = (2 * both + 0.03**2) / (variances + 0.03**2)
    if scale == len(weights) - 1:
      factor = factor * (
        (2 * mean_one * mean_two + 0.01**2)
        / (mean_one**2 + mean_two**2 + 0.01**2)
      )
    product *= max(factor.mean(), 0.0) ** weight
    one, two = halved(one), halved(two)
  return product


def halved(x):
  x = np.pad(x, [(0, size % 2) for size in x.shape], mode="edge")
  rows, columns = x.shape
  return x.reshape(rows // 2, 2, columns // 2, 2).mean((1, 3))


# The second has odd sizes at two of its scales.
@pytest.mark.parametrize(
  ("height", "width", "num_scales"), [(161, 164, 5), (43, 45, 3)]
)
def test_ms_ssim_is_that_of_loops(height, width, num_scales):
  images, noisy = pair(batch=2, height=height, width=width, noise=0.2)
  weights = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333][:num_scales])
  want = [
    np.mean(
      [
        by_hand_ms_ssim(one[..., c], two[..., c], weights / weights.sum())
        for c in range(3)
      ]
    )
    for one, two in zip(images, noisy, strict=True)
  ]
  assert 0.2 < min(want) < max(want) < 0.99
  got = call("ms_ssim", images, noisy, num_scales=num_scales)
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_equal_images():
  images = np.float32(pair()[0])
  for metric in ("ssim", "ms_ssim"):
    settings = {"num_scales": 2} if metric == "ms_ssim" else {}
    got = call(metric, images, images, **settings)
    np.testing.assert_allclose(got, 1, atol=1e-6)
  assert (call("psnr", images, images) == np.inf).all()


def test_images_do_not_mix():
  """One by one as in a batch, whatever the others hold."""
  images, noisy = pair()
  alone = call("ssim", images[1:2], noisy[1:2])
  noisy[0] = np.nan
  together = call("ssim", images, noisy)
  np.testing.assert_allclose(together[1:2], alone, atol=1e-6)
  assert np.isnan(together[0])


def test_gradients():
  images, noisy = (jnp.float32(x) for x in pair(batch=2))

  def total(function, **settings):
    return lambda x, y: jnp.sum(function(x, y, **settings))

  # With an image that equals the other and with one that is its inverse,
  # where PSNR is infinite and a factor of MS-SSIM is negative.
  board = jnp.round(noisy[:1])
  hard = jnp.concatenate([images[:1], board])
  others = jnp.concatenate([images[:1], 1 - board])
  for function in (
    total(image_quality.psnr),
    total(image_quality.ssim),
    total(image_quality.ms_ssim, num_scales=2),
  ):
    both = jax.jit(jax.grad(function, (0, 1)))
    for gradient in both(images, noisy):
      assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0
    for gradient in both(hard, others):
      assert np.isfinite(gradient).all()
  direction = jax.random.normal(jax.random.key(0), noisy.shape)
  ssim = jax.jit(total(image_quality.ssim))
  slope = jnp.vdot(jax.jit(jax.grad(ssim, 1))(images, noisy), direction)
  step = 1e-3
  moved = [ssim(images, noisy + s * direction) for s in (step, -step)]
  assert float(moved[0] - moved[1]) / (2 * step) == pytest.approx(
    float(slope), rel=1e-2
  )


@pytest.mark.unchecked
@pytest.mark.parametrize(
  ("metric", "shapes", "settings", "message"),
  [
    ("psnr", [(2, 4, 4, 3), (2, 4, 4, 1)], {}, "reconstructions must have"),
    ("ssim", [(4, 4, 3), (4, 4, 3)], {}, "images must have 4 axes"),
    ("ssim", [(1, 16, 10, 3)] * 2, {}, "at least 11 pixels.*got 16 x 10"),
    ("ms_ssim", [(1, 160, 200, 3)] * 2, {}, "at least 161 pixels a side for 5"),
    ("ms_ssim", [(1, 20, 20, 3)] * 2, {"num_scales": 2}, "at least 21 pixels"),
    ("ms_ssim", [(1, 20, 20, 3)] * 2, {"num_scales": 6}, "num_scales must lie"),
  ],
)
def test_errors(metric, shapes, settings, message):
  arrays = [np.zeros(shape, np.float32) for shape in shapes]
  with pytest.raises(ValueError, match=message):
    getattr(image_quality, metric)(*arrays, **settings)


def test_smallest_sides():
  sides = [image_quality.smallest_side(num_scales=n) for n in range(1, 6)]
  assert sides == [11, 21, 41, 81, 161]

"""The report of a set: each number where it belongs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage.metrics

from tokjax.eval import frechet, reconstruction
from tokjax.eval.lpips import LpipsWeights


def pair(num=5, height=24, width=22):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (num, height, width, 3))
  others = np.clip(images + rng.integers(-40, 41, images.shape), 0, 255)
  return images.astype(np.uint8), others.astype(np.uint8)


def test_mean_over_images():
  """Batches of 2 and a last one of 1 weigh every image alike."""
  images, others = pair()
  others[0] = images[0] ^ 1  # one image is far better than the rest
  found = reconstruction.report(images, others, batch_size=2)
  rows = list(zip(images, others, strict=True))
  psnr = [skimage.metrics.peak_signal_noise_ratio(*row) for row in rows]
  ssim = [
    skimage.metrics.structural_similarity(
      *row,
      channel_axis=-1,
      gaussian_weights=True,
      sigma=1.5,
      use_sample_covariance=False,
    )
    for row in rows
  ]
  assert found[:3] == (5, 24, 22)
  assert found.psnr == pytest.approx(np.mean(psnr), rel=1e-5)
  assert found.ssim == pytest.approx(np.mean(ssim), abs=1e-5)
  assert all(x is None for x in found[5:])


def test_codes():
  """Histogram 4, 2, 1, 1 of 8 codes; 8 tokens in 2 images of 24 x 22."""
  images, others = pair(num=2)
  indices = np.array([[0, 0, 1, 5, 0], [7, 0, 1, -1, -1]])
  found = reconstruction.report(images, others, indices=indices, num_codes=8)
  assert found.num_tokens == 4
  assert found.bits_per_pixel == pytest.approx(4 * 3 / (24 * 22))
  assert found.usage == 0.5
  assert found.perplexity == pytest.approx(3.3636, abs=1e-4)


def test_features_and_weights(monkeypatch):
  images, others = pair(num=4, height=161, width=161)
  sizes = [(11, 3, 2), (5, 2, 2), (3, 2, 2), (3, 2, 2), (3, 2, 2)]
  weights = LpipsWeights(
    tuple(jnp.ones((size, size, i, o)) for size, i, o in sizes),
    tuple(jnp.zeros(o) for _, _, o in sizes),
    tuple(jnp.ones(o) for _, _, o in sizes),
    "alexnet",
  )

  def mean(x):
    return x.mean((1, 2))

  monkeypatch.setattr(frechet, "_POOL3", 3)
  found = reconstruction.report(
    images,
    others,
    lpips_weights=weights,
    inception_pool3=mean,
    features={"mean colour": mean},
  )
  want = frechet.frechet_distance(mean(others), mean(images))
  assert found.frechet == ("mean colour", pytest.approx(want, rel=1e-6), 4, 4)
  assert found.fid == pytest.approx(want, rel=1e-6)
  assert found.lpips_backbone == "alexnet" and 0 < found.lpips < 1
  assert 0 < found.ms_ssim < 1
  small = reconstruction.report(images[:, :160], others[:, :160])
  assert small.ms_ssim is None


def test_to_bytes():
  to_bytes = jax.jit(reconstruction.to_bytes)
  got = to_bytes(jnp.array([[[-1, 0, 0.5 / 255], [0.6 / 255, 1, 2.0]]]))
  assert got.dtype == jnp.uint8
  assert got.tolist() == [[[0, 0, 0], [1, 255, 255]]]
  every = np.arange(256, dtype=np.uint8).reshape(1, 1, 256, 1)
  np.testing.assert_array_equal(to_bytes(every.astype(np.float32) / 255), every)
  wide = np.float32(every) / 127.5 - 1
  got = reconstruction.to_bytes(jnp.asarray(wide), low=-1.0)
  np.testing.assert_array_equal(got, every)
  assert to_bytes(jnp.full((1, 1, 1), jnp.nan)).item() == 0


@pytest.mark.unchecked
def test_errors():
  images, others = pair()
  report = reconstruction.report
  with pytest.raises(ValueError, match="reconstructions must be uint8.*float"):
    report(images, others / 255)
  with pytest.raises(ValueError, match="reconstructions must have the shape"):
    report(images, others[:4])
  with pytest.raises(ValueError, match="num_images must lie in 1"):
    report(images[:0], others[:0])
  with pytest.raises(ValueError, match="indices and num_codes must come"):
    report(images, others, num_codes=4)
  with pytest.raises(ValueError, match="images=5, indices=4"):
    report(images, others, indices=np.zeros((4, 2), int), num_codes=4)
  with pytest.raises(ValueError, match="at least 11 pixels"):
    report(images[:, :8], others[:, :8])
  with pytest.raises(ValueError, match="num_features must lie in 1..1"):
    report(images, others, features={})
  with pytest.raises(ValueError, match="low must be below high"):
    reconstruction.to_bytes(jnp.zeros((1, 1, 1)), low=1.0)

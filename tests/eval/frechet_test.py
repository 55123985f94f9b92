"""Frechet distance: worked examples, another root, streaming."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from tokjax.eval import batching, frechet


def vectors(seed, num, width=6):
  rng = np.random.default_rng(seed)
  mixing = rng.normal(size=(width, width))
  return rng.normal(size=(num, width)) @ mixing + rng.normal(size=width)


def pictures(seed=0, num=7):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (num, 4, 4, 3)).astype(np.uint8)


@jax.jit
def colours(images):
  """Mean and spread of the channels, a stand-in for a network."""
  x = images.astype(jnp.float32) / 255
  return jnp.concatenate([x.mean((1, 2)), x.std((1, 2))], axis=1)


def test_worked_example():
  """Means 1 apart, variances 1 and 4: 1 + 1 + 4 - 2 * 2."""
  one = np.array([[-1.0], [1.0]]) / np.sqrt(2)
  assert frechet.frechet_distance(one, 1 + 2 * one) == pytest.approx(2)
  # Variances that commute: (1 - 3)^2 + (2 - 1)^2.
  a = frechet.FeatureStatistics(np.zeros(2), np.diag([1.0, 4.0]), 9)
  b = frechet.FeatureStatistics(np.zeros(2), np.diag([9.0, 1.0]), 9)
  assert frechet.frechet_distance(a, b) == pytest.approx(4 + 1)


@pytest.mark.parametrize("num", [40, 4])  # 4: covariances without full rank
def test_equals_the_root_of_the_product(num):
  a, b = vectors(0, num), vectors(1, num + 1)
  root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
  want = (
    np.square(a.mean(0) - b.mean(0)).sum()
    + np.trace(np.cov(a.T))
    + np.trace(np.cov(b.T))
    - 2 * np.trace(root)
  )
  got = frechet.frechet_distance(a, b)
  assert got == pytest.approx(want, rel=1e-5)
  # Eigenvalues that are 0 but for rounding, 1e-16, have roots of 1e-8.
  assert frechet.frechet_distance(b, a) == pytest.approx(got, rel=1e-7)
  assert frechet.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
  turn = np.linalg.qr(vectors(2, 6))[0]
  turned = frechet.frechet_distance(a @ turn, b @ turn)
  assert turned == pytest.approx(got, rel=1e-7)


def test_streaming_equals_all_at_once():
  images = pictures()
  want = np.asarray(colours(images), np.float64)
  for batch_size in (3, 50):
    found = frechet.collect(images, colours, batch_size=batch_size)
    assert found.num == 7
    np.testing.assert_allclose(found.mean, want.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.covariance, np.cov(want.T), atol=1e-9)


@pytest.mark.unchecked
def test_far_from_zero_nothing_cancels():
  far = 1e6 + vectors(0, 30, width=2)
  found = frechet.collect(far, lambda x: x, batch_size=4)
  np.testing.assert_allclose(found.covariance, np.cov(far.T), rtol=1e-6)


def test_the_stand_in_bears_its_name():
  images, others = pictures(), pictures(1, num=5)
  found = frechet.feature_frechet(
    images, others, colours, features="colours", batch_size=4
  )
  want = frechet.frechet_distance(
    np.asarray(colours(images)), np.asarray(colours(others))
  )
  assert found[2:] == (7, 5) and found.features == "colours"
  assert found.distance == pytest.approx(want, rel=1e-4)
  with pytest.raises(ValueError, match="features must name"):
    frechet.feature_frechet(images, others, colours, features=" ")


def test_fid_wants_what_is_as_wide_as_inception(monkeypatch):
  images, others = pictures(), pictures(1, num=5)
  with pytest.raises(ValueError, match="inception_pool3_width .* got 6"):
    frechet.fid(images, others, colours)
  monkeypatch.setattr(frechet, "_POOL3", 6)  # 2048 take half a minute
  reference = frechet.collect(others, colours, batch_size=2)
  # The trace of the root by singular values of the centred rows.
  rows = [np.asarray(colours(x), np.float64) for x in (images, others)]
  scaled = [(x - x.mean(0)) / np.sqrt(len(x) - 1) for x in rows]
  overlap = np.linalg.norm(scaled[0] @ scaled[1].T, ord="nuc")
  spread = sum(np.square(x).sum() for x in scaled) - 2 * overlap
  want = np.square(rows[0].mean(0) - rows[1].mean(0)).sum() + spread
  for kind in (others, reference):
    got = frechet.fid(images, kind, colours, batch_size=3)
    assert got == pytest.approx(want, rel=1e-6)


def test_published_statistics(tmp_path):
  found = frechet.collect(pictures(), colours, batch_size=4)
  np.savez(tmp_path / "a.npz", mu=found.mean, sigma=found.covariance)
  read = frechet.read_statistics(tmp_path / "a.npz")
  assert read.num == 0
  assert frechet.frechet_distance(read, found) == pytest.approx(0, abs=1e-9)
  np.savez(tmp_path / "b.npz", mu=found.mean)
  with pytest.raises(ValueError, match=r"b\.npz is no \.npz with mu and sigma"):
    frechet.read_statistics(tmp_path / "b.npz")
  np.savez(tmp_path / "c.npz", mu=found.mean, sigma=found.covariance[:2])
  with pytest.raises(ValueError, match=r"covariance \[6, 6\], got \[2, 6\]"):
    frechet.read_statistics(tmp_path / "c.npz")
  with pytest.raises(FileNotFoundError):
    frechet.read_statistics(tmp_path / "d.npz")


@pytest.mark.unchecked
def test_errors():
  a = vectors(0, 5)
  with pytest.raises(
    ValueError, match="features_a_width=6, features_b_width=2"
  ):
    frechet.frechet_distance(a, a[:, :2])
  with pytest.raises(ValueError, match="features_b_rows must lie in 2"):
    frechet.frechet_distance(a, a[:1])
  with pytest.raises(ValueError, match="features_a must be finite"):
    frechet.frechet_distance(a * np.nan, a)
  with pytest.raises(ValueError, match="num_images must lie in 2"):
    frechet.collect(pictures(num=1), colours, batch_size=4)


def test_batches_have_one_size():
  seen = []

  def function(x, y):
    seen.append(x.tolist())
    return x + y

  x = np.arange(5)
  parts = list(batching.in_batches(function, x, 10 * x, batch_size=2))
  assert [part.tolist() for part in parts] == [[0, 11], [22, 33], [44]]
  assert seen == [[0, 1], [2, 3], [4, 4]]
  with pytest.raises(ValueError, match="function must return 2 rows"):
    list(batching.in_batches(np.sum, x, batch_size=2))
  with pytest.raises(ValueError, match="array_0=5, array_1=4"):
    list(batching.in_batches(function, x, x[:4], batch_size=2))
  with pytest.raises(ValueError, match="size must lie in 1"):
    list(batching.in_batches(np.sqrt, x[:0], batch_size=2))

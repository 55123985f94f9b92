"""Matrices that put maps on other grids."""

import numpy as np
import pytest

from tests.compiled import run
from tokjax.ops import resample


def test_area_means_over_the_published_bins():
  bins = {
    (16, 3): [(0, 6), (5, 11), (10, 16)],
    (16, 5): [(0, 4), (3, 7), (6, 10), (9, 13), (12, 16)],
    (2, 3): [(0, 1), (0, 2), (1, 2)],
  }
  for (inputs, outputs), ranges in bins.items():
    want = np.zeros((outputs, inputs))
    for row, (first, end) in zip(want, ranges, strict=True):
      row[first:end] = 1 / (end - first)
    got = resample.area_matrix(inputs, outputs)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_cubic_has_the_kernel_of_torch_and_clamps():
  got = resample.cubic_matrix(2, 4) @ np.array([0.0, 1.0])
  want = [-0.10547, 0.22656, 0.77344, 1.10547]
  np.testing.assert_allclose(got, want, atol=1e-5)
  for n, m in [(1, 4), (3, 8), (8, 3)]:
    total = resample.cubic_matrix(n, m).sum(axis=1)
    np.testing.assert_allclose(total, 1, rtol=1e-6)


def test_matrices_to_the_same_size_are_the_identity():
  for make in ("area_matrix", "cubic_matrix", "linear_matrix"):
    np.testing.assert_array_equal(getattr(resample, make)(5, 5), np.eye(5))


def test_resample_is_rows_then_columns():
  x = np.random.default_rng(0).normal(size=(2, 4, 3, 5)).astype(np.float32)
  rows, columns = resample.area_matrix(4, 2), resample.cubic_matrix(3, 6)
  got = run(resample.resample, x, rows, columns)
  want = np.einsum("ph,qw,bhwc->bpqc", rows, columns, x)
  np.testing.assert_allclose(got, want, atol=1e-6)
  with pytest.raises(ValueError, match="rows=4, height=3"):
    resample.resample(x.swapaxes(1, 2), rows, columns)


def test_pyramids_nest_and_keep_constants():
  x = np.random.default_rng(1).normal(size=(1, 64, 2)).astype(np.float32)
  fine = run(resample.pyramid, x, (4, 8))
  np.testing.assert_array_equal(fine[:, 16:], x)
  again = run(resample.pyramid, np.asarray(fine[:, :16]), (2,))
  once = run(resample.pyramid, x, (2,))
  np.testing.assert_allclose(again, once, atol=1e-6)
  same = run(resample.pyramid, np.ones((1, 64, 2), np.float32), (1, 3, 5))
  np.testing.assert_allclose(same, 1, rtol=1e-6)
  with pytest.raises(ValueError, match="tokens=6"):
    resample.pyramid(x[:, :6], (2,))

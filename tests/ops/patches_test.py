"""Images as patches and back."""

import numpy as np
import pytest

from tests.compiled import run
from tokjax.ops import patches


@pytest.mark.parametrize("shape", [(4, 6), (5, 7)])
def test_patches_are_cut_row_by_row_and_the_remainder_left(shape):
  images = np.random.default_rng(0).normal(size=(2, *shape, 3))
  got = np.asarray(run(patches.patchify, np.float32(images), 2))
  assert got.shape == (2, 6, 12)
  for b, i, j in np.ndindex(2, 2, 3):
    patch = images[b, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].reshape(-1)
    np.testing.assert_allclose(got[b, 3 * i + j], patch, rtol=1e-6)


def test_whole_patches_come_back():
  images = np.random.default_rng(0).normal(size=(2, 4, 6, 3))
  images = np.float32(images)
  cut = run(patches.patchify, images, 2)
  got = run(patches.unpatchify, cut, (2, 3), 2)
  np.testing.assert_array_equal(got, images)


def test_wrong_sizes_are_named():
  cut = np.zeros((1, 6, 12), np.float32)
  with pytest.raises(ValueError, match="places_of_grid=4"):
    patches.unpatchify(cut, (2, 2), 2)
  with pytest.raises(ValueError, match="patch_width must be a multiple of 9"):
    patches.unpatchify(cut, (2, 3), 3)

"""Mosaics and the agreement of partitions; a claim of a few steps."""

import itertools

import numpy as np
import pytest

from tokjax.benchmarks import slot_objects


def test_adjusted_rand_index_equals_counting_pairs():
  random = np.random.default_rng(0)
  one, two = random.integers(0, 3, (2, 12))
  pairs = list(itertools.combinations(range(12), 2))
  same = np.array([[x[i] == x[j] for i, j in pairs] for x in (one, two)])
  both = (same[0] & same[1]).sum()
  expected = same[0].sum() * same[1].sum() / len(pairs)
  want = (both - expected) / (same.sum() / 2 - expected)
  got = slot_objects.adjusted_rand_index(one, two)
  assert got == pytest.approx(want)
  assert slot_objects.adjusted_rand_index(one, 2 - one) == 1
  assert slot_objects.adjusted_rand_index(0 * one, 0 * two) == 1
  with pytest.raises(ValueError, match="labels=12, found=11"):
    slot_objects.adjusted_rand_index(one, two[1:])


def test_mosaics_are_windows_of_four_pictures():
  """Pictures of one grey each: a patch shows the picture it is said to."""
  grey = np.arange(1, 33, dtype=np.uint8)
  images = np.broadcast_to(grey[:, None, None, None], (32, 8, 8, 3))
  made, quadrant = slot_objects.mosaics(images, number=40, seed=0)
  again, _ = slot_objects.mosaics(images, number=40, seed=0)
  np.testing.assert_array_equal(made, again)
  patches = made.reshape(40, 2, 4, 2, 4, 3).transpose(0, 1, 3, 2, 4, 5)
  patches = patches.reshape(40, 4, -1)
  assert np.all(patches == patches[..., :1])
  seen = [len(set(row)) for row in quadrant.tolist()]
  assert set(seen) == {2, 4}  # windows of two patches a side hold no three
  for shown, of in zip(patches[..., 0], quadrant, strict=True):
    for number in set(of.tolist()):
      assert len(set(shown[of == number].tolist())) == 1

"""Checks pass silently and name what is wrong."""

import numpy as np
import pytest

from tokjax import checks


def test_same_size():
  checks.same_size(a=3, b=3)
  with pytest.raises(ValueError, match="sizes must agree, got a=3, b=4"):
    checks.same_size(a=3, b=4)


def test_in_range_includes_both_ends():
  checks.in_range(1, 4, low=1, high=4)
  checks.in_range(0.0, 1.0, rate=0.5)
  with pytest.raises(ValueError, match="k must lie in 1..4, got 5"):
    checks.in_range(1, 4, k=5)
  with pytest.raises(ValueError, match="rate must lie in 0..1, got nan"):
    checks.in_range(0, 1, rate=float("nan"))


def test_one_of_lists_what_is_accepted():
  checks.one_of(("sign", "sketch"), inner="sign")
  with pytest.raises(ValueError, match="inner must be one of 'sign', 'sketch'"):
    checks.one_of(("sign", "sketch"), inner="sing")


def test_has_rank_lets_none_pass():
  checks.has_rank(2, queries=np.zeros((2, 3)), mask=None)
  with pytest.raises(ValueError, match=r"mask must have 2 axes.*\(3,\)"):
    checks.has_rank(2, queries=np.zeros((2, 3)), mask=np.zeros(3))


def test_has_dtype_lets_none_pass():
  checks.has_dtype(np.uint32, word_ids=np.zeros(3, np.uint32), mask=None)
  with pytest.raises(TypeError, match="word_ids must be uint32, got int32"):
    checks.has_dtype(np.uint32, word_ids=np.zeros(3, np.int32))


def test_divisible():
  checks.divisible(4, width=12)
  with pytest.raises(ValueError, match="width must be a multiple of 4, got 6"):
    checks.divisible(4, width=6)


def test_has_sides():
  checks.has_sides(4, images=np.zeros((2, 4, 4, 3)))
  for shape in ((2, 4, 5, 3), (2, 5, 4, 3), (4, 4, 3)):
    with pytest.raises(ValueError, match=r"images must be \[B, 4, 4, C\], got"):
      checks.has_sides(4, images=np.zeros(shape))

"""Dropped patches dark, kept ones untouched, fused ones in one colour."""

import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.ops import plans
from tokjax.reduction import pictures, types

TOKENS = jnp.ones((1, 4, 2))
IMAGE = np.full((9, 8, 3), 100, np.uint8)  # one row is left over


def test_a_selection_dims_what_is_gone():
  kept = types.selected(TOKENS, jnp.array([[3, 0]]))
  assert pictures.groups(kept, 4).tolist() == [0, -1, -1, 1]
  shown = pictures.overlay(IMAGE, kept, (2, 2))
  assert shown.shape == (8, 8, 3)
  assert (shown[:4, :4] == 100).all() and (shown[4:, 4:] == 100).all()
  assert (shown[:4, 4:] == 25).all() and (shown[4:, :4] == 25).all()


def test_masked_rows_show_nothing():
  kept = types.selected(TOKENS, jnp.array([[1, 2]]), jnp.array([[True, False]]))
  assert pictures.groups(kept, 4).tolist() == [-1, 0, -1, -1]


def test_a_merge_shares_a_colour_and_frames_the_one_that_stands():
  plan = plans.Merge(
    jnp.array([[0, 0, 1, 2]]), jnp.array([[0.5, 0.5, 1.0, 0.0]])
  )
  fused = types.fused(TOKENS, plan, jnp.array([[1, 2]]))
  assert pictures.groups(fused, 4).tolist() == [0, 0, 1, -1]
  shown = pictures.overlay(IMAGE, fused, (2, 2))
  assert (shown[:4, 4:][0] == 255).all() and (shown[:4, :4] != 255).any()
  np.testing.assert_array_equal(shown[1, 1], shown[1, 5])  # inside the frame
  assert (shown[1, 1] != 100).any()
  assert (shown[4:, :4] == 100).all() and (shown[4:, 4:] == 25).all()


def test_of_a_transform_the_largest_share_counts():
  share = jnp.array([[[0.4, 1.0, 0.0, 0.0], [0.6, 0.0, 1.0, 0.0]]])
  fused = types.fused(
    TOKENS, plans.Transform(share, share), jnp.array([[1, 2]])
  )
  assert pictures.groups(fused, 4).tolist() == [1, 0, 1, -1]


def test_errors_name_the_argument():
  kept = types.selected(TOKENS, jnp.array([[3]]))
  with pytest.raises(ValueError, match="image_height must lie in 2"):
    pictures.overlay(IMAGE[:1], kept, (2, 2))
  two = types.selected(jnp.ones((2, 4, 2)), jnp.array([[3], [1]]))
  with pytest.raises(ValueError, match="batch must lie in 1..1, got 2"):
    pictures.groups(two, 4)

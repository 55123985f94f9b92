"""Rotary positions, against complex numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import compiled
from tokjax.ops import rope

rope = compiled(rope)


def test_pairs_are_complex_numbers_that_turn():
  x = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)
  positions = np.array([0, 1, 3, 40, 700])
  got = rope.rotate(x, positions, base=100.0)
  pairs = x[..., :3].astype(complex) + 1j * x[..., 3:]
  rates = 100.0 ** (-np.arange(3) / 3)
  want = pairs * np.exp(1j * positions[:, None] * rates)
  want = np.concatenate([want.real, want.imag], axis=-1)
  # An angle of 700 radians has a rounding of 3e-5.
  np.testing.assert_allclose(got, want, atol=2e-4)


def test_products_hang_on_the_distance():
  q, k = np.random.default_rng(1).normal(size=(2, 1, 8)).astype(np.float32)
  q, k = jnp.tile(q, (4, 1)), jnp.tile(k, (4, 1))
  here, there = np.array([0, 1, 2, 3]), np.array([10, 11, 12, 13])
  near = rope.rotate(q, here) @ rope.rotate(k, here).T
  far = rope.rotate(q, there) @ rope.rotate(k, there).T
  np.testing.assert_allclose(near, far, atol=1e-5)
  np.testing.assert_allclose(near[0, 1], near[2, 3], atol=1e-5)
  assert abs(near[0, 1] - near[0, 2]) > 1e-3
  # Without positions they count from 0.
  np.testing.assert_array_equal(rope.rotate(q), rope.rotate(q, here))


def test_keeps_dtype_and_names_what_is_wrong():
  x = jnp.ones((3, 4), jnp.bfloat16)
  assert jax.eval_shape(rope.rotate, x).dtype == jnp.bfloat16
  with pytest.raises(ValueError, match="width must be a multiple of 2, got 3"):
    rope.rotate(x[:, :3])
  with pytest.raises(ValueError, match="positions=2, tokens=3"):
    rope.rotate(x, np.arange(2))

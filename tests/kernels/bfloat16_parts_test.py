"""Sums of bfloat16 values that hold a float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.kernels.bfloat16_parts import bfloat16_parts


@pytest.mark.parametrize("wrap", [lambda f, **_: f, jax.jit])
def test_three_parts_hold_a_float32(wrap):
  # Under jit too, where XLA drops casts that look useless.
  x = jnp.asarray(np.random.default_rng(0).normal(size=1000), jnp.float32)
  parts = wrap(bfloat16_parts, static_argnums=1)(x, 3)
  assert all(part.dtype == jnp.bfloat16 for part in parts)
  total = sum(np.float64(part) for part in parts)
  np.testing.assert_allclose(total, np.float64(x), rtol=2.0**-23)
  size = [np.abs(np.float64(part)) for part in parts]
  assert (size[1] <= 2.0**-8 * size[0]).all()
  assert (size[2] <= 2.0**-16 * size[0]).all()


def test_whole_numbers_need_one_part():
  x = jnp.arange(-256.0, 257.0)
  first, *rest = bfloat16_parts(x, 3)
  np.testing.assert_array_equal(first.astype(jnp.float32), x)
  assert not any(part.any() for part in rest)


def test_what_is_not_finite_shows():
  parts = bfloat16_parts(jnp.array([np.nan, np.inf, 1.0]), 3)
  total = sum(part.astype(jnp.float32) for part in parts)
  assert np.isfinite(total).tolist() == [False, False, True]

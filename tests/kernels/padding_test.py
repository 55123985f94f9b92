"""Values after an axis."""

import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.kernels.padding import pad_to, pad_to_multiple


@pytest.mark.parametrize("axis", [0, 1])
def test_values_follow_up_to_the_size(axis):
  x = jnp.arange(6).reshape(2, 3)
  got = np.asarray(pad_to(x, axis, 4, -1))
  assert got.shape[axis] == 4 and got.shape[1 - axis] == x.shape[1 - axis]
  np.testing.assert_array_equal(got[:2, :3], x)
  assert (got == -1).sum() == got.size - 6
  assert pad_to(x, 1, 3) is x


def test_multiples():
  mask = jnp.ones((2, 3), bool)
  got = pad_to_multiple(mask, 1, 2)
  assert got.dtype == bool
  np.testing.assert_array_equal(got, [[True, True, True, False]] * 2)
  assert pad_to_multiple(mask, 1, 3) is mask

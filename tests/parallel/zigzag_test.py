"""The order in which causal work is shared fairly."""

import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.parallel import zigzag


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_every_device_has_as_many_pairs(size):
  order = zigzag.zigzag_order(48, size)
  assert order.dtype == np.int32
  assert sorted(order) == list(range(48))
  devices = order.reshape(size, -1)
  read = (devices + 1).sum(axis=1)  # a query reads itself and all before
  assert len(set(read.tolist())) == 1
  assert (np.diff(devices, axis=1) > 0).all()


def test_worked_example():
  want = [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7]
  assert zigzag.zigzag_order(12, 3).tolist() == want


def test_there_and_back_on_any_axis():
  x = np.arange(2 * 12 * 3).reshape(2, 12, 3)
  there = zigzag.to_zigzag(x, 3, axis=1)
  np.testing.assert_array_equal(there[:, 2], x[:, 10])
  np.testing.assert_array_equal(zigzag.from_zigzag(there, 3, axis=1), x)
  ids = jnp.arange(12)
  back = zigzag.from_zigzag(zigzag.to_zigzag(ids, 2), 2)
  np.testing.assert_array_equal(back, ids)


def test_errors_name_the_argument():
  with pytest.raises(ValueError, match="length must be a multiple of 6"):
    zigzag.zigzag_order(10, 3)
  with pytest.raises(ValueError, match="num_devices must lie in 1..10, got 0"):
    zigzag.zigzag_order(10, 0)

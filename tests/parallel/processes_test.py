"""One process alone; several are in tests/train/distributed_test.py."""

import jax
import numpy as np
import pytest

from tokjax.parallel import processes


def test_a_process_alone_keeps_its_arrays_and_errors():
  tree = {"w": jax.numpy.arange(3.0)}
  np.testing.assert_array_equal(processes.whole(tree)["w"], [0.0, 1.0, 2.0])
  with pytest.raises(KeyError, match="mine"), processes.ending_together():
    raise KeyError("mine")


@pytest.mark.parametrize(
  "arguments, message",
  [
    (("host:1", 2, None), "missing process_id"),
    ((None, 2, 0), "missing coordinator"),
    (("host:1", 2, 2), r"process_id must lie in 0\.\.1, got 2"),
  ],
)
def test_arguments_go_together(arguments, message):
  with pytest.raises(ValueError, match=message):
    processes.initialize(*arguments)

"""Experts spread over devices that belong to two processes.

python -m tests.parallel.moe_processes_test PORT PROCESS FOLDER
"""

import dataclasses
import sys

import jax
import numpy as np
import pytest

from tests import launch
from tests.parallel import moe_layers
from tokjax.parallel import processes
from tokjax.parallel.moe_weights import MoeConfig

CONFIG = MoeConfig(num_experts=8, num_chosen=2)
# Rows cross between the processes in both; in the second all parts of an expert
# are in one.
LAYOUTS = {
  "whole": ("capacity", (dict(dp=2, tp=2), dict(ep=4))),
  "cut": ("padded", (dict(cp=2, tp=2), dict(ep=2, etp=2))),
}


def one_of_two(port, process, folder):
  """Saves what every layout gives, as this process sees it."""
  processes.initialize(
    f"localhost:{port}", 2, int(process), heartbeat_timeout=10
  )
  with processes.ending_together():
    assert [d.process_index for d in jax.devices()] == [0, 0, 1, 1]
    for name, (exchange, layout) in LAYOUTS.items():
      config = dataclasses.replace(CONFIG, exchange=exchange, buffer_factor=8.0)
      got, overflow = moe_layers.found(config, layout)
      assert overflow == 0
      np.savez(f"{folder}/{name}_{process}.npz", *jax.tree.leaves(got))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("experts")
  started = launch.start(
    2,
    lambda port, i: ("-m", "tests.parallel.moe_processes_test", port, i, path),
  )
  ended = launch.outputs(started, timeout=200)
  assert [process.returncode for process in started] == [0, 0], ended
  return path


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_the_layer_on_one_device(folder, name):
  """Outputs, losses and gradients, whole in both processes."""
  for process in range(2):
    with np.load(folder / f"{name}_{process}.npz") as file:
      moe_layers.assert_close(list(file.values()), moe_layers.oracle(CONFIG))


if __name__ == "__main__":
  one_of_two(*sys.argv[1:])

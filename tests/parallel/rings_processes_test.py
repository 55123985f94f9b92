"""Rings of attention whose devices belong to two processes.

python -m tests.parallel.rings_processes_test PORT PROCESS FOLDER
"""

import functools
import sys

import jax
import numpy as np
import pytest

from tests import launch
from tests.parallel import dense_attention
from tokjax.parallel import processes
from tokjax.parallel.ring_attention import ring_attention
from tokjax.parallel.token_ring import token_ring

# Both send both ways, and so between the processes at each end of their rows.
RINGS = {
  "ring_attention": functools.partial(ring_attention, rotate="both"),
  "token_ring": token_ring,
}


def one_of_two(port, process, folder):
  """Saves what every ring gives, as this process sees it."""
  processes.initialize(
    f"localhost:{port}", 2, int(process), heartbeat_timeout=10
  )
  with processes.ending_together():
    mesh = dense_attention.ring_mesh(seq=4)
    assert [d.process_index for d in mesh.devices] == [0, 0, 1, 1]
    assert jax.local_device_count() == 2
    for name, ring in RINGS.items():
      found = dense_attention.on_devices(
        ring, dense_attention.example(), mesh, causal=True
      )
      np.savez(f"{folder}/{name}_{process}.npz", *found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("rings")
  started = launch.start(
    2,
    lambda port, i: (
      "-m", "tests.parallel.rings_processes_test", port, i, path
    ),
  )  # fmt: skip
  ended = launch.outputs(started, timeout=200)
  assert [process.returncode for process in started] == [0, 0], ended
  return path


@pytest.fixture(scope="module")
def want():
  return dense_attention.dense(dense_attention.example(), causal=True)


@pytest.mark.parametrize("name", RINGS)
def test_equals_attention_over_the_whole(folder, want, name):
  """Results and gradients, whole in both; two sequences and padding."""
  for process in range(2):
    with np.load(folder / f"{name}_{process}.npz") as file:
      got = list(file.values())
    for g, w in zip(got, want, strict=True):
      np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
  one_of_two(*sys.argv[1:])

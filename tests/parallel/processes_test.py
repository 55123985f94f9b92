"""Processes find each other, see whole arrays, and end together."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from tests import launch
from tokjax.parallel import meshes, processes, rules

PROGRAM = """
import sys
import jax, numpy as np
from tokjax.parallel import meshes, processes, rules

port, process_id = sys.argv[1:]
try:
  processes.initialize()
except ValueError as error:
  print(error)
processes.initialize(f"localhost:{port}", 2, int(process_id),
                     heartbeat_timeout=10)
with processes.ending_together():
  mesh = meshes.make_mesh(2, 2)
  kernel = np.arange(8, dtype=np.float32).reshape(4, 2)
  table = [("cut", (("data", "fsdp"),)), ("half", ("fsdp",)), ("", ())]
  tree = {name: kernel for name in ("cut", "half", "copied")}
  tree = {**rules.shard(tree, mesh, table), "own": jax.numpy.ones(1)}
  for name, x in processes.whole(tree).items():
    print(name, x.ravel().astype(int), x.is_fully_addressable)
  if process_id == "0":
    raise OSError("the disk is full")
  print("total", float(jax.jit(lambda x: x.sum())(tree["cut"])))
"""


def test_one_fails_and_both_end():
  """Both see all arrays first; then one waits for the other, in vain."""
  first, second = started = launch.start(
    2, lambda port, i: ("-c", PROGRAM, port, i)
  )
  ended = launch.outputs(started, timeout=120)
  for output, errors in ended:
    assert "coordinator, num_processes, process_id are not all in" in output
    for name in ("cut", "half", "copied"):
      assert f"{name} [0 1 2 3 4 5 6 7] True" in output, errors
    assert "own [1] True" in output and "total" not in output
  assert first.returncode == 1 and second.returncode not in (0, None)
  lines = ended[0][1].splitlines()
  assert lines[-2] == "OSError: the disk is full"
  assert lines[-1].startswith("process 0 of 2 failed. The others are stopped")
  assert re.search("another (task|one) died", ended[1][1])


def test_a_process_alone_sees_its_own_arrays_and_errors():
  mesh = meshes.make_mesh(fsdp=8)
  tree = rules.shard({"w": jnp.ones((8, 2))}, mesh)
  assert processes.whole(tree)["w"] is tree["w"]
  with pytest.raises(KeyError, match="missing"):
    with processes.ending_together():
      raise KeyError("missing")


@pytest.mark.parametrize(
  ("place", "message"),
  [
    (("localhost:1", None, None), "missing num_processes, process_id"),
    ((None, 2, 0), "missing coordinator"),
    (("localhost:1", 2, 2), "process_id must lie in 0..1, got 2"),
    (("localhost", 2, 0), "coordinator must be host:port, got 'localhost'"),
  ],
)
def test_bad_places_are_named(place, message):
  with pytest.raises(ValueError, match=message):
    processes.initialize(*place)


def test_must_come_first():
  np.asarray(jnp.ones(1))
  with pytest.raises(RuntimeError, match="must be called before"):
    processes.initialize("localhost:1", 2, 0)

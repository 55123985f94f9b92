"""MaxSim built by the real TPU compiler, on a machine without a TPU.

Run alone: `pytest -m compile_tpu`. The settings of the compiler must stand in
the environment before jax starts, so everything happens in one child process
per topology, through the command that users have.
"""

import importlib.util
import json
import subprocess
import sys

import pytest

pytestmark = [
  pytest.mark.compile_tpu,
  pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='libtpu is not installed: pip install -e ".[aot]"',
  ),
]


def compiled(*words):
  """Rows of `tokjax compile`, by program and width; all must have compiled."""
  done = subprocess.run(
    [sys.executable, "-m", "tokjax.cli.main", "compile", "--json", *words],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  rows = [json.loads(line) for line in done.stdout.splitlines()]
  assert all(row["state"] == "compiled" for row in rows), rows
  return {(row["program"], row["dim"]): row for row in rows}


@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2", "tpu7x:2x2x1"])
def test_kernels_compile_and_are_in_the_program(topology):
  rows = compiled("--topology", topology, "--shape", "batch", "--dim", "128")
  backward = {"maxsim_document_gradient": 1, "maxsim_query_gradient": 1}
  gradient = {"maxsim_forward": 1, **backward}
  expected = {
    "forward": {"maxsim_forward": 1},
    "forward+index": {"maxsim_forward": 1},
    "backward": backward,
    "maxsim": {"maxsim_forward": 1},
    "gradient": gradient,
    "sharded": gradient,
  }
  for name, kernels in expected.items():
    assert kernels.items() <= rows[name, 128]["kernels"].items(), name


def test_sharded_step_communicates_query_gradients_only():
  row = compiled(
    *("--topology", "v5e:2x2", "--shape", "rerank", "--dim", "128"),
    *("--program", "sharded"),
  )["sharded", 128]
  assert set(row["collectives"]) == {"all-reduce"}
  # A quarter of the documents on each chip.
  assert row["argument_bytes"] < 0.3 * 1000 * 300 * 128 * 2


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_narrow_widths_and_cut_queries_compile(dtype):
  rows = compiled(
    *("--topology", "v5e:2x2", "--shape", "patches", "--dtype", dtype),
    *("--dim", "48", "--dim", "128"),
    *("--program", "forward+index", "--program", "backward"),
  )
  # Page images have 1,024 tokens, a multiple of 16: at width 128 the kernel
  # reads the documents where they lie, without a copy.
  copied = rows["forward+index", 128]["temp_bytes"]
  assert copied < 0.01 * rows["forward+index", 128]["argument_bytes"]

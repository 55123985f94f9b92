"""Column attention built by the real TPU compiler, without a TPU.

Run alone: `pytest -m compile_tpu`. The settings of the compiler must stand in
the environment before jax starts, so everything happens in one child process
per topology.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tokjax.kernels.column_attention.shapes import SHAPES
from tokjax.parallel import topologies

pytestmark = [
  pytest.mark.compile_tpu,
  pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='libtpu is not installed: pip install -e ".[aot]"',
  ),
]

_PROGRAM = """
import functools, json, sys
import jax, jax.numpy as jnp, numpy as np
from tokjax.kernels.column_attention import column_attention
from tokjax.kernels.column_attention.shapes import SHAPES
from tokjax.parallel import topologies

devices = topologies.tpu_topology(sys.argv[1])
causal = functools.partial(column_attention, causal=True)

def inputs(shape, dtype, batch=1, place=None):
  size = (batch, shape.heads, shape.num_tokens, shape.dim)
  keys = (batch, shape.key_heads, shape.num_tokens, shape.dim)
  mask = (batch, shape.num_tokens)
  return [
    jax.ShapeDtypeStruct(size, kind, sharding=place)
    for size, kind in ((size, dtype), (keys, dtype), (mask, bool))
  ]

def compile(name, function, given):
  report = topologies.compile_for(function, given, devices=devices)
  print(json.dumps({"name": name, "kernels": report.kernels,
                    "temp_bytes": report.temp_bytes}))

for words in sys.argv[2:]:
  name, variant = words.split()
  dtype = jnp.float32 if variant == "float32" else jnp.bfloat16
  given = inputs(SHAPES[name], dtype)
  function = causal if variant == "causal" else column_attention
  compile(words, function, given if variant == "masked" else given[:2])

mesh = jax.sharding.Mesh(
  np.array(devices), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
place = jax.NamedSharding(mesh, jax.P("data"))
with jax.set_mesh(mesh):
  given = inputs(SHAPES["image"], jnp.bfloat16, 8, place)
  compile("sharded", column_attention, given)
"""


TOPOLOGIES = ["v5e:2x2", "v6e:2x2", "tpu7x:2x2x1"]
VARIANTS = ["plain", "causal", "masked", "float32"]
PROGRAMS = [f"{name} {variant}" for name in SHAPES for variant in VARIANTS]


def compiled(topology, programs):
  done = subprocess.run(
    [sys.executable, "-c", _PROGRAM, topology, *programs],
    capture_output=True,
    text=True,
    env=os.environ | topologies.environment("tpu"),
  )
  assert done.returncode == 0, done.stdout + done.stderr
  rows = [json.loads(line) for line in done.stdout.splitlines()]
  assert [row["name"] for row in rows] == [*programs, "sharded"]
  for row in rows:
    for kernel in ("column_attention_rows", "column_attention_columns"):
      assert row["kernels"].get(kernel) == 1, row
  return {row["name"]: row["temp_bytes"] for row in rows}


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_compiles_and_is_in_the_program(topology):
  """On each chip another quarter of the programs, and video."""
  first = TOPOLOGIES.index(topology)
  programs = {"video plain", *PROGRAMS[first :: len(VARIANTS) + 1]}
  held = compiled(topology, sorted(programs))
  # A matrix of one head would be 1 GiB in float32. Queries and keys, 32 MiB
  # each, are copied with heads of 64 padded to 128 lanes; the rest is small.
  assert held["video plain"] < 136 << 20


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_every_program_compiles(topology):
  held = compiled(topology, PROGRAMS)
  assert held["video plain"] < 136 << 20

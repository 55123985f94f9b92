"""The Hopper kernel of greedy selection, compiled for an H100 not there.

Runs in a process of its own, with the `aot` extra installed:

    pytest -m compile_gpu tests/kernels/greedy_select_compile_gpu_test.py
"""

import functools

import jax
import jax.numpy as jnp
import pytest

from tokjax.kernels.greedy_select import greedy_select, pallas_gpu
from tokjax.kernels.greedy_select.shapes import SHAPES
from tokjax.parallel import topologies

pytestmark = pytest.mark.compile_gpu


def arguments(shape):
  square = (shape.batch, shape.num_tokens, shape.num_tokens)
  vector = jax.ShapeDtypeStruct(square[:2], jnp.float32)
  return jax.ShapeDtypeStruct(square, shape.dtype), vector, vector


@pytest.mark.parametrize("objective", ["max_min", "max_sum", "mmr"])
@pytest.mark.parametrize("name", SHAPES)
def test_kernel_compiles(name, objective, h100s, capfd):
  select = functools.partial(
    pallas_gpu.select,
    num_keep=SHAPES[name].num_keep,
    objective=objective,
    weight=0.5 if objective == "mmr" else 1.0,
  )
  report = topologies.compile_for(
    select, arguments(SHAPES[name]), devices=h100s
  )
  assert "mosaic_gpu" in report.text
  printed = "".join(capfd.readouterr())
  assert "0 bytes spill stores, 0 bytes spill loads" in printed


def test_public_function_compiles(h100s):
  table = arguments(SHAPES["image"])[0]
  for objective in ("max_min", "coverage", "dpp"):
    report = topologies.compile_for(
      functools.partial(greedy_select, num_keep=64, objective=objective),
      (table,),
      devices=h100s,
    )
    assert report.total_bytes > 0
  report = topologies.compile_for(
    functools.partial(greedy_select, num_keep=64, implementation="pallas_gpu"),
    (table,),
    devices=h100s,
  )
  assert "mosaic_gpu" in report.text

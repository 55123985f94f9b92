"""Greedy selection built by the real TPU compiler, without a TPU.

Runs in a process of its own, with the `aot` extra installed:

    pytest -m compile_tpu tests/kernels/greedy_select_compile_tpu_test.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.kernels.greedy_select import (
  OBJECTIVES,
  greedy_select,
  greedy_select_features,
  pallas_tpu,
)
from tokjax.kernels.greedy_select.shapes import SHAPES
from tokjax.parallel import topologies

pytestmark = pytest.mark.compile_tpu


def table_of(shape, objective):
  rows = shape.num_tokens
  if objective == "coverage":
    rows += shape.num_texts
  return jax.ShapeDtypeStruct(
    (shape.batch, rows, shape.num_tokens), shape.dtype
  )


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", SHAPES)
def test_kernel_compiles_or_says_why(name, objective, tpus):
  shape = SHAPES[name]
  table = table_of(shape, objective)
  reason = pallas_tpu.unsupported(table, objective, shape.num_keep)
  if reason is not None:
    assert objective in ("coverage", "dpp") and "vector memory" in reason
    return
  vector = jax.ShapeDtypeStruct((shape.batch, shape.num_tokens), jnp.float32)
  select = functools.partial(
    pallas_tpu.select,
    num_keep=shape.num_keep,
    objective=objective,
    weight=0.5,
  )
  report = topologies.compile_for(select, (table, vector, vector), devices=tpus)
  assert report.kernels["greedy_select"] == 1
  if objective != "coverage":
    # The table is read where it lies, without a copy. (One that is not square
    # may come in with its axes turned, when nothing else has a say in it.)
    assert report.temp_bytes < 0.02 * report.argument_bytes


def test_public_function_takes_the_kernel(tpus):
  for name, shape in SHAPES.items():
    report = topologies.compile_for(
      functools.partial(greedy_select, num_keep=shape.num_keep),
      (table_of(shape, "max_min"),),
      devices=tpus,
    )
    assert report.kernels.get("greedy_select") == 1, name


@pytest.mark.parametrize("tpus", ["v5e:2x2"], indirect=True)  # no kernel
def test_features_compile_without_the_table(tpus):
  x = jax.ShapeDtypeStruct((1, 16_384, 1_024), jnp.bfloat16)
  report = topologies.compile_for(
    functools.partial(greedy_select_features, num_keep=1_024),
    (x,),
    devices=tpus,
  )
  assert report.temp_bytes < 16_384 * 16_384 * 4 // 2


def test_sharded_over_the_batch(tpus):
  mesh = jax.sharding.Mesh(
    np.array(tpus),
    ("data",),
    axis_types=(jax.sharding.AxisType.Explicit,),
  )
  batch = len(tpus)
  table = jax.ShapeDtypeStruct(
    (batch, 576, 576),
    jnp.float32,
    sharding=jax.NamedSharding(mesh, jax.P("data")),
  )
  select = functools.partial(greedy_select, num_keep=64)
  with jax.set_mesh(mesh):
    report = topologies.compile_for(select, (table,), devices=tpus)
  assert report.kernels.get("greedy_select") == 1
  assert not report.collectives

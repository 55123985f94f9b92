"""The gated MLP built by the real TPU compiler, without a TPU.

Runs in a process of its own, with the `aot` extra installed:

    pytest -m compile_tpu tests/kernels/gated_mlp_compile_tpu_test.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.kernels.gated_mlp import gated_rows
from tokjax.kernels.gated_mlp.shapes import SHAPES
from tokjax.parallel import topologies

pytestmark = pytest.mark.compile_tpu


def arrays(shape, batch, dtype):
  sizes = (*batch, shape.dim), (*batch, shape.num_units)
  sizes += ((shape.num_units, shape.dim),) * 2
  return [jax.ShapeDtypeStruct(size, dtype) for size in sizes]


def check(report):
  assert report.kernels.get("gated_rows") == 1
  # No weight is laid out anew: one has 90 MB in bfloat16. Gates are.
  assert report.temp_bytes < 8 << 20
  assert report.on_chip_bytes < 48 << 20
  # The list of groups is the only sort, that of units is dropped.
  assert report.text.count(" sort(") == 1


@pytest.mark.parametrize(
  "name, num_tokens, dtype",
  [
    ("llama_7b", 1, jnp.bfloat16),
    pytest.param("mistral_7b", 8, jnp.float32, marks=pytest.mark.slow),
    pytest.param("mistral_7b", 4, jnp.bfloat16, marks=pytest.mark.slow),
  ],
)
def test_public_function_takes_the_kernel(name, num_tokens, dtype, tpus):
  given = arrays(SHAPES[name], (num_tokens,), dtype)
  check(topologies.compile_for(gated_rows, given, devices=tpus))


@pytest.mark.slow
def test_sharded_tokens(tpus):
  mesh = jax.sharding.Mesh(
    np.array(tpus[:4]),
    ("data",),
    axis_types=(jax.sharding.AxisType.Explicit,),
  )
  spread = jax.NamedSharding(mesh, jax.P("data"))
  whole = jax.NamedSharding(mesh, jax.P())
  given = [
    jax.ShapeDtypeStruct(y.shape, y.dtype, sharding=place)
    for y, place in zip(
      arrays(SHAPES["llama_7b"], (4, 1), jnp.bfloat16),
      (spread, spread, whole, whole),
      strict=True,
    )
  ]
  with jax.set_mesh(mesh):
    report = topologies.compile_for(gated_rows, given, devices=tpus)
  assert report.kernels.get("gated_rows") == 1

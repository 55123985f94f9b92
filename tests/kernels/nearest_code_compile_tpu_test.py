"""Nearest-code search built by the real TPU compiler, without a TPU.

Runs in a process of its own, with the `aot` extra installed:

    pytest -m compile_tpu tests/kernels/nearest_code_compile_tpu_test.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.kernels.nearest_code import nearest_code
from tokjax.kernels.nearest_code.shapes import SHAPES
from tokjax.parallel import topologies

pytestmark = pytest.mark.compile_tpu


@pytest.mark.parametrize("name", ["llamagen", "ibq"])
def test_public_function_takes_the_kernel(name, tpus):
  shape = SHAPES[name]
  x = jax.ShapeDtypeStruct((shape.num_tokens, shape.dim), jnp.bfloat16)
  codebook = jax.ShapeDtypeStruct((shape.num_codes, shape.dim), jnp.float32)
  report = topologies.compile_for(nearest_code, (x, codebook), devices=tpus)
  assert report.kernels.get("nearest_code") == 1
  # Operands in the layout of the kernel, the width of tokens padded to lanes.
  lanes = -(-shape.dim // 128) * 128
  operands = 4 * (shape.num_tokens * lanes + shape.num_codes * shape.dim)
  assert report.temp_bytes < 1.5 * operands


def test_tokens_and_codes_sharded(tpus):
  mesh = jax.sharding.Mesh(
    np.array(tpus[:4]).reshape(2, 2),
    ("data", "model"),
    axis_types=(jax.sharding.AxisType.Explicit,) * 2,
  )

  def placed(shape, *spec):
    sharding = jax.NamedSharding(mesh, jax.P(*spec))
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

  arrays = placed((64, 256, 8), "data"), placed((16_384, 8), "model")
  with jax.set_mesh(mesh):
    report = topologies.compile_for(nearest_code, arrays, devices=tpus)
  assert report.kernels.get("nearest_code") == 1
  # A score and an index of each token travel.
  assert set(report.collectives) == {"all-gather"}

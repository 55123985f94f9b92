"""The Hopper kernels of column attention, compiled for an H100 not there.

Runs in a process of its own, with the `aot` extra installed:

    pytest -m compile_gpu tests/kernels/column_attention_compile_gpu_test.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.kernels.column_attention import column_attention, pallas_gpu
from tokjax.kernels.column_attention.shapes import SHAPES

pytestmark = pytest.mark.compile_gpu


def inputs(shape, place, batch=1):
  size = (batch, shape.heads, shape.num_tokens, shape.dim)
  keys = (batch, shape.key_heads, shape.num_tokens, shape.dim)
  mask = (batch, shape.num_tokens)
  return (
    jax.ShapeDtypeStruct(size, jnp.bfloat16, sharding=place),
    jax.ShapeDtypeStruct(keys, jnp.bfloat16, sharding=place),
    jax.ShapeDtypeStruct(mask, bool, sharding=place),
  )


def check_assembly(text):
  """Tensor cores, bulk copies, and nothing pushed out of the registers."""
  assert "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16" in text
  assert "cp.async.bulk.tensor" in text
  assert "ex2.approx" in text
  assert "0 bytes spill stores, 0 bytes spill loads" in text
  assert text.count("spill stores") == text.count("0 bytes spill stores")


# Where the last tile is padded ids are compared anyway: the same kernel.
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
  "name, masked",
  [
    (name, masked)
    for name, shape in SHAPES.items()
    for masked in (False, True)
    if not masked or shape.num_tokens % 128 == 0
  ],
)
def test_compiles(name, masked, causal, h100s, capfd):
  alone = jax.sharding.SingleDeviceSharding(h100s[0])
  q, k, mask = inputs(SHAPES[name], alone)
  assert pallas_gpu.unsupported(q, k) is None
  attention = functools.partial(
    column_attention, causal=causal, implementation="pallas_gpu"
  )
  given = (q, k, mask) if masked else (q, k)
  compiled = jax.jit(attention).lower(*given).compile()
  assert "mosaic_gpu" in compiled.as_text()
  check_assembly("".join(capfd.readouterr()))


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_compiles_inside_shard_map(kind, h100s):
  kinds = (getattr(jax.sharding.AxisType, kind),)
  mesh = jax.sharding.Mesh(np.array(h100s), ("data",), axis_types=kinds)
  place = jax.NamedSharding(mesh, jax.P("data"))
  mapped = jax.shard_map(
    functools.partial(column_attention, implementation="pallas_gpu"),
    mesh=mesh,
    in_specs=jax.P("data"),
    out_specs=jax.P("data"),
  )
  given = inputs(SHAPES["image"], place, batch=len(h100s))
  text = jax.jit(mapped).lower(*given).compile().as_text()
  assert "column_attention_rows" in text
  assert "column_attention_columns" in text

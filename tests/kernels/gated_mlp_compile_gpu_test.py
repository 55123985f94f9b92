"""The Hopper kernel of the gated MLP, compiled for an H100 that is not there.

Runs in a process of its own, with the `aot` extra installed:

    pytest -m compile_gpu tests/kernels/gated_mlp_compile_gpu_test.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.kernels.gated_mlp import gated_rows, pallas_gpu
from tokjax.kernels.gated_mlp.shapes import SHAPES
from tokjax.parallel import topologies

pytestmark = pytest.mark.compile_gpu

named = functools.partial(gated_rows, implementation="pallas_gpu")


def arrays(batch, dim, num_units, dtype):
  sizes = (*batch, dim), (*batch, num_units), *((num_units, dim),) * 2
  return [jax.ShapeDtypeStruct(size, dtype) for size in sizes]


def real(name, num_tokens):
  shape = SHAPES[name]
  return arrays((num_tokens,), shape.dim, shape.num_units, jnp.bfloat16)


def check_assembly(text):
  """Bulk copies, wide reads, and nothing pushed out of the registers."""
  assert "cp.async.bulk.tensor" in text
  assert "fma.rn.f32" in text
  assert "0 bytes spill stores, 0 bytes spill loads" in text
  assert text.count("spill stores") == text.count("0 bytes spill stores")


@pytest.mark.parametrize(
  "name, num_tokens",
  [
    ("llama_7b", 1),
    ("mistral_7b", 8),
    pytest.param("llama_7b", 2, marks=pytest.mark.slow),
    pytest.param("llama_7b", 3, marks=pytest.mark.slow),
  ],
)
def test_public_function_compiles(name, num_tokens, h100s, capfd):
  given = real(name, num_tokens)
  report = topologies.compile_for(named, given, devices=h100s[:1])
  assert "mosaic_gpu" in report.text
  text = "".join(capfd.readouterr())
  check_assembly(text)
  assert "ld.shared.v4" in text
  # Totals of 132 blocks; no weight is laid out anew, one has 90 MB.
  padded = 1 << (num_tokens - 1).bit_length()
  totals = 4 * 132 * padded * SHAPES[name].dim
  assert report.temp_bytes < totals + (1 << 20)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 2, 4, 8])
@pytest.mark.parametrize("dim", [128, 896, 1536, 4096, 5120, 8064, 8192])
def test_kernel_compiles(dim, num_tokens, dtype, h100s, capfd):
  x, gate, *weights = arrays((num_tokens,), dim, 1001, dtype)
  if pallas_gpu.unsupported(x, weights[0]) is not None:
    pytest.skip("too many tokens for the width")
  index = jax.ShapeDtypeStruct((1001,), jnp.int32)
  count = jax.ShapeDtypeStruct((), jnp.int32)
  topologies.compile_for(
    pallas_gpu.gated_rows_forward,
    (x, gate, *weights, index, count),
    devices=h100s[:1],
  )
  check_assembly("".join(capfd.readouterr()))


def test_a_mesh_of_hopper_gpus_chooses_it(h100s):
  """Tokens may be sharded: each device has up to eight."""
  mesh = jax.sharding.Mesh(
    np.array(h100s[:2]),
    ("data",),
    axis_types=(jax.sharding.AxisType.Explicit,),
  )
  places = [jax.NamedSharding(mesh, jax.P("data"))] * 2
  places += [jax.NamedSharding(mesh, jax.P())] * 2
  given = [
    jax.ShapeDtypeStruct(y.shape, y.dtype, sharding=place)
    for y, place in zip(
      arrays((2, 1), 256, 1000, jnp.bfloat16), places, strict=True
    )
  ]
  with jax.set_mesh(mesh):
    report = topologies.compile_for(gated_rows, given, devices=h100s)
  assert "mosaic_gpu" in report.text
  # What GPU it is nobody said.
  given = arrays((1,), 256, 1000, jnp.bfloat16)
  report = topologies.compile_for(gated_rows, given, devices=h100s[:1])
  assert "mosaic_gpu" not in report.text


def test_units_of_each_device_inside_shard_map(h100s):
  mesh = jax.sharding.Mesh(
    np.array(h100s), ("model",), axis_types=(jax.sharding.AxisType.Auto,)
  )

  def local(*given):
    found = named(*given)
    return jax.lax.psum((found.output, found.active), "model")

  specs = (jax.P(), jax.P(None, "model"), jax.P("model"), jax.P("model"))
  mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=jax.P())
  given = [
    jax.ShapeDtypeStruct(
      y.shape, y.dtype, sharding=jax.NamedSharding(mesh, spec)
    )
    for y, spec in zip(
      arrays((1,), 256, 1000, jnp.bfloat16), specs, strict=True
    )
  ]
  report = topologies.compile_for(mapped, given, devices=h100s)
  assert "mosaic_gpu" in report.text


@pytest.mark.parametrize("axes", [(0, 0, None, None), 0], ids=str)
def test_compiles_under_vmap(axes, h100s):
  given = [
    jax.ShapeDtypeStruct((3, *y.shape), y.dtype) if i < 2 or axes == 0 else y
    for i, y in enumerate(arrays((1,), 256, 1000, jnp.bfloat16))
  ]
  report = topologies.compile_for(
    jax.vmap(named, axes), given, devices=h100s[:1]
  )
  assert "mosaic_gpu" in report.text

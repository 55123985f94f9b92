"""The Hopper kernel of nearest-code search, compiled for an H100 not there.

Runs in a process of its own, with the `aot` extra installed:

    pytest -m compile_gpu tests/kernels/nearest_code_compile_gpu_test.py
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.kernels.nearest_code import (
  nearest_code,
  pallas_gpu,
  sharded_nearest_code,
)
from tokjax.kernels.nearest_code.shapes import SHAPES
from tokjax.parallel import topologies

pytestmark = pytest.mark.compile_gpu


def check_assembly(text, codes=128):
  """Tensor cores, bulk copies, and nothing pushed out of the registers."""
  product = f"wgmma.mma_async.sync.aligned.m64n{codes}k16.f32.bf16.bf16"
  assert product in text
  assert "cp.async.bulk.tensor" in text
  assert "0 bytes spill stores, 0 bytes spill loads" in text
  assert text.count("spill stores") == text.count("0 bytes spill stores")


# A width sets the kernel, the number of codes its grid. Copies of whole tiles,
# of parts and of slabs, and the narrowest swizzle; most are slow together.
_QUICK = ((8, 16_384), (256, 16_384))
_SIZES = [
  pytest.param(*size, marks=() if size in _QUICK else pytest.mark.slow)
  for size in itertools.product(
    (8, 32, 64, 128, 192, 240, 256), (16_384, 262_144)
  )
]


@pytest.mark.parametrize("dim, num_codes", _SIZES)
def test_compiles(dim, num_codes, h100s, capfd):
  num_tokens = 4096
  arrays = (
    jax.ShapeDtypeStruct((num_tokens, dim), jnp.float32),
    jax.ShapeDtypeStruct((num_codes, dim), jnp.float32),
    jax.ShapeDtypeStruct((num_codes,), jnp.float32),
  )
  assert pallas_gpu.unsupported(*arrays[:2]) is None
  report = topologies.compile_for(pallas_gpu.nearest, arrays, devices=h100s)
  assert "mosaic_gpu" in report.text
  # The bfloat16 parts, widths padded to 16; never a score of every code.
  width = -(-dim // 16) * 16
  assert report.temp_bytes < 7 * width * (num_tokens + num_codes)
  check_assembly("".join(capfd.readouterr()))


@pytest.mark.slow
@pytest.mark.parametrize("codes", [32, 64, 96])
def test_compiles_with_smaller_tiles(codes, h100s, capfd):
  arrays = (
    jax.ShapeDtypeStruct((1000, 32), jnp.float32),
    jax.ShapeDtypeStruct((3000, 32), jnp.float32),
  )

  def search(x, codebook):
    return nearest_code(
      x, codebook, block_size=codes, implementation="pallas_gpu"
    )

  report = topologies.compile_for(search, arrays, devices=h100s)
  assert "mosaic_gpu" in report.text
  check_assembly("".join(capfd.readouterr()), codes)


def test_a_mesh_of_h100_takes_the_kernel(h100s):
  """Tokens and codes sharded; the mesh says what its devices are."""
  mesh = jax.sharding.Mesh(
    np.array(h100s).reshape(2, 2),
    ("data", "model"),
    axis_types=(jax.sharding.AxisType.Explicit,) * 2,
  )

  def placed(shape, *spec):
    sharding = jax.NamedSharding(mesh, jax.P(*spec))
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

  arrays = placed((64, 256, 8), "data"), placed((16_384, 8), "model")
  with jax.set_mesh(mesh):
    report = topologies.compile_for(nearest_code, arrays, devices=h100s)
  assert "mosaic_gpu" in report.text
  # A score and an index of each token travel.
  assert set(report.collectives) == {"all-gather"}


def test_compiles_inside_shard_map(h100s):
  kinds = (jax.sharding.AxisType.Auto,)
  mesh = jax.sharding.Mesh(np.array(h100s), ("model",), axis_types=kinds)

  def place(shape, *spec):
    sharding = jax.NamedSharding(mesh, jax.P(*spec))
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

  mapped = jax.shard_map(
    functools.partial(
      sharded_nearest_code, axis_name="model", implementation="pallas_gpu"
    ),
    mesh=mesh,
    in_specs=(jax.P(), jax.P("model")),
    out_specs=jax.P(),
  )
  arrays = place((500, 32)), place((4096, 32), "model")
  report = topologies.compile_for(mapped, arrays, devices=h100s)
  assert "mosaic_gpu" in report.text


def test_the_public_function_takes_what_it_is_told(h100s):
  shape = SHAPES["vqgan"]
  x = jax.ShapeDtypeStruct((shape.num_tokens, shape.dim), jnp.bfloat16)
  codebook = jax.ShapeDtypeStruct((shape.num_codes, shape.dim), jnp.float32)
  mask = jax.ShapeDtypeStruct(x.shape[:1], bool)

  def search(x, codebook, mask):
    return nearest_code(
      x, codebook, mask, metric="cosine", implementation="pallas_gpu"
    )

  report = topologies.compile_for(search, (x, codebook, mask), devices=h100s)
  assert "mosaic_gpu" in report.text


def test_compiles_under_vmap(h100s):
  arrays = (
    jax.ShapeDtypeStruct((3, 500, 16), jnp.float32),
    jax.ShapeDtypeStruct((3, 1000, 16), jnp.float32),
    jax.ShapeDtypeStruct((3, 1000), jnp.float32),
  )
  report = topologies.compile_for(
    jax.vmap(pallas_gpu.nearest), arrays, devices=h100s
  )
  assert "mosaic_gpu" in report.text

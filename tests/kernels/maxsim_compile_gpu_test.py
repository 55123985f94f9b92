"""The Hopper kernels of MaxSim, compiled for an H100 that is not there.

Runs in a process of its own, with the `aot` extra installed:

    pytest -m compile_gpu tests/kernels/maxsim_compile_gpu_test.py

Every shape in every width takes minutes; `-m "compile_gpu and not slow"` tries
each shape in one of the widths.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.kernels.maxsim import pallas_gpu
from tokjax.kernels.maxsim.shapes import DIMS, SHAPES

pytestmark = pytest.mark.compile_gpu


def _arguments(shape, dim, dtype):
  queries = (shape.num_queries, shape.query_tokens)
  documents = (shape.num_documents, shape.document_tokens)
  return (
    jax.ShapeDtypeStruct((*queries, dim), dtype),
    jax.ShapeDtypeStruct((*documents, dim), dtype),
    jax.ShapeDtypeStruct(queries, jnp.bool_),
    jax.ShapeDtypeStruct(documents, jnp.bool_),
  )


# A shape sets the grid, a width the kernel: each is tried, all pairs if slow.
_SIZES = [
  pytest.param(name, dim, marks=() if i % len(DIMS) == j else pytest.mark.slow)
  for i, name in enumerate(SHAPES)
  for j, dim in enumerate(DIMS)
]


def _compile(function, arguments, h100s) -> str:
  """The optimised program's text."""
  alone = jax.sharding.SingleDeviceSharding(h100s[0])
  placed = [
    jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or alone)
    for x in arguments
  ]
  return jax.jit(function).lower(*placed).compile().as_text()


def _check_assembly(text, dtype):
  """Tensor cores, bulk copies, and nothing pushed out of the registers."""
  kind = "f32.tf32.tf32" if dtype == jnp.float32 else "f32.bf16.bf16"
  assert "wgmma.mma_async.sync.aligned.m64" in text
  assert kind in text
  assert "cp.async.bulk.tensor" in text
  assert "0 bytes spill stores, 0 bytes spill loads" in text


@pytest.mark.parametrize("return_index", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name, dim", _SIZES)
def test_forward_compiles(name, dim, dtype, return_index, h100s, capfd):
  arguments = _arguments(SHAPES[name], dim, dtype)
  assert pallas_gpu.unsupported(*arguments[:2]) is None

  def forward(*given):
    return pallas_gpu.maxsim_forward(*given, return_index=return_index)

  assert "mosaic_gpu" in _compile(forward, arguments, h100s)
  _check_assembly("".join(capfd.readouterr()), dtype)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name, dim", _SIZES)
def test_backward_compiles(name, dim, dtype, h100s, capfd):
  shape = SHAPES[name]
  pairs = (shape.num_queries, shape.num_documents)
  arguments = (
    jax.ShapeDtypeStruct(pairs, jnp.float32),
    *_arguments(shape, dim, dtype),
    jax.ShapeDtypeStruct((*pairs, shape.query_tokens), jnp.int32),
  )
  text = _compile(pallas_gpu.maxsim_backward, arguments, h100s)
  assert "mosaic_gpu" in text
  # float32 too: the backward splits its operands in bfloat16 parts.
  _check_assembly("".join(capfd.readouterr()), jnp.bfloat16)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_compiles_inside_shard_map(kind, h100s):
  kinds = (getattr(jax.sharding.AxisType, kind),)
  mesh = jax.sharding.Mesh(np.array(h100s), ("data",), axis_types=kinds)

  def place(x, spec):
    sharding = jax.NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  whole, split = jax.P(), jax.P("data")
  specs = (whole, split, whole, split)
  arguments = _arguments(SHAPES["batch"], 128, jnp.bfloat16)

  def score_and_differentiate(*given):
    scores, index = pallas_gpu.maxsim_forward(*given, return_index=True)
    gradients = pallas_gpu.maxsim_backward(scores, *given, index)
    return scores, jax.lax.psum(gradients[0], "data"), gradients[1]

  mapped = jax.shard_map(
    score_and_differentiate,
    mesh=mesh,
    in_specs=specs,
    out_specs=(jax.P(None, "data"), whole, split),
  )
  placed = list(map(place, arguments, specs))
  text = _compile(mapped, placed, h100s)
  assert "maxsim_forward" in text
  assert "maxsim_backward_documents" in text


def test_compiles_under_vmap(h100s):
  arguments = [
    jax.ShapeDtypeStruct((3, *x.shape), x.dtype)
    for x in _arguments(SHAPES["rerank"], 128, jnp.bfloat16)
  ]
  mapped = jax.vmap(
    lambda *given: pallas_gpu.maxsim_forward(*given, return_index=False)
  )
  assert "mosaic_gpu" in _compile(mapped, arguments, h100s)

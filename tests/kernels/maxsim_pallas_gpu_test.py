"""The Hopper kernel of MaxSim against the reference.

Without a GPU the Mosaic GPU interpreter runs the program: threads, barriers,
copies and products are simulated on CPU, registers, swizzles and timing are
not. The tests marked `gpu` run the same cases on the device.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.kernels.maxsim import (
  gpu_block_sizes,
  pallas_gpu,
  pallas_gpu_backward,
  reference,
)
from tokjax.kernels.maxsim.shapes import DIMS, SHAPES


def _case(seed, num_queries, num_documents, query_tokens, tokens, width, dtype):
  rng = np.random.default_rng(seed)
  queries = rng.normal(size=(num_queries, query_tokens, width))
  documents = rng.normal(size=(num_documents, tokens, width))
  query_mask = rng.random((num_queries, query_tokens)) < 0.8
  document_mask = rng.random((num_documents, tokens)) < 0.8
  document_mask[num_documents // 2] = False
  queries[~query_mask] = np.nan
  documents[~document_mask] = np.nan
  return (
    jnp.asarray(queries, dtype),
    jnp.asarray(documents, dtype),
    jnp.asarray(query_mask),
    jnp.asarray(document_mask),
  )


# Nq, Nd, Q, N, D, then the sizes: rows, tokens, stages, shared and
# multiprocessors. Two blocks or more wherever there is work for them.
CASES = {
  # Rings of their own; odd documents, so that the last one is done twice.
  "one query": ((1, 3, 5, 20, 32), (64, 16, 2, False, 1)),
  # Two queries in a row tile; a document shorter than a tile.
  "short document": ((2, 5, 30, 13, 48), (64, 16, 2, False, 2)),
  # One ring for both; the last query block is partly padding.
  "shared tiles": ((9, 2, 16, 20, 64), (64, 8, 2, True, 2)),
  # A query over two row tiles.
  "long query": ((1, 3, 70, 9, 96), (64, 16, 3, True, 4)),
  # Two slabs, 128 rows per warpgroup, idle ones among them.
  "tall tiles": ((3, 2, 64, 24, 128), (128, 16, 2, True, 1)),
}
FLOAT32_CASES = {
  "float32": ((1, 3, 8, 40, 32), (64, 32, 1, False, 1)),
  "float32 slabs": ((2, 2, 40, 70, 48), (64, 32, 2, False, 2)),
}


def _check(case, dtype, return_index, interpret=False):
  sizes, blocks = (CASES | FLOAT32_CASES)[case]
  given = _case(0, *sizes, dtype)
  got = pallas_gpu.maxsim_forward(
    *given,
    return_index=return_index,
    block_sizes=pallas_gpu.BlockSizes(*blocks),
    interpret=interpret,
  )
  want = reference.maxsim_forward(*given, return_index=True)
  scores = got[0] if return_index else got
  tolerance = 2e-5 if dtype == jnp.float32 else 1e-5
  np.testing.assert_allclose(scores, want[0], rtol=tolerance, atol=1e-4)
  if return_index:
    mask = np.asarray(given[2])[:, None, :]
    np.testing.assert_array_equal(
      np.where(mask, got[1], 0), np.where(mask, want[1], 0)
    )
    assert got[1].dtype == jnp.int32


@pytest.mark.parametrize("case", ["one query", "shared tiles"])
def test_bfloat16_equals_the_reference(case, interpreter):
  _check(case, jnp.bfloat16, True, interpreter)


def test_float32_equals_the_reference(interpreter):
  _check("float32", jnp.float32, True, interpreter)


@pytest.mark.slow
@pytest.mark.parametrize("return_index", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_every_bfloat16_case_equals_the_reference(
  case, return_index, interpreter
):
  _check(case, jnp.bfloat16, return_index, interpreter)


@pytest.mark.slow
@pytest.mark.parametrize("return_index", [False, True])
@pytest.mark.parametrize("case", FLOAT32_CASES)
def test_every_float32_case_equals_the_reference(
  case, return_index, interpreter
):
  _check(case, jnp.float32, return_index, interpreter)


def _check_backward(dtype, interpret=False):
  given = _case(1, 3, 2, 30, 70, 32, dtype)
  _, index = reference.maxsim_forward(*given, return_index=True)
  g = jnp.asarray(np.random.default_rng(2).normal(size=(3, 2)), jnp.float32)
  got = pallas_gpu_backward.maxsim_backward(
    g, *given, index, interpret=interpret
  )
  want = reference.maxsim_backward(g, *given, index)
  # bfloat16 results may round to either neighbour.
  tolerance = 1e-6 if dtype == jnp.float32 else 2**-7
  for ours, theirs in zip(got, want, strict=True):
    assert ours.dtype == dtype
    np.testing.assert_allclose(
      np.asarray(ours, np.float32),
      np.asarray(theirs, np.float32),
      rtol=tolerance,
      atol=1e-5,
    )


@pytest.mark.parametrize(
  "dtype",
  [pytest.param(jnp.bfloat16, marks=pytest.mark.slow), jnp.float32],
)
def test_backward_equals_the_reference(dtype, interpreter):
  _check_backward(dtype, interpreter)


def test_high_part_fits_tf32_and_nothing_is_lost():
  x = jnp.asarray(np.random.default_rng(0).normal(size=1000), jnp.float32)
  high, low = pallas_gpu._split(x)
  mantissa = np.asarray(high).view(np.uint32) & ((1 << 13) - 1)
  assert not mantissa.any()  # tf32 drops the last 13 bits
  np.testing.assert_array_equal(np.float64(high) + np.float64(low), x)
  assert np.all(np.abs(low) <= np.abs(x) * 2.0**-10)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("dim", [16, *DIMS])
@pytest.mark.parametrize("name", SHAPES)
def test_default_sizes_fit_and_cover(name, dim, itemsize):
  shape = SHAPES[name]
  for return_index in (False, True):
    sizes = gpu_block_sizes.default_block_sizes(
      shape.num_queries,
      shape.query_tokens,
      shape.document_tokens,
      dim,
      itemsize=itemsize,
      return_index=return_index,
    )
    assert sizes.smem_bytes(dim, itemsize) <= gpu_block_sizes.SMEM_BYTES
    assert sizes.stages > 1  # copies overlap products
    assert not (itemsize == 4 and sizes.shared)
    rows = shape.num_queries * gpu_block_sizes.padded_query(shape.query_tokens)
    num_blocks = -(-rows // sizes.block_rows)
    blocks = gpu_block_sizes.walking_blocks(
      num_blocks, shape.num_documents, sizes
    )
    walkers = blocks * sizes.rings
    steps = -(-shape.num_documents // walkers)
    assert 1 <= blocks <= sizes.multiprocessors
    assert walkers * (steps - 1) < shape.num_documents <= walkers * steps


@pytest.mark.parametrize("tokens", [*range(8, 40), 100, 180, 257, 300])
def test_no_tile_is_longer_than_its_document(tokens):
  sizes = gpu_block_sizes.default_block_sizes(1, 32, tokens, 128)
  assert sizes.tokens <= tokens


def test_unsupported_names_the_reason():
  def reason(width, dtype, other=None):
    queries = jax.ShapeDtypeStruct((1, 4, width), dtype)
    documents = jax.ShapeDtypeStruct((2, 4, width), other or dtype)
    return pallas_gpu.unsupported(queries, documents)

  assert reason(128, jnp.bfloat16) is None
  assert reason(128, jnp.float32) is None
  assert "multiple of 16, got 100" in reason(100, jnp.bfloat16)
  assert "at most 128 in float32, got 256" in reason(256, jnp.float32)
  assert "got float16" in reason(64, jnp.float16)
  assert "must agree" in reason(64, jnp.bfloat16, jnp.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, *FLOAT32_CASES])
def test_device_equals_the_reference(case):
  dtype = jnp.float32 if case in FLOAT32_CASES else jnp.bfloat16
  _check(case, dtype, True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
  "num_queries, query_tokens", [(1, 32), (8, 32), (1, 300)]
)
def test_device_with_default_sizes(num_queries, query_tokens, dtype):
  given = _case(3, num_queries, 300, query_tokens, 300, 128, dtype)
  got = pallas_gpu.maxsim_forward(*given, return_index=False)
  want = reference.maxsim_forward(*given, return_index=False)
  np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_device_backward_equals_the_reference(dtype):
  _check_backward(dtype)

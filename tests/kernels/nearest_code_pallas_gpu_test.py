"""The Hopper kernel of nearest-code search against the reference.

Without a GPU the Mosaic GPU interpreter runs the program: threads, barriers,
copies and products are simulated on CPU, registers, swizzles and timing are
not. The tests marked `gpu` run the same cases on the device.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.nearest_code_pallas_tpu_test import whole_numbers
from tests.kernels.nearest_code_test import example, oracle
from tokjax.kernels.nearest_code import (
  METRICS,
  gpu_block_sizes,
  pallas_gpu,
  reference,
  search,
)
from tokjax.kernels.nearest_code.gpu_block_sizes import BlockSizes
from tokjax.kernels.nearest_code.shapes import SHAPES

plain = jax.jit(reference.nearest)

# n, K, D, then the sizes: codes, slab, span, stages and splits.
CASES = {
  # Seven tiles, each in one copy; the last tiles of both are not full.
  "whole tiles": ((70, 200, 5), (32, 16, 48, 2, 1)),
  # One part of the codes in a copy; a slot is used again within a tile.
  "parts": ((9, 90, 20), (32, 32, 32, 2, 1)),
  # Slabs of parts; two slices of columns in a tile.
  "slabs": ((9, 130, 40), (64, 16, 16, 3, 1)),
  # Two tiles of tokens, and three blocks for each: the last meets its last
  # tile twice.
  "splits": ((140, 300, 8), (64, 16, 48, 3, 3)),
  "one of each": ((1, 1, 1), (32, 16, 48, 2, 1)),
}


def check(name, interpret=False):
  sizes, blocks = CASES[name]
  arrays = whole_numbers(0, *sizes)
  index, score = search_with(BlockSizes(*blocks), interpret)(*arrays)
  want_index, want_score = plain(*arrays)
  assert index.dtype == jnp.int32 and score.dtype == jnp.float32
  np.testing.assert_array_equal(index, want_index)
  np.testing.assert_array_equal(score, want_score)


def search_with(sizes, interpret):
  return jax.jit(
    functools.partial(
      pallas_gpu.nearest, block_sizes=sizes, interpret=interpret
    )
  )


def check_accuracy(interpret=False):
  random = np.random.default_rng(1)
  x, codes = random.normal(size=(2, 50, 24)).astype(np.float32)
  offset = random.normal(size=50).astype(np.float32)
  sizes = BlockSizes(32, 32, 32, 3)
  _, score = search_with(sizes, interpret)(x, codes, offset)
  want = np.float64(x) @ np.float64(codes).T - offset
  # Maxima differ by no more than what they are of. Without the smallest of
  # the six products it would be 2^-20 and more.
  lengths = (np.linalg.norm(a, axis=1) for a in (x, codes))
  error = np.abs(score - want.max(axis=1))
  assert np.max(error) < 2.0**-22 * np.multiply.outer(*lengths).max()


def check_never_chosen(interpret=False):
  nearest = search_with(BlockSizes(32, 16, 48, 2, 2), interpret)
  x, codes, offset = whole_numbers(2, 20, 100, 4)
  never = np.where(np.arange(100) % 2, offset, np.inf).astype(np.float32)
  want = np.array(plain(x, codes, never)[0])
  x[3], want[3] = np.nan, 0
  index, score = nearest(x, codes, never)
  np.testing.assert_array_equal(index, want)
  assert np.isneginf(score[3]) and np.isfinite(np.delete(score, 3)).all()
  index, score = nearest(x, codes, np.full_like(offset, np.inf))
  assert not np.any(index) and np.isneginf(score).all()


def check_search(metric, dtype):
  """All of the search but the choice: masks, broken codes, dtypes."""
  x, codebook = (jnp.asarray(a, dtype) for a in example(3, 30, 40, 8))
  mask = np.arange(30) % 3 > 0
  want, clear = oracle(x, codebook, metric)
  assert clear.mean() > 0.9
  x = jnp.where(mask[:, None], x, jnp.nan).reshape(5, 6, 8)
  broken = jnp.concatenate([codebook, codebook[:2]]).at[40:, 3].set(jnp.nan)
  nearest = functools.partial(
    search.nearest, metric=metric, block_size=32, implementation="pallas_gpu"
  )
  got = jax.jit(nearest)(x, broken, mask.reshape(5, 6))
  assert got.dtype == jnp.int32 and got.shape == (5, 6)
  got, want = got.reshape(-1), np.where(mask, want, -1)
  np.testing.assert_array_equal(got[clear | ~mask], want[clear | ~mask])


@pytest.mark.parametrize("name", ["whole tiles", "splits"])
def test_is_the_reference(name, interpreter):
  check(name, interpreter)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_case_is_the_reference(name, interpreter):
  check(name, interpreter)


def test_scores_are_those_of_float32(interpreter):
  check_accuracy(interpreter)


def test_codes_that_must_not_be_chosen(interpreter):
  check_never_chosen(interpreter)


@pytest.mark.parametrize(
  "metric, dtype", list(zip(METRICS, (jnp.float32, jnp.bfloat16), strict=True))
)
def test_search_takes_the_kernel(metric, dtype, interpreter, monkeypatch):
  interpreted = functools.partial(pallas_gpu.nearest, interpret=interpreter)
  monkeypatch.setattr(pallas_gpu, "nearest", interpreted)
  check_search(metric, dtype)


@pytest.mark.parametrize("name", SHAPES)
def test_default_sizes_fit_and_cover(name):
  shape = SHAPES[name]
  for num_tokens in (1, shape.num_tokens):
    sizes = gpu_block_sizes.default_block_sizes(
      num_tokens, shape.num_codes, shape.dim
    )
    num_tiles = -(-shape.num_codes // sizes.codes)
    tiles = -(-num_tiles // sizes.splits)
    # No block is without tiles of its own.
    assert (sizes.splits - 1) * tiles < num_tiles <= sizes.splits * tiles
    num_blocks = -(-num_tokens // sizes.tokens) * sizes.splits
    assert num_blocks > 132 / 2 or tiles == 1  # the chip is in use


@pytest.mark.parametrize("dim", range(1, gpu_block_sizes.MAX_WIDTH + 1, 5))
def test_copies_fit_and_divide(dim):
  sizes = gpu_block_sizes.default_block_sizes(1000, 1000, dim)
  width = gpu_block_sizes.padded_width(dim)
  assert width % 16 == 0 and 0 <= width - dim < 16
  assert sizes.smem_bytes(width) <= gpu_block_sizes.SMEM_BYTES
  assert sizes.stages > 2  # copies overlap products
  assert sizes.span in (gpu_block_sizes.PARTS * width, width, sizes.slab)
  assert width % sizes.slab == 0


def test_unsupported_names_the_reason():
  def reason(x, codes, block_size=None):
    x, codes = (jax.ShapeDtypeStruct(s, "float32") for s in (x, codes))
    return pallas_gpu.unsupported(x, codes, block_size)

  for shape in SHAPES.values():
    x, codes = (shape.num_tokens, shape.dim), (shape.num_codes, shape.dim)
    assert reason(x, codes) is reason(x, codes, 96) is None
  assert "empty" in reason((0, 8), (16, 8))
  assert "width 257" in reason((8, 257), (16, 257))
  assert "multiple of 32" in reason((8, 8), (16, 8), 100)
  assert "multiple of 32" in reason((8, 8), (16, 8), 160)
  with pytest.raises(ValueError, match="slab"):
    BlockSizes(32, 24, 48, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_device_is_the_reference(name):
  check(name)


@pytest.mark.gpu
def test_device_scores_are_those_of_float32():
  check_accuracy()


@pytest.mark.gpu
def test_device_codes_that_must_not_be_chosen():
  check_never_chosen()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("metric", METRICS)
def test_device_search_takes_the_kernel(metric, dtype):
  check_search(metric, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [8, 32, 64, 256])
def test_device_with_default_sizes(dim):
  arrays = whole_numbers(dim, 1000, 5000, dim)
  got, want = pallas_gpu.nearest(*arrays), plain(*arrays)
  np.testing.assert_array_equal(got[0], want[0])
  np.testing.assert_array_equal(got[1], want[1])

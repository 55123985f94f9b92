"""The TPU kernel of nearest-code search, in interpret mode on CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.kernels.nearest_code import pallas_tpu, reference
from tokjax.kernels.nearest_code.shapes import SHAPES

nearest = jax.jit(
  functools.partial(pallas_tpu.nearest, interpret=True),
  static_argnames="block_size",
)
plain = jax.jit(reference.nearest)


def whole_numbers(seed, num_tokens, num_codes, dim):
  """Small integers: scores are exact, and there are many ties."""
  random = np.random.default_rng(seed)
  x = random.integers(-2, 3, (num_tokens, dim)).astype(np.float32)
  codes = random.integers(-2, 3, (num_codes, dim)).astype(np.float32)
  offset = np.square(codes).sum(axis=1) / 2
  return x, codes, np.float32(offset)


def check(arrays, block_size=None):
  index, score = nearest(*arrays, block_size=block_size)
  want_index, want_score = plain(*arrays)
  assert index.dtype == jnp.int32 and score.dtype == jnp.float32
  np.testing.assert_array_equal(index, want_index)
  np.testing.assert_array_equal(score, want_score)


@pytest.mark.parametrize(
  "sizes",
  [
    (1, 1, 8),
    (20, 100, 3),  # both smaller than a tile
    (300, 1500, 5),  # the last tiles of both are not full
    (1100, 256, 12),  # two tiles of tokens
  ],
  ids=str,
)
def test_equals_the_reference(sizes):
  check(whole_numbers(0, *sizes))


def test_block_size_changes_nothing():
  arrays = whole_numbers(1, 40, 700, 4)
  for block_size in (128, 384, 1024):
    check(arrays, block_size)


def test_codes_that_must_not_be_chosen():
  x, codes, offset = whole_numbers(2, 40, 300, 4)
  never = np.where(np.arange(300) % 2, offset, np.inf).astype(np.float32)
  check((x, codes, never))
  # Nothing to choose, and a token that holds NaN.
  index, score = nearest(x, codes, np.full_like(offset, np.inf))
  assert not np.any(index) and np.isneginf(score).all()
  want = np.array(plain(x, codes, offset)[0])
  x[3], want[3] = np.nan, 0
  index, score = nearest(x, codes, offset)
  np.testing.assert_array_equal(index, want)
  assert np.isneginf(score[3])


def test_vmap_equals_one_by_one():
  two = [whole_numbers(seed, 30, 300, 4) for seed in (3, 4)]
  stacked = [np.stack(pair) for pair in zip(*two, strict=True)]
  index, _ = jax.vmap(nearest)(*stacked)
  for i, arrays in enumerate(two):
    np.testing.assert_array_equal(index[i], plain(*arrays)[0])


def test_inside_shard_map():
  mesh = jax.make_mesh((8,), ("data",))
  arrays = whole_numbers(5, 80, 300, 4)
  spec = jax.P("data")
  mapped = jax.shard_map(
    nearest,
    mesh=mesh,
    in_specs=(spec, jax.P(), jax.P()),
    out_specs=spec,
    check_vma=False,  # the interpreter's own loops lose track
  )
  placed = [
    jax.device_put(a, jax.NamedSharding(mesh, p))
    for a, p in zip(arrays, (spec, jax.P(), jax.P()), strict=True)
  ]
  index, _ = jax.jit(mapped)(*placed)
  np.testing.assert_array_equal(index, plain(*arrays)[0])


def test_unsupported_names_the_reason():
  def reason(x, codes, block_size=None):
    x, codes = (jax.ShapeDtypeStruct(s, "float32") for s in (x, codes))
    return pallas_tpu.unsupported(x, codes, block_size)

  for shape in SHAPES.values():
    x, codes = (shape.num_tokens, shape.dim), (shape.num_codes, shape.dim)
    assert reason(x, codes) is reason(x, codes, 256) is None
  assert "empty" in reason((0, 8), (16, 8))
  assert "width 2048" in reason((8, 2048), (16, 2048))
  assert "multiple of 128" in reason((8, 8), (16, 8), 100)
  assert "multiple of 128" in reason((8, 8), (16, 8), 8192)

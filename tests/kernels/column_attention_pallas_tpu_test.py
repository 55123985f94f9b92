"""The TPU kernels of column attention, in interpret mode on CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels import column_attention_test
from tokjax.kernels.column_attention import (
  api,
  block_sizes,
  pallas_tpu,
  reference,
)
from tokjax.kernels.column_attention.shapes import SHAPES

BlockSizes = block_sizes.BlockSizes
forward = jax.jit(
  pallas_tpu.column_attention_forward,
  static_argnames=("scale", "causal", "block_sizes", "interpret"),
)

# H, Hk, R, S, d, segments, causal, tile sizes. Every axis has an edge tile.
CASES = {
  "one tile": (2, 2, 9, 13, 8, 0, False, None),
  "edges": (2, 1, 150, 40, 32, 0, False, BlockSizes(128, 16)),
  "causal": (2, 2, 300, 300, 16, 0, True, BlockSizes(128, 128)),
  "causal, more keys": (1, 1, 140, 300, 16, 0, True, BlockSizes(128, 48)),
  "causal, more rows": (1, 1, 300, 70, 16, 0, True, BlockSizes(128, 16)),
  "windows": (4, 2, 150, 150, 16, 3, False, BlockSizes(128, 48)),
}


def arrays(case, dtype=jnp.float32, seed=0):
  *sizes, segments, causal, blocks = CASES[case]
  q, k, mask, weight, ids = column_attention_test.case(
    seed, 3, *sizes, segments
  )
  q, k = jnp.asarray(q, dtype), jnp.asarray(k, dtype)
  row_ids, key_ids = api._ids(
    q,
    k,
    jnp.asarray(mask),
    jnp.asarray(weight),
    None if ids is None else jnp.asarray(ids),
  )
  return (q, k, row_ids, key_ids, jnp.asarray(weight)), causal, blocks


def check(got, want, weight):
  live = np.asarray(weight) != 0
  np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-5)
  for ours, theirs in zip(got[1:], want[1:], strict=True):
    np.testing.assert_allclose(
      np.asarray(ours)[live], np.asarray(theirs)[live], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_is_the_reference(case, dtype):
  given, causal, blocks = arrays(case, dtype)
  settings = dict(scale=0.3, causal=causal)
  want = reference.column_attention_forward(*given, **settings)
  got = forward(*given, **settings, block_sizes=blocks, interpret=True)
  check(got, want, given[4])


@pytest.mark.parametrize("case", ["edges", "causal, more rows", "windows"])
def test_known_normalizers_save_a_pass(case):
  given, causal, blocks = arrays(case)
  settings = dict(scale=0.3, causal=causal)
  want = reference.column_attention_forward(*given, **settings)
  top = jnp.where(want[2] > 0, want[1] + jnp.log(want[2]), 0)
  settings |= dict(block_sizes=blocks)
  got = forward(*given, (top, want[2]), **settings, interpret=True)
  check(got, want, given[4])
  traced = forward.trace(*given, (top, want[2]), **settings)
  program = traced.lower(lowering_platforms=("tpu",)).as_text()
  assert "column_attention_columns" in program
  assert "column_attention_rows" not in program


def test_without_ids_or_padding():
  # 128 rows, 32 keys: whole tiles, so that no ids are compared.
  q = jax.random.normal(jax.random.key(0), (2, 2, 256, 16))
  k = jax.random.normal(jax.random.key(1), (2, 1, 32, 16))
  weight = jnp.full(q.shape[:3], 1 / 256)
  given, settings = (q, k, None, None, weight), dict(scale=0.25, causal=False)
  want = reference.column_attention_forward(*given, **settings)
  got = forward(
    *given, **settings, block_sizes=BlockSizes(128, 16), interpret=True
  )
  check(got, want, weight)


def test_vmap_equals_one_by_one():
  given, causal, blocks = arrays("edges")

  def one(*given):
    return pallas_tpu.column_attention_forward(
      *given, scale=0.3, causal=causal, block_sizes=blocks, interpret=True
    )

  stacked = [jnp.stack([x, jnp.flip(x, axis=0)]) for x in given]
  got = jax.jit(jax.vmap(one))(*stacked)
  for i in range(2):
    want = jax.jit(one)(*[x[i] for x in stacked])
    check([x[i] for x in got], want, stacked[4][i])


@pytest.mark.parametrize("name", SHAPES)
def test_default_sizes_cover_and_fit(name):
  num_tokens = SHAPES[name].num_tokens
  sizes = block_sizes.default_block_sizes(num_tokens, num_tokens)
  for size, multiple in ((sizes.rows, 128), (sizes.keys, 16)):
    parts = -(-num_tokens // size)
    assert size % multiple == 0
    assert parts * size < num_tokens + parts * multiple
  # Scores, their masked copy and the exponentials, in float32.
  assert 12 * sizes.rows * sizes.keys <= 8 << 20


@pytest.mark.parametrize(
  "sizes, name", [((64, 16), "rows"), ((192, 16), "rows"), ((128, 24), "keys")]
)
def test_block_sizes_name_what_is_wrong(sizes, name):
  with pytest.raises(ValueError, match=name):
    BlockSizes(*sizes)


@pytest.mark.parametrize(
  "shape, dtype, reason",
  [
    ((1, 2, 8, 64), "float16", "float16"),
    ((1, 2, 0, 64), "float32", "empty"),
    ((1, 2, 8, 2048), "float32", "width 2048"),
    ((1, 2, 8, 64), "bfloat16", None),
  ],
)
def test_unsupported_says_why(shape, dtype, reason):
  x = jax.ShapeDtypeStruct(shape, dtype)
  found = pallas_tpu.unsupported(x, x)
  assert found is None if reason is None else reason in found

"""The TPU kernel of attention under a rule, in interpret mode on CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.mask_rules_test import RULES, some_tokens
from tokjax.kernels.sparse_attention import (
  pallas_tpu,
  reference,
  rule_attention,
)
from tokjax.kernels.sparse_attention.block_lists import block_lists
from tokjax.kernels.sparse_attention.shapes import SHAPES
from tokjax.ops import mask_rules

SMALL = pallas_tpu.BlockSizes(128, 128)
NUM_ROWS, NUM_KEYS = 300, 200  # blocks of both have an end


def inputs(
  num_rows=NUM_ROWS, num_keys=NUM_KEYS, dim=6, width=5, dtype=jnp.float32
):
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = (2, 4, num_rows, dim), (2, 2, num_keys, dim), (2, 2, num_keys, width)
  return [
    jax.random.normal(key, shape, dtype)
    for key, shape in zip(keys, shapes, strict=True)
  ]


kernel = functools.partial(
  pallas_tpu.rule_attention_forward, block_sizes=SMALL, interpret=True
)


@functools.partial(jax.jit, static_argnums=3)
def both(q, k, v, rule, readers, read):
  """Ours, then the reference."""
  given = q, k, v, rule, readers, read
  return kernel(*given), reference.rule_attention_forward(*given)


def check(got, want, tolerance=1e-5):
  for one, two in zip(got, want, strict=True):
    assert one.dtype == two.dtype == jnp.float32
    np.testing.assert_allclose(one, two, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", RULES)
def test_is_the_reference(name):
  batch = (2,) if name in ("level", "near") else ()
  readers = some_tokens(NUM_ROWS, seed=1, batch=batch)
  read = some_tokens(NUM_KEYS, seed=2)
  check(*both(*inputs(), RULES[name], readers, read))


def test_whole_blocks_and_large_logits():
  q, k, v = inputs(256, 256, dim=16, width=200)
  given = mask_rules.tokens(256)
  got, want = both(200 * q, k, v, mask_rules.causal, given, given)
  assert np.ptp(want[2]) > 400
  check(got, want, 1e-4)  # the last bits of logits


@pytest.mark.parametrize("dtypes", ["bbb", "ffb"])
def test_bfloat16(dtypes):
  kinds = {"b": jnp.bfloat16, "f": jnp.float32}
  given = [x.astype(kinds[c]) for x, c in zip(inputs(), dtypes, strict=True)]
  readers, read = some_tokens(NUM_ROWS), some_tokens(NUM_KEYS)
  got, want = both(*given, mask_rules.causal, readers, read)
  check(got[:1], want[:1], 1e-2)
  check(got[1:], want[1:])


def test_few_queries_and_keys():
  readers, read = mask_rules.tokens(3), mask_rules.tokens(7)
  check(*both(*inputs(3, 7), mask_rules.causal, readers, read))


def later(reader, read):
  return read.position > reader.position


def test_who_reads_nothing_gets_zeros():
  # Nobody of the first example; of the second row 255, in a block of which
  # others read something, and those after it, in one that has no pair at all.
  readers = mask_rules.tokens(NUM_ROWS)
  start = jnp.array([[-NUM_KEYS], [56]])
  read = mask_rules.tokens(
    NUM_KEYS, position=start + jnp.arange(NUM_KEYS)[None]
  )
  got, want = both(*inputs(), later, readers, read)
  check(got, want)
  out, lse, highest = got
  for nothing in (out[0], out[1, :, 255:]):
    np.testing.assert_array_equal(nothing, 0)
  for number in (lse, highest):
    assert np.isfinite(number[1, :, :255]).all()
    np.testing.assert_array_equal(number[1, :, 255:], -jnp.inf)
    np.testing.assert_array_equal(number[0], -jnp.inf)


def test_blocks_that_nobody_reads_may_hold_nan():
  q, k, v = inputs()
  level = jnp.where(jnp.arange(NUM_KEYS) < 128, 9, 0)
  readers = mask_rules.tokens(NUM_ROWS)
  read = mask_rules.tokens(NUM_KEYS, level=level)
  rest = mask_rules.level_causal, readers, read
  got, _ = both(q, *(x.at[:, :, :128].set(jnp.nan) for x in (k, v)), *rest)
  _, want = both(q, k, v, *rest)
  check(got, want)


def test_a_rule_may_ask_one_side_only():
  def text(reader, read):
    return read.kind == mask_rules.TEXT

  def text_of_pairs(reader, read):
    return text(reader, read) & (reader.position >= 0)

  *given, readers, read = (
    *inputs(), mask_rules.tokens(NUM_ROWS), some_tokens(NUM_KEYS)
  )  # fmt: skip
  got, want = jax.jit(
    lambda *given: (
      kernel(*given, text, readers, read),
      reference.rule_attention_forward(*given, text_of_pairs, readers, read),
    )
  )(*given)
  check(got, want)


def walk(lists):
  """Items of each example as a loop."""
  for index, kind, count in zip(*map(np.asarray, lists), strict=True):
    yield [
      (i, *((index[i, j], kind[i, j]) if num else (0, mask_rules.EMPTY)))
      + (j == 0, j == max(num, 1) - 1)
      for i, num in enumerate(count)
      for j in range(max(num, 1))
    ]


@functools.partial(jax.jit, static_argnums=0)
def items_of(rule, readers, read):
  """Lists, what stands in a row, taken apart, and how much of it counts."""
  lists = block_lists(rule, readers, read, query_block=8, key_block=16)
  items, length = pallas_tpu._in_a_row(lists)
  tiles = pallas_tpu._Tiles(
    rule=None, sizes=None, list_stride=items.shape[1], num_keys=90,
    key_bits=pallas_tpu._bits(lists), group=1, scale=1.0,
  )  # fmt: skip
  places = jnp.arange(items.shape[1])
  found = [
    jnp.stack(tiles.item(items.reshape(-1), b, places), axis=1)
    for b in range(items.shape[0])
  ]
  return lists, found, length


@pytest.mark.parametrize("name", ["causal", "segment"])
def test_items_are_the_pairs_that_are_not_empty(name):
  readers, read = some_tokens(70), some_tokens(90, seed=1)
  # Nobody of the second example reads anything, where segments count.
  segment = jnp.stack([readers.segment, 0 * readers.segment + 7])
  readers = readers._replace(segment=segment)
  lists, items, length = items_of(RULES[name], readers, read)
  for found, num, want in zip(items, length, walk(lists), strict=True):
    assert num == len(want) < len(found)
    np.testing.assert_array_equal(found[:num], want)
    past = np.array([*want[-1][:2], mask_rules.EMPTY, False, False])
    np.testing.assert_array_equal(
      found[num:], np.tile(past, (len(found) - num, 1))
    )
  if name == "segment":
    assert length[1] == 9 and not np.any(lists.count[1])


def test_vmap_equals_one_by_one():
  q, k, v = inputs()
  readers = [some_tokens(NUM_ROWS, seed) for seed in (3, 4)]
  read = some_tokens(NUM_KEYS, seed=1)

  def one(q, readers):
    return kernel(q, k, v, RULES["segment"], readers, read)

  stacked = jax.tree.map(lambda *x: jnp.stack(x), *readers)
  got = jax.jit(jax.vmap(one))(jnp.stack([q, -q]), stacked)
  for i, sign in enumerate((1, -1)):
    check([x[i] for x in got], jax.jit(one)(sign * q, readers[i]))


def test_runs_on_shards():
  mesh = jax.make_mesh((2, 2), ("data", "heads"))
  rule, read = mask_rules.level_causal, some_tokens(NUM_KEYS, seed=1)

  def attend(q, k, v, level):
    readers = mask_rules.tokens(NUM_ROWS, level=level)
    return rule_attention(q, k, v, rule, readers, read)

  with jax.set_mesh(mesh):
    given = jax.device_put(inputs(), jax.P("data", "heads"))
    level = some_tokens(NUM_ROWS, batch=(2,)).level
    level = jax.device_put(level, jax.P("data"))
    traced = jax.jit(attend).trace(*given, level)
    program = traced.lower(lowering_platforms=("tpu",)).as_text()
  assert "tpu_custom_call" in program
  # What a device has: one example and two of the four heads.
  assert f"tensor<1x2x{NUM_ROWS}x5xf32>" in program


def shaped(name, batch=1, dtype=jnp.bfloat16):
  shape = SHAPES[name]
  keys = batch, shape.key_heads, shape.num_tokens, shape.dim
  sizes = (batch, shape.heads, *keys[2:]), keys, keys
  return [jax.ShapeDtypeStruct(size, dtype) for size in sizes]


def fields(*shape):
  field = jax.ShapeDtypeStruct(shape, jnp.int32)
  return mask_rules.Tokens(*[field] * len(mask_rules.Tokens._fields))


def test_takes_real_shapes_and_is_taken():
  for name, shape in SHAPES.items():
    tokens = fields(shape.num_tokens)
    assert pallas_tpu.unsupported(*shaped(name), tokens, tokens) is None

  def attend(given, tokens):
    return rule_attention(*given, mask_rules.causal, tokens)

  traced = jax.jit(attend).trace(shaped("scales"), fields(680))
  program = traced.lower(lowering_platforms=("tpu",)).as_text()
  assert "rule_attention" in program and "tpu_custom_call" in program


@pytest.mark.parametrize("num_tokens", [1, 128, 680, 3_008, 32_768])
def test_default_sizes_cover(num_tokens):
  sizes = pallas_tpu.BlockSizes.of(num_tokens, num_tokens)
  for size in (sizes.rows, sizes.keys):
    parts = -(-num_tokens // size)
    assert parts * size < num_tokens + parts * 128
  # Scores, their masked copy and the exponentials, in float32.
  assert 12 * sizes.rows * sizes.keys <= 6 << 20


@pytest.mark.parametrize(
  "name, sizes", [("rows", (96, 128)), ("keys", (128, 192))]
)
def test_block_sizes_name_what_is_wrong(name, sizes):
  with pytest.raises(ValueError, match=name):
    pallas_tpu.BlockSizes(*sizes)


def test_unsupported_says_why():
  def reason(q=(2, 2, 8, 64), k=None, dtype="bfloat16", tokens=None):
    q = jax.ShapeDtypeStruct(q, dtype)
    k = q if k is None else jax.ShapeDtypeStruct(*k)
    tokens = fields(q.shape[2]) if tokens is None else tokens
    return pallas_tpu.unsupported(q, k, k, tokens, tokens)

  assert reason() is None
  assert "float16 is neither" in reason(dtype="float16")
  assert "empty" in reason((2, 2, 0, 64))
  assert "width 513" in reason((2, 2, 8, 513))
  assert "keys float32" in reason(k=((2, 2, 8, 64), "float32"))
  long = 2, 2, 1 << 18, 64
  assert reason(long) is None
  assert "scalar memory" in reason(long, tokens=fields(2, 1 << 18))


def test_the_named_kernel_refuses():
  q, k, v = inputs(dtype=jnp.float16)
  tokens = mask_rules.tokens(NUM_ROWS), mask_rules.tokens(NUM_KEYS)
  with pytest.raises(NotImplementedError, match="pallas_tpu: dtype float16"):
    rule_attention(
      q, k, v, mask_rules.causal, *tokens, implementation="pallas_tpu"
    )

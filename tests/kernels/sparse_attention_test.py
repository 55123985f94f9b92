"""Attention under rules against attention under their masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.mask_rules_test import RULES, some_tokens
from tokjax.kernels.sparse_attention import RuleAttention, rule_attention
from tokjax.kernels.sparse_attention.block_lists import (
  block_lists,
  equal_blocks,
)
from tokjax.ops import attention, mask_rules

NUM_TOKENS, BLOCK = 21, 8


def inputs(seed=0, num_queries=NUM_TOKENS, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(seed), 3)
  shapes = (2, 4, num_queries, 6), (2, 2, NUM_TOKENS, 6), (2, 2, NUM_TOKENS, 5)
  return tuple(
    jax.random.normal(key, shape, dtype)
    for key, shape in zip(keys, shapes, strict=True)
  )


@functools.partial(jax.jit, static_argnums=3)
def both(q, k, v, rule, given):
  """Results, and gradients through `out` and `lse`: ours, then plain."""

  def plain(q, k, v):
    mask = mask_rules.may_read(rule, given, given)
    state, highest = attention.attend_with_highest(q, k, v, mask)
    return RuleAttention(*state, highest)

  def ours(q, k, v):
    return rule_attention(q, k, v, rule, given, block_size=BLOCK)

  def scalar(f):
    def loss(*x):
      found = f(*x)
      lse = jnp.where(jnp.isfinite(found.lse), found.lse, 0)
      weights = jnp.cos(jnp.arange(found.out.size)).reshape(found.out.shape)
      return jnp.sum(found.out * weights) + jnp.sum(jnp.sin(lse))

    return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

  return [(f(q, k, v), scalar(f)) for f in (ours, plain)]


@pytest.mark.parametrize("name", RULES)
def test_equals_attention_under_the_mask(name):
  batch = (2,) if name in ("level", "near") else ()
  given = some_tokens(NUM_TOKENS, seed=3, batch=batch)
  ours, plain = both(*inputs(), RULES[name], given)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
    ours,
    plain,
  )


def test_who_reads_nothing_gets_zeros_and_gives_no_gradient():
  def later(reader, read):
    return read.position > reader.position

  given = mask_rules.tokens(NUM_TOKENS)
  (found, grads), _ = both(*inputs(), later, given)
  np.testing.assert_array_equal(found.out[:, :, -1], 0)
  np.testing.assert_array_equal(found.lse[:, :, -1], -jnp.inf)
  np.testing.assert_array_equal(grads[0][:, :, -1], 0)
  assert all(np.isfinite(x).all() for x in grads)


def test_empty_blocks_are_not_computed():
  q, k, v = inputs()
  # Nobody but the last block may read the last block.
  k, v = (x.at[:, :, 16:].set(jnp.nan) for x in (k, v))
  given = mask_rules.tokens(NUM_TOKENS)
  attend = jax.jit(
    lambda q, k, v: (
      rule_attention(q, k, v, mask_rules.causal, given, block_size=BLOCK).out
    )
  )
  out = attend(q, k, v)
  assert np.isfinite(out[:, :, :16]).all()
  assert np.isnan(out[:, :, 16:]).all()


def test_a_rule_may_ask_one_side_alone():
  def visual(reader, read):
    return read.kind == mask_rules.VISUAL

  (ours, grads), (plain, wanted) = both(
    *inputs(), visual, some_tokens(NUM_TOKENS, batch=(2,))
  )
  np.testing.assert_allclose(ours.out, plain.out, rtol=1e-5, atol=1e-5)
  for got, want in zip(grads, wanted, strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_other_tokens_are_read():
  q, k, v = inputs(num_queries=5)
  readers = mask_rules.tokens(5, level=jnp.array([0, 1, 2, 3, 1]))
  read = some_tokens(NUM_TOKENS)
  rule = mask_rules.level_causal
  found = jax.jit(
    lambda *x: rule_attention(*x, rule, readers, read, block_size=BLOCK)
  )(q, k, v)
  mask = mask_rules.may_read(rule, readers, read)
  want = attention.attend_with_lse(q, k, v, mask)
  np.testing.assert_allclose(found.out, want.out, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(found.lse, want.lse, rtol=1e-5, atol=1e-6)


def test_no_array_of_all_pairs():
  shape = (1, 2, 1024, 8)
  given = mask_rules.tokens(1024)

  def loss(q, k, v):
    rule = mask_rules.causal
    return rule_attention(q, k, v, rule, given, block_size=128).out.sum()

  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(x, x, x))
  assert "128,128" in text and "1024,1024" not in text


def test_bfloat16():
  given = some_tokens(NUM_TOKENS)
  q, k, v = inputs(dtype=jnp.bfloat16)
  (ours, grads), (plain, _) = both(q, k, v, mask_rules.causal, given)
  assert ours.out.dtype == jnp.float32 and grads[0].dtype == jnp.bfloat16
  np.testing.assert_allclose(ours.out, plain.out, atol=2e-2)


def test_reference_and_what_it_leaves_out():
  q, k, v = inputs()
  given = some_tokens(NUM_TOKENS)
  (ours, _), _ = both(q, k, v, mask_rules.causal, given)
  found = rule_attention(
    q, k, v, mask_rules.causal, given, implementation="reference"
  )
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
    ours,
    found,
  )


def test_errors():
  q, k, v = inputs()
  given = mask_rules.tokens(NUM_TOKENS)
  with pytest.raises(ValueError, match="heads_of_q"):
    rule_attention(q[:, :3], k, v, mask_rules.causal, given)
  with pytest.raises(ValueError, match="width_of_q=6, width_of_k=5"):
    rule_attention(q, v, v, mask_rules.causal, given)
  with pytest.raises(ValueError, match="readers=3"):
    rule_attention(q, k, v, mask_rules.causal, mask_rules.tokens(3), given)


def test_lists_of_blocks():
  given = some_tokens(NUM_TOKENS, seed=1, batch=(2,))
  for name, rule in RULES.items():
    lists = block_lists(rule, given, given, query_block=4, key_block=8)
    kinds = mask_rules.block_kinds(rule, given, given, block_size=(4, 8))
    kinds = np.array(kinds)
    kinds[..., -1] = np.minimum(kinds[..., -1], mask_rules.PARTIAL)  # filled up
    for place, count in np.ndenumerate(np.asarray(lists.count)):
      want = np.flatnonzero(kinds[place])
      index, kind = lists.index[place], lists.kind[place]
      np.testing.assert_array_equal(index[:count], want, name)
      np.testing.assert_array_equal(kind[:count], kinds[place][want])
      last = want[-1] if len(want) else 0
      assert (index[count:] == last).all() and (kind[count:] == 0).all()


def test_equal_blocks_are_few_and_hold_all():
  for size in (0, 1, 7, 64, 300, 512, 513, 768, 2304):
    for most, multiple in ((8, 64), (512, 64), (512, 128), (1024, 128)):
      rows = equal_blocks(size, most, multiple)
      blocks = max(1, -(-size // most))
      assert 1 <= rows <= most and blocks * rows >= size
      assert rows == most or rows % multiple == 0
      # The next smaller size needs one block more.
      assert rows <= multiple or blocks * (rows - multiple) < size

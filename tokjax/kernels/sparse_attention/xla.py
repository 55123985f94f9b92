"""Attention under a rule in plain JAX: a scan over blocks, empty ones left out.

Every block of queries goes through all blocks of keys; a condition leaves out
those of which nothing may be read. The backward pass makes tiles again.
"""

import jax
import jax.numpy as jnp

from tokjax.kernels.sparse_attention.block_lists import equal_blocks
from tokjax.ops import attention, mask_rules
from tokjax.ops.attention import AttentionState
from tokjax.ops.mask_rules import Rule, Tokens
from tokjax.typing import Array, Float

__all__ = ["rule_attention_backward", "rule_attention_forward"]


def rule_attention_forward(
  q: Float[Array, "B H N d"],
  k: Float[Array, "B K M d"],
  v: Float[Array, "B K M e"],
  rule: Rule,
  readers: Tokens,
  read: Tokens,
  *,
  block_size: int,
) -> tuple[
  Float[Array, "B H N e"], Float[Array, "B H N"], Float[Array, "B H N"]
]:
  """What `reference.rule_attention_forward` returns.

  Args:
    q: queries.
    k: keys.
    v: values.
    rule: who may read whom.
    readers: what the queries are.
    read: what the keys are.
    block_size: queries, and keys, of a tile, at most.
  """
  num_rows, num_keys = _sizes(block_size, q, k)
  some, keys = _readable(rule, (num_rows, num_keys), k, v, readers, read)

  def rows(block):
    q, readers, some = block

    def step(state, block):
      some, number = block

      def add(state):
        (k, v), read, real = _block(keys, number)
        mask = _tile(rule, readers, read, real)
        more, highest = attention.attend_with_highest(q, k, v, mask)
        return (
          attention.merge(state[0], more),
          jnp.maximum(state[1], highest),
        )

      return jax.lax.cond(some, add, lambda state: state, state), None

    nothing = jnp.zeros_like(q[..., 0], jnp.float32)
    out = nothing[..., None] + jnp.zeros((1, 1, 1, v.shape[-1]))
    start = AttentionState(out, nothing - jnp.inf), nothing - jnp.inf
    return jax.lax.scan(step, start, (some, jnp.arange(some.shape[0])))[0]

  asked = attention.cut_rows(q, num_rows), _token_blocks(readers, num_rows)
  found = jax.lax.map(rows, (*asked, some))
  state, highest = attention.join_rows(found, q.shape[2])
  return *state, highest


def rule_attention_backward(
  q: Float[Array, "B H N d"],
  k: Float[Array, "B K M d"],
  v: Float[Array, "B K M e"],
  rule: Rule,
  readers: Tokens,
  read: Tokens,
  lse: Float[Array, "B H N"],
  delta: Float[Array, "B H N"],
  d_out: Float[Array, "B H N e"],
  *,
  block_size: int,
) -> tuple[
  Float[Array, "B H N d"], Float[Array, "B K M d"], Float[Array, "B K M e"]
]:
  """Cotangents of queries, keys and values, in their dtypes.

  Args:
    q: queries.
    k: keys.
    v: values.
    rule: who may read whom.
    readers: what the queries are.
    read: what the keys are.
    lse: see `RuleAttention`.
    delta: see `attention.attend_cotangents`.
    d_out: cotangent of the result.
    block_size: queries, and keys, of a tile, at most.
  """
  num_rows, num_keys = _sizes(block_size, q, k)
  some, keys = _readable(rule, (num_rows, num_keys), k, v, readers, read)

  def rows(total, block):
    (q, d_out, lse, delta), readers, some = block

    def step(d_q, block):
      some, number, d_keys = block

      def add(d_q, d_keys):
        (k, v), read, real = _block(keys, number)
        mask = _tile(rule, readers, read, real)
        found = attention.attend_cotangents(
          q, k, v, mask, lse=lse, delta=delta, d_out=d_out
        )
        return d_q + found[0], jax.tree.map(jnp.add, d_keys, found[1:])

      return jax.lax.cond(some, add, lambda *x: x, d_q, d_keys)

    d_q = jnp.zeros_like(q, jnp.float32)
    d_q, total = jax.lax.scan(
      step, d_q, (some, jnp.arange(some.shape[0]), total)
    )
    return total, d_q

  asked = attention.cut_rows((q, d_out, lse, delta), num_rows)
  start = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), keys[0])
  total, d_q = jax.lax.scan(
    rows, start, (asked, _token_blocks(readers, num_rows), some)
  )
  d_k, d_v = attention.join_rows(total, k.shape[2])
  return (
    attention.join_rows(d_q, q.shape[2]).astype(q.dtype),
    d_k.astype(k.dtype),
    d_v.astype(v.dtype),
  )


def _sizes(block_size, q, k):
  """Queries and keys of a tile."""
  return tuple(equal_blocks(x.shape[2], block_size, 64) for x in (q, k))


def _readable(rule, sizes, k, v, readers, read):
  """Whether anything of a pair of blocks may be read, and blocks of keys."""
  _, size = sizes
  some = mask_rules.block_kinds(rule, readers, read, block_size=sizes) > 0
  some = jnp.any(some, axis=0) if some.ndim == 3 else some
  number = k.shape[2]
  real = jnp.arange(number + -number % size) < number
  keys = (
    attention.cut_rows((k, v), size),
    _token_blocks(read, size),
    real.reshape(-1, 1, size),
  )
  return some, keys


def _block(keys, number):
  """One of the blocks: sliced only where it is read."""
  return jax.tree.map(
    lambda x: jax.lax.dynamic_index_in_dim(x, number, keepdims=False), keys
  )


def _tile(rule, readers, read, real):
  """[n, m] or [B, n, m]."""
  mask = mask_rules.may_read(rule, readers, read)
  return mask & (real if mask.ndim == 2 else real[None])


def _token_blocks(given, size):
  """[*B, N] -> [blocks, *B, size]."""
  return jax.tree.map(
    lambda x: jnp.moveaxis(x, -2, 0), mask_rules.cut_tokens(given, size)
  )

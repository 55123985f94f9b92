"""Attention under a rule, leaving out the blocks that the rule leaves empty.

    scales = tokens(num_tokens, level=levels)
    read = rule_attention(q, k, v, level_causal, scales)   # read.out, read.lse

For masks that are known from what tokens are: causal, windows, packed
sequences, scales, sets of items, pictures in a text (`tokjax.ops.mask_rules`).
Tiles of the mask are made where they are needed; no array of all pairs exists,
and pairs of blocks of which nothing may be read are not computed. (Under `vmap`
they are: put examples into the batch instead.)

Source: the online softmax of Dao et al. (2022), "FlashAttention"; that blocks
are judged by the ranges of what their tokens are is ours.
"""

import functools

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.compat import varying_together
from tokjax.ops import attention, mask_rules
from tokjax.ops.attention import AttentionState
from tokjax.ops.mask_rules import Rule, Tokens
from tokjax.typing import Array, Float

__all__ = ["rule_attention"]


def rule_attention(
  q: Float[Array, "B H N d"],
  k: Float[Array, "B K M d"],
  v: Float[Array, "B K M e"],
  rule: Rule,
  readers: Tokens,
  read: Tokens | None = None,
  *,
  block_size: int = 256,
) -> AttentionState:
  """softmax(q k^T / sqrt(d)) v over the keys that the rule allows.

  Args:
    q: queries of H heads.
    k: keys of K heads; K divides H, and H / K queries in a row share a key.
    v: values.
    rule: who may read whom; static, so keep one function and do not make it
      anew for each call under `jit`.
    readers: what the queries are, [N] or [B, N].
    read: what the keys are; None: the same tokens.
    block_size: queries, and keys, of a tile.

  Returns:
    out: float32; zeros for a query that may read nothing. lse: -inf there.
    Gradients reach q, k and v through both, by computing the tiles again.

  Raises:
    ValueError: if sizes disagree.

  Example:
    >>> x = jnp.arange(1.0, 4).reshape(1, 1, 3, 1)
    >>> attend = jax.jit(lambda x: rule_attention(
    ...   0 * x, x, x, mask_rules.causal, mask_rules.tokens(3), block_size=2))
    >>> attend(x).out.ravel().tolist()
    [1.0, 1.5, 2.0]

  Cost: 4 H d FLOPs for each pair of the blocks that are not empty, 10 in the
    backward pass. Memory beside inputs and results: one tile of each head.
  """
  read = readers if read is None else read
  checks.has_rank(4, q=q, k=k, v=v)
  checks.divisible(k.shape[1], heads_of_q=q.shape[1])
  checks.same_size(rows_of_k=k.shape[2], rows_of_v=v.shape[2])
  checks.same_size(rows_of_q=q.shape[2], readers=readers.position.shape[-1])
  checks.same_size(rows_of_k=k.shape[2], read=read.position.shape[-1])
  checks.in_range(1, 1 << 20, block_size=block_size)
  q, k, v = varying_together(q, k, v)
  return AttentionState(*_attend(rule, block_size, q, k, v, readers, read))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(rule, size, q, k, v, readers, read):
  some = _readable(rule, size, readers, read)
  keys = (
    attention.cut_rows((k, v), size),
    _token_blocks(read, size),
    _real(k, size),
  )

  def rows(block):
    q, readers, some = block

    def step(state, block):
      some, ((k, v), read, real) = block

      def add(state):
        mask = _tile(rule, readers, read, real)
        return attention.merge(state, attention.attend_with_lse(q, k, v, mask))

      return jax.lax.cond(some, add, lambda state: state, state), None

    nothing = jnp.zeros_like(q[..., 0], jnp.float32)
    start = AttentionState(
      nothing[..., None] + jnp.zeros((1, 1, 1, v.shape[-1])),
      nothing - jnp.inf,
    )
    return jax.lax.scan(step, start, (some, keys))[0]

  queries = attention.cut_rows(q, size), _token_blocks(readers, size), some
  state = jax.lax.map(rows, queries)
  return tuple(attention.join_rows(state, q.shape[2]))


def _forward(rule, size, q, k, v, readers, read):
  out, lse = _attend(rule, size, q, k, v, readers, read)
  return (out, lse), (q, k, v, readers, read, out, lse)


def _backward(rule, size, kept, cotangents):
  q, k, v, readers, read, out, lse = kept
  d_out, d_lse = cotangents
  delta = jnp.sum(d_out * out, axis=-1) - d_lse
  some = _readable(rule, size, readers, read)
  keys = (
    attention.cut_rows((k, v), size),
    _token_blocks(read, size),
    _real(k, size),
  )

  def rows(total, block):
    (q, d_out, lse, delta), readers, some = block

    def step(d_q, block):
      some, ((k, v), read, real), d_keys = block

      def add(d_q, d_keys):
        mask = _tile(rule, readers, read, real)
        found = attention.attend_cotangents(
          q, k, v, mask, lse=lse, delta=delta, d_out=d_out
        )
        return d_q + found[0], jax.tree.map(jnp.add, d_keys, found[1:])

      return jax.lax.cond(some, add, lambda *x: x, d_q, d_keys)

    d_q = jnp.zeros_like(q, jnp.float32)
    d_q, total = jax.lax.scan(step, d_q, (some, keys, total))
    return total, d_q

  asked = attention.cut_rows((q, d_out, lse, delta), size)
  start = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), keys[0])
  total, d_q = jax.lax.scan(
    rows, start, (asked, _token_blocks(readers, size), some)
  )
  d_k, d_v = attention.join_rows(total, k.shape[2])
  return (
    attention.join_rows(d_q, q.shape[2]).astype(q.dtype),
    d_k.astype(k.dtype),
    d_v.astype(v.dtype),
    None,
    None,
  )


_attend.defvjp(_forward, _backward)


def _readable(rule, size, readers, read):
  """Whether anything of a pair of blocks may be read, [blocks, blocks]."""
  return mask_rules.block_kinds(rule, readers, read, block_size=size) > 0


def _tile(rule, readers, read, real):
  """[n, m] or [B, n, m]."""
  mask = mask_rules.may_read(rule, readers, read)
  return mask & (real if mask.ndim == 2 else real[None])


def _token_blocks(given, size):
  """[*B, N] -> [blocks, *B, size]; the last token fills up."""

  def cut(x):
    missing = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % size)]
    x = jnp.pad(x, missing, mode="edge")
    return jnp.moveaxis(x.reshape(*x.shape[:-1], -1, size), -2, 0)

  return jax.tree.map(cut, given)


def _real(k, size):
  """Which keys of each block exist, [blocks, 1, size]."""
  number = k.shape[2]
  places = jnp.arange(number + -number % size)
  return (places < number).reshape(-1, 1, size)

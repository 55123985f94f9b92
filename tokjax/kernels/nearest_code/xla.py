"""Nearest codes in plain JAX over blocks of codes, bounded in memory.

Tokens are dealt to blocks like cards, token i to block i mod the number of
blocks. Where a batch is sharded over devices, every block then has tokens of
every device, and none has to be moved.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from tokjax.ops import selection
from tokjax.typing import Array, Float, Int32

__all__ = ["nearest", "top"]

# Codes and bytes of scores of one block. Measured on two shared CPU cores with
# 2,048 tokens and 8,192 codes of width 8: 128 KiB take 20 ms, 1 MiB and more
# 42 to 100, all scores at once 124.
_CPU_CODES, _CPU_SCRATCH_BYTES = 256, 128 << 10
_CODES, _SCRATCH_BYTES = 4096, 128 << 20

_TOP_SCRATCH_BYTES = 16 << 20

_LEAST_TOKENS = 8


def nearest(
  x: Float[Array, "n D"],
  codes: Float[Array, "K D"],
  offset: Float[Array, " K"],
  *,
  block_size: int | None = None,
) -> tuple[Int32[Array, " n"], Float[Array, " n"]]:
  """The code of each row, as `reference.nearest` finds it.

  Args:
    x: rows, float32.
    codes: finite, float32.
    offset: float32; inf for a code that must not be chosen.
    block_size: codes of one block; None for a rule.

  Returns:
    What `reference.nearest` returns, but the score of a row that holds NaN is
    -inf.
  """

  def with_blocks(codes_at_once, scratch):
    block = min(block_size or codes_at_once, codes.shape[0])
    return functools.partial(_nearest, block=block, scratch=scratch)

  return jax.lax.platform_dependent(
    x,
    codes,
    offset,
    cpu=with_blocks(_CPU_CODES, _CPU_SCRATCH_BYTES),
    default=with_blocks(_CODES, _SCRATCH_BYTES),
  )


def _nearest(x, codes, offset, *, block, scratch):
  position = jnp.arange(block, dtype=jnp.int32)[:, None]

  def search(x):  # [b, D]
    def step(i, best):
      index, score = best
      first, part, shift = _block(codes, offset, i, block)
      # [Kb, b]: maxima over the first axis are those of whole vectors.
      scores = jnp.matmul(part, x.T, precision="highest") - shift[:, None]
      highest = jnp.max(scores, axis=0)
      # Two plain reductions are several times faster on CPU than `argmax`.
      place = jnp.where(scores == highest[None, :], position, block - 1)
      place = first + jnp.min(place, axis=0)
      better = highest > score  # strict: the earlier block keeps a tie
      index = jnp.where(better, place, index)
      return index, jnp.where(better, highest, score)

    like = x[:, 0]
    start = jnp.zeros_like(like, jnp.int32), jnp.full_like(like, -jnp.inf)
    return jax.lax.fori_loop(0, -(-codes.shape[0] // block), step, start)

  return _over_tokens(search, x, scratch // (4 * block))


def top(
  x: Float[Array, "n D"],
  codes: Float[Array, "K D"],
  offset: Float[Array, " K"],
  *,
  k: int,
  block_size: int,
) -> selection.TopK:
  """The k codes of each row with the largest <row, code> - offset.

  Args:
    x: rows, float32.
    codes: finite, float32.
    offset: float32; inf for a code that must not be chosen.
    k: how many, at most K.
    block_size: codes of one block, at most K.

  Returns:
    Scores and indices, ties to the lowest.
  """
  position = jnp.arange(block_size, dtype=jnp.int32)

  def search(x):  # [b, D]
    def step(i, best):
      first, part, shift = _block(codes, offset, i, block_size)
      scores = jnp.matmul(x, part.T, precision="highest") - shift[None, :]
      # What the last block repeats of the one before is not found twice.
      new = first + position >= i * block_size
      scores = jnp.where(new[None, :], scores, -jnp.inf)  # [b, Kb]
      found = selection.top_k(scores, min(k, block_size))
      index = jnp.where(found.index < 0, -1, first + found.index)
      found = selection.TopK(found.values, index)
      return selection.merge_top_k(best, found, k)

    values = jnp.full_like(x, -jnp.inf, shape=(x.shape[0], k))
    index = jnp.full_like(values, -1, dtype=jnp.int32)
    start = selection.TopK(values, index)
    return jax.lax.fori_loop(0, -(-codes.shape[0] // block_size), step, start)

  return _over_tokens(search, x, _TOP_SCRATCH_BYTES // (4 * block_size))


def _block(codes, offset, i, block):
  """First index, codes and offsets of block i; the last is moved to fit."""
  first = jnp.minimum(i * block, codes.shape[0] - block)
  return (
    first,
    jax.lax.dynamic_slice_in_dim(codes, first, block),
    jax.lax.dynamic_slice_in_dim(offset, first, block),
  )


def _over_tokens(search: Callable, x, most):
  """Searches for `most` tokens at a time; results in the order of tokens."""
  num_tokens, dim = x.shape
  num_blocks = -(-num_tokens // max(most, _LEAST_TOKENS))
  if num_blocks <= 1:
    return search(x)
  missing = -num_tokens % num_blocks
  dealt = jnp.pad(x, ((0, missing), (0, 0))).reshape(-1, num_blocks, dim)
  found = jax.lax.map(search, dealt.swapaxes(0, 1))  # [blocks, b, ...]

  def collect(y):
    return y.swapaxes(0, 1).reshape(-1, *y.shape[2:])[:num_tokens]

  return jax.tree.map(collect, found)

"""Blocks of queries and keys: their sizes, and which of them meet."""

from typing import NamedTuple

import jax.numpy as jnp

from tokjax.ops import mask_rules, packing
from tokjax.ops.mask_rules import EMPTY, Rule, Tokens
from tokjax.typing import Array, Int32

__all__ = ["BlockLists", "block_lists", "equal_blocks"]


class BlockLists(NamedTuple):
  """Of each of the n blocks of queries of an example.

  Attributes:
    index: blocks of keys, ascending; past the first `count` the last of these
      once more (block 0 where there is none), so that nothing new is fetched.
    kind: `mask_rules.PARTIAL` or `FULL`; `EMPTY` past the first `count`.
    count: how many blocks are read.
  """

  index: Int32[Array, "B n m"]
  kind: Int32[Array, "B n m"]
  count: Int32[Array, "B n"]


def block_lists(
  rule: Rule,
  readers: Tokens,
  read: Tokens,
  *,
  query_block: int,
  key_block: int,
) -> BlockLists:
  """Lists of the blocks that are not empty under a rule.

  Args:
    rule: who may read whom.
    readers: N tokens.
    read: M tokens.
    query_block: readers of a block; the last is filled up with its last token.
    key_block: tokens read of a block, likewise. A block that is filled up is
      PARTIAL: what fills it may not be read.

  Returns:
    Lists of n = ceil(N / query_block) blocks of m = ceil(M / key_block), of
    one example where no field of the tokens has a batch axis.

  Example:
    >>> given = mask_rules.tokens(4)
    >>> lists = block_lists(
    ...   mask_rules.causal, given, given, query_block=2, key_block=2)
    >>> lists.index.tolist(), lists.kind.tolist(), lists.count.tolist()
    ([[[0, 0], [0, 1]]], [[[1, 0], [2, 1]]], [[1, 2]])
  """
  kinds = mask_rules.block_kinds(
    rule, readers, read, block_size=(query_block, key_block)
  ).astype(jnp.int32)
  kinds = kinds[None] if kinds.ndim == 2 else kinds
  num_keys = read.position.shape[-1]
  if num_keys % key_block:
    last = jnp.arange(kinds.shape[-1]) == num_keys // key_block
    filled = jnp.minimum(kinds, mask_rules.PARTIAL)
    kinds = jnp.where(last[None, None], filled, kinds)
  kept = packing.pack(kinds != EMPTY, kinds.shape[-1])
  count = jnp.sum(kept.mask, axis=-1, dtype=jnp.int32)
  place = jnp.minimum(
    jnp.arange(kinds.shape[-1])[None, None],
    jnp.maximum(count - 1, 0)[..., None],
  )
  index = jnp.take_along_axis(kept.index, place, axis=-1)
  index = jnp.where((count > 0)[..., None], index, 0)
  kind = jnp.take_along_axis(kinds, index, axis=-1)
  return BlockLists(index, jnp.where(kept.mask, kind, EMPTY), count)


def equal_blocks(size: int, most: int, multiple: int) -> int:
  """The size of blocks that are as few as they can be, and alike.

  Args:
    size: rows in all.
    most: rows of a block.
    multiple: what a block is rounded up to, unless it exceeds `most`.

  Example:
    >>> equal_blocks(768, 512, 64), equal_blocks(680, 512, 128)
    (384, 384)
  """
  blocks = max(1, -(-size // most))
  rows = max(1, -(-size // blocks))
  return min(most, rows + -rows % multiple)

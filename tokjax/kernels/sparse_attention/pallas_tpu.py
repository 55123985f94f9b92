"""Attention under a rule on TPU: a walk through the blocks that are not empty.

A list says which block of queries meets which block of keys, one pair after
the other; the last axis of the grid is that list, and its length is known only
when the list is made. Pairs of which nothing may be read therefore cost
neither a step nor a copy. Of a pair, scores are made on chip,

  scores[rows, keys] = query tile @ key tile^T * scale * log2(e)

and maximum, sum of exponentials (base 2) and weighted values are carried from
pair to pair, as in every flash attention. What the tokens are lies in lanes,
seven numbers a token; the rule is asked about [rows, 1] and [1, keys] of them,
and only where it lets some, but not all pairs of the two blocks be read.

Bound: FLOPs, 4 d of the matrix unit for each score of a pair on the list,
beside some ten operations of the vector unit, an exponential among them. A key
tile is copied for each block of queries and each head: as many FLOPs for a
byte, in bfloat16, as the block has rows. The kernel has been compiled for TPU
v5e, v6e and v7x and run in interpret mode; nothing has been measured on a chip.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tokjax import checks, compat
from tokjax.kernels.sparse_attention.block_lists import (
  block_lists,
  equal_blocks,
)
from tokjax.ops import mask_rules
from tokjax.ops.mask_rules import Rule, Tokens
from tokjax.typing import Array, Float

__all__ = ["BlockSizes", "rule_attention_forward", "unsupported"]

_LANES = 128
_FIELDS = 8  # of a token, one is unused: a tile has eight sublanes
_MAX_WIDTH = 512
_VMEM_LIMIT_BYTES = 48 << 20
_LIST_LIMIT_BYTES = 512 << 10  # of 1 MiB of scalar memory
# What a score is at least, and that of a hidden key: finite, so that no
# difference is NaN, and exp2(hidden - lowest) is 0.
_LOWEST, _HIDDEN = -1e30, -2e30
_LAST, _FIRST, _KIND, _PAIR = 0, 1, 2, 4  # where they start in an item


@dataclasses.dataclass(frozen=True)
class BlockSizes:
  """What one grid step holds.

  Attributes:
    rows: queries of a block, a multiple of 128.
    keys: keys of a block, a multiple of 128.

  Raises:
    ValueError: if a size is out of range or no multiple.

  Example:
    >>> BlockSizes.of(680, 32_768)
    BlockSizes(rows=384, keys=1024)
  """

  rows: int
  keys: int

  def __post_init__(self):
    checks.in_range(_LANES, 1 << 11, rows=self.rows, keys=self.keys)
    checks.divisible(_LANES, rows=self.rows, keys=self.keys)

  @classmethod
  def of(cls, num_rows: int, num_keys: int) -> "BlockSizes":
    """Equal blocks of at most 512; twice the keys where lists get long."""
    most = 512 if num_keys <= 1 << 13 else 1024
    return cls(
      equal_blocks(num_rows, 512, _LANES), equal_blocks(num_keys, most, _LANES)
    )


def unsupported(q, k, v, readers: Tokens, read: Tokens) -> str | None:
  """Why this kernel cannot take the arguments, or None when it can.

  Args:
    q: [B, H, N, d], an array or a ShapeDtypeStruct, as all others.
    k: [B, K, M, d].
    v: [B, K, M, e].
    readers: fields [N] or [B, N].
    read: fields [M] or [B, M].

  Returns:
    The reason, from shapes and dtypes alone.

  Example:
    >>> half = jax.ShapeDtypeStruct((1, 2, 8, 64), "float16")
    >>> given = mask_rules.tokens(8)
    >>> unsupported(half, half, half, given, given)
    'dtype float16 is neither float32 nor bfloat16'
  """
  for x in (q, k, v):
    if x.dtype not in (jnp.float32, jnp.bfloat16):
      return f"dtype {x.dtype} is neither float32 nor bfloat16"
    if 0 in x.shape:
      return f"an axis is empty: {x.shape}"
    if x.shape[-1] > _MAX_WIDTH:
      return f"width {x.shape[-1]} is above {_MAX_WIDTH}"
  if q.dtype != k.dtype:
    return f"queries are {q.dtype}, keys {k.dtype}"
  sizes = BlockSizes.of(q.shape[2], k.shape[2])
  items = pl.cdiv(q.shape[2], sizes.rows) * pl.cdiv(k.shape[2], sizes.keys)
  lists = q.shape[0] if any(x.ndim > 1 for x in (*readers, *read)) else 1
  if 4 * lists * items > _LIST_LIMIT_BYTES:
    return (
      f"{lists} lists of {items} pairs of blocks take"
      f" {4 * lists * items} bytes of scalar memory, more than"
      f" {_LIST_LIMIT_BYTES}"
    )
  return None


def rule_attention_forward(
  q: Float[Array, "B H N d"],
  k: Float[Array, "B K M d"],
  v: Float[Array, "B K M e"],
  rule: Rule,
  readers: Tokens,
  read: Tokens,
  *,
  block_sizes: BlockSizes | None = None,
  interpret: bool = False,
) -> tuple[
  Float[Array, "B H N e"], Float[Array, "B H N"], Float[Array, "B H N"]
]:
  """What `reference.rule_attention_forward` returns.

  Args:
    q: queries, float32 or bfloat16.
    k: keys of the same dtype.
    v: values.
    rule: who may read whom.
    readers: what the queries are.
    read: what the keys are.
    block_sizes: None takes `BlockSizes.of`.
    interpret: whether to run the body step by step on any device.
  """
  num_rows, num_keys = q.shape[2], k.shape[2]
  sizes = block_sizes or BlockSizes.of(num_rows, num_keys)
  lists = block_lists(
    rule, readers, read, query_block=sizes.rows, key_block=sizes.keys
  )
  items, length = _in_a_row(lists)
  tiles = _Tiles(
    rule=rule,
    sizes=sizes,
    list_stride=items.shape[1] if items.shape[0] > 1 else 0,
    num_keys=num_keys,
    key_bits=_bits(lists),
    group=q.shape[1] // k.shape[1],
    scale=q.shape[3] ** -0.5 * math.log2(math.e),
  )
  *operands, items, length = compat.varying_together(
    # A tile may not exceed its array; larger arrays stay as they are.
    _at_least(q, sizes.rows),
    _at_least(k, sizes.keys),
    _at_least(v, sizes.keys),
    _fields(readers, sizes.rows),
    _fields(read, sizes.keys),
    items,
    length,
  )
  out, *numbers = tiles.call(
    items.reshape(-1), jnp.max(length), *operands, interpret=interpret
  )
  lse, highest = (x.reshape(*x.shape[:2], -1)[..., :num_rows] for x in numbers)
  return out[:, :, :num_rows], lse, highest


@dataclasses.dataclass(frozen=True)
class _Tiles:
  """What is static of one call.

  The axes of the grid are example b, head h and item t of the example's list.
  """

  rule: Rule
  sizes: BlockSizes
  list_stride: int  # from list to list; 0 where there is one for all
  num_keys: int
  key_bits: int
  group: int  # heads that share a key
  scale: float

  def call(self, items, length, q, k, v, readers, read, *, interpret):
    """float32 results [B, H, N, e], and two of [B, H, I, 1, rows]."""
    rows, keys = self.sizes.rows, self.sizes.keys
    batch, heads, num_rows, dim = q.shape
    width = v.shape[3]

    def of_rows(b, h, t, items):
      return b, h, self.item(items, b, t).query, 0

    def of_keys(b, h, t, items):
      head = jax.lax.div(h, np.int32(self.group))
      return b, head, self.item(items, b, t).key, 0

    def of_readers(b, h, t, items):
      example = b if readers.shape[0] > 1 else 0
      return example, 0, self.item(items, b, t).query

    def of_read(b, h, t, items):
      example = b if read.shape[0] > 1 else 0
      return example, 0, self.item(items, b, t).key

    numbers = pl.BlockSpec(
      (None, None, None, 1, rows), lambda *at: (*of_rows(*at), 0)
    )
    shape = batch, heads, readers.shape[2] // rows, 1, rows
    scores = batch * heads * num_rows * self.num_keys
    return pl.pallas_call(
      functools.partial(_kernel, tiles=self),
      out_shape=[
        compat.result_like((batch, heads, num_rows, width), jnp.float32, q),
        *[compat.result_like(shape, jnp.float32, q)] * 2,
      ],
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(batch, heads, length),
        in_specs=[
          pl.BlockSpec((None, None, rows, dim), of_rows),
          pl.BlockSpec((None, None, keys, dim), of_keys),
          pl.BlockSpec((None, None, keys, width), of_keys),
          pl.BlockSpec((None, _FIELDS, rows), of_readers),
          pl.BlockSpec((None, _FIELDS, keys), of_read),
        ],
        out_specs=[
          pl.BlockSpec((None, None, rows, width), of_rows),
          numbers,
          numbers,
        ],
        scratch_shapes=[
          pltpu.VMEM((rows, _LANES), jnp.float32),
          pltpu.VMEM((rows, _LANES), jnp.float32),
          pltpu.VMEM((rows, width), jnp.float32),
        ],
      ),
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"),
        vmem_limit_bytes=_VMEM_LIMIT_BYTES,
      ),
      # As if no block were empty: how many are is not known here.
      cost_estimate=pl.CostEstimate(
        flops=2 * scores * (dim + width),
        transcendentals=scores,
        bytes_accessed=q.nbytes
        + (k.nbytes + v.nbytes) * self.group * shape[2]
        + 4 * batch * heads * num_rows * width,
      ),
      interpret=interpret,
      name="rule_attention",
    )(items, q, k, v, readers, read)

  def item(self, items, b, t):
    """Item t of the list of an example."""
    item = items[self.list_stride * b + t]

    def part(start, bits):
      return jax.lax.shift_right_logical(item, start) & ((1 << bits) - 1)

    return _Item(
      query=jax.lax.shift_right_logical(item, _PAIR + self.key_bits),
      key=part(_PAIR, self.key_bits),
      kind=part(_KIND, _PAIR - _KIND),
      first=part(_FIRST, 1) == 1,
      last=part(_LAST, 1) == 1,
    )


class _Item(NamedTuple):
  """A block of queries that meets one of keys."""

  query: Any
  key: Any
  kind: Any
  first: Any  # of this block of queries
  last: Any


def _kernel(
  items_ref,  # int32[lists * num_items], in scalar memory
  q_ref,  # [rows, d]           rows * d * itemsize bytes, twice
  k_ref,  # [keys, d]           keys * d * itemsize, twice
  v_ref,  # [keys, e]           keys * e * itemsize, twice
  readers_ref,  # int32[8, rows]
  read_ref,  # int32[8, keys]
  out_ref,  # f32[rows, e]      4 * rows * e, twice
  lse_ref,  # f32[1, rows]
  highest_ref,  # f32[1, rows]
  top_ref,  # scratch f32[rows, 128], a number of each row in all lanes
  total_ref,  # scratch f32[rows, 128], to be summed over lanes
  sum_ref,  # scratch f32[rows, e]
  *,
  tiles,
):
  # On top: scores, their masked copy, exponentials, 4 * rows * keys each.
  rows, keys = tiles.sizes.rows, tiles.sizes.keys
  edge = tiles.num_keys % keys > 0
  item = tiles.item(items_ref, pl.program_id(0), pl.program_id(2))

  @pl.when(item.first)
  def _():
    top_ref[...] = jnp.full(top_ref.shape, _LOWEST, jnp.float32)
    total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
    sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)

  def mask():
    by_row = readers_ref[...].T  # [rows, 8]
    fields = range(len(Tokens._fields))
    readers = Tokens(*(by_row[:, i : i + 1] for i in fields))
    read = Tokens(*(read_ref[i : i + 1, :] for i in fields))
    allowed = jnp.broadcast_to(tiles.rule(readers, read), (rows, keys))
    return allowed & real((rows, keys), 1) if edge else allowed

  def real(shape, axis):
    """Which keys exist."""
    left = tiles.num_keys - item.key * keys
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis) < left

  def add(masked):
    scores = tiles.scale * _product(q_ref[...], k_ref[...], 1)
    v = v_ref[...]
    if masked:
      scores = jnp.where(mask(), scores, _HIDDEN)
    if masked and edge:  # 0 * NaN is NaN
      v = jnp.where(real(v.shape, 0), v.astype(jnp.float32), 0).astype(v.dtype)
    old = top_ref[...]
    top = jnp.maximum(old, jnp.max(scores, axis=1, keepdims=True))
    weights = jnp.exp2(scores - jnp.tile(top, (1, keys // _LANES)))
    shrink = jnp.exp2(old - top)
    total = shrink * total_ref[...]
    for start in range(0, keys, _LANES):
      total += weights[:, start : start + _LANES]
    shrink = _to_width(shrink, v.shape[1])
    sum_ref[...] = shrink * sum_ref[...] + _product(
      weights.astype(v.dtype), v, 0
    )
    top_ref[...] = top
    total_ref[...] = total

  pl.when(item.kind == mask_rules.PARTIAL)(lambda: add(masked=True))
  pl.when(item.kind == mask_rules.FULL)(lambda: add(masked=False))

  @pl.when(item.last)
  def _():
    top = top_ref[...]
    total = jnp.sum(total_ref[...], axis=1, keepdims=True)
    total = jnp.broadcast_to(total, top.shape)
    nothing = total == 0  # what was read has a weight of 1, its highest
    some = jnp.where(nothing, 1.0, total)
    out_ref[...] = sum_ref[...] / _to_width(some, sum_ref.shape[1])
    for ref, found in (
      (lse_ref, top + jnp.log2(some)),
      (highest_ref, top),
    ):
      found = jnp.where(nothing, -jnp.inf, found * math.log(2))
      ref[...] = found.T[:1]  # from sublanes to lanes


def _product(x, y, axis):
  """Sums over the last axis of x and this one of y, in float32."""
  return jax.lax.dot_general(
    x,
    y,
    (((1,), (axis,)), ((), ())),
    # By default the matrix unit rounds float32 operands to bfloat16.
    precision="highest" if x.dtype == jnp.float32 else None,
    preferred_element_type=jnp.float32,
  )


def _to_width(x, width):
  """[rows, 128] with equal lanes -> [rows, width]."""
  return jnp.tile(x, (1, pl.cdiv(width, _LANES)))[:, :width]


def _bits(lists):
  """Of an item, for its block of keys."""
  return (lists.index.shape[2] - 1).bit_length()


def _in_a_row(lists):
  """Items of all blocks of queries of an example [B, n * m], and how many.

  A block that reads nothing has one all the same, to be written. Past the end
  stands the last pair again, with nothing to do.
  """
  shape = lists.index.shape
  block, slot = (
    jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (1, 2)
  )
  count = jnp.maximum(lists.count, 1)
  last = slot == count[..., None] - 1
  pair = (block << _bits(lists)) + lists.index
  work = (
    (lists.kind << _KIND)
    + ((slot == 0).astype(jnp.int32) << _FIRST)
    + (last.astype(jnp.int32) << _LAST)
  )
  pair, work = (x.reshape(shape[0], -1) for x in (pair, work))
  # The t-th item is of the first block that ends after t.
  end = jnp.cumsum(count, axis=1)
  t = jax.lax.broadcasted_iota(jnp.int32, pair.shape, 1)
  real = t < end[:, -1:]
  t = jnp.minimum(t, end[:, -1:] - 1)
  block = jnp.sum(t[..., None] >= end[:, None], axis=2, dtype=jnp.int32)
  start = jnp.take_along_axis(end - count, block, axis=1)
  place = block * shape[2] + t - start
  pair, work = (jnp.take_along_axis(x, place, axis=1) for x in (pair, work))
  return (pair << _PAIR) + jnp.where(real, work, 0), end[:, -1]


def _fields(given, size):
  """int32[B or 1, 8, N], whole blocks; the last token fills up."""
  fields = jnp.stack(jnp.broadcast_arrays(*given), axis=-2)
  fields = fields if fields.ndim == 3 else fields[None]
  missing = -fields.shape[2] % size
  fields = jnp.pad(fields, ((0, 0), (0, 0), (0, missing)), mode="edge")
  return jnp.pad(fields, ((0, 0), (0, _FIELDS - fields.shape[1]), (0, 0)))


def _at_least(x, size):
  """Zeros after the rows [B, H, N, d], up to a size."""
  missing = max(0, size - x.shape[2])
  return jnp.pad(x, ((0, 0), (0, 0), (0, missing), (0, 0)))

"""AnchorAttention: causal attention to the keys that may matter.

    config = AnchorConfig(theta=12.0)
    read, stats = anchor_attention(q, k, v, config)  # read.out: [B, H, N, e]

For the prompt of a language model, layer by layer, nothing trained. Every row
reads the first keys and the last ones; the highest logit among these is its
anchor. Rows in a row choose together which of the other keys they read, the
stripes: those whose logit with a mean of the rows comes within theta of the
mean of their anchors. How many that are is up to the data.

With b = `block` and groups of b * `step` rows, the keys j <= n that row n of a
group from row f on reads fall into two parts, which `merge` makes one:

    j < b, or j >= f - b                 exactly, `anchor_state`
    b <= j < f - b, if a stripe          `stripe_select`, `stripe_attention`

Both are `row_groups.read_between` of the keys of a group laid side by side: the
blocks past its last stripe are left out.

Source: Zhang et al. (2025), "AnchorAttention: Difference-Aware Sparse Attention
with Stripe Granularity". Means, ranges and theta are those of the reference
code's first version (later ones count some keys twice and leave others out).
Ours: capacities and what is done past them, segments, gradients, `recall`.
"""

import dataclasses
import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.ops import attention, packing
from tokjax.ops.attention import AttentionState
from tokjax.sparse import causal_heads, row_groups
from tokjax.sparse.causal_heads import recall
from tokjax.typing import Array, Float, Implementation, Int, Int32

__all__ = [
  "AnchorConfig",
  "AnchorState",
  "AnchorStats",
  "Stripes",
  "anchor_attention",
  "anchor_state",
  "recall",
  "stripe_attention",
  "stripe_select",
]


@dataclasses.dataclass(unsafe_hash=True)
class AnchorConfig:
  """Which keys are read; the published setting but for `max_stripes`."""

  block: int = 128  # b: first keys, rows of a mean
  step: int = 16  # means that choose together
  # How far below its anchor a logit counts, in nats; may be traced.
  theta: float | Float[Array, ""] = 12.0
  max_stripes: int = 8192  # room for those chosen, of at most all keys (ours)
  # What is read where more are chosen (ours): the nearest to their anchors,
  # every key, or the first.
  overflow: Literal["top", "dense", "truncate"] = "top"
  # Rows and keys of the largest square of logits that "xla" holds at once
  # (ours). On two CPU cores, 16,384 tokens, a tenth of the pairs kept: 128, 256
  # and 512 take 88, 97 and 81 ms.
  largest_tile: int = 512


class AnchorState(NamedTuple):
  """Attention over the first and last keys.

  Attributes:
    read: what was read there.
    anchor: the highest logit among them, float32; -inf for padding.
  """

  read: AttentionState
  anchor: Float[Array, "*batch H N"]


class Stripes(NamedTuple):
  """Keys that the G groups of rows read besides.

  Attributes:
    index: ascending positions, the last one in rows without a stripe.
    count: how many were chosen, also where there was no room.
    overflow: how many of them found no room; 0 for rows that fill no group,
      which read every key anyway.
  """

  index: Int32[Array, "*batch H G S"]
  count: Int32[Array, "*batch H G"]
  overflow: Int32[Array, "*batch H G"]


class AnchorStats(NamedTuple):
  """What a call has done.

  Attributes:
    count: see `Stripes`.
    overflow: see `Stripes`.
    kept_fraction: how many of the pairs of causal attention were read.
  """

  count: Int32[Array, "*batch H G"]
  overflow: Int32[Array, "*batch H G"]
  kept_fraction: Float[Array, "*batch H"]


def anchor_attention(
  q: Float[Array, "B H N d"],
  k: Float[Array, "B K N d"],
  v: Float[Array, "B K N e"],
  config: AnchorConfig,
  *,
  segment_ids: Int[Array, "B N"] | None = None,
  implementation: Implementation | None = None,
) -> tuple[AttentionState, AnchorStats]:
  """softmax(q k^T / sqrt(d)) v over the first, the last and chosen keys.

  The rows after the last whole group read all keys before them, as published.
  Gradients pass through what was read, none through the choice.

  Args:
    q: queries, float32 or bfloat16, with their positions in.
    k: keys; K divides H, and H / K query heads in a row share a key head.
    v: values.
    config: static but for `theta`.
    segment_ids: sequences packed in one: equal ids in a row are one of them,
      with first keys of its own. Negative ids are padding, which nothing
      reads, whatever it holds, and which reads nothing. None: one sequence.
    implementation: of the attention to what is read, see
      `tokjax.kernels.sparse_attention.rule_attention`.

  Returns:
    What was read, float32, which `attention.merge` can add to; and how much.
    With theta = inf and room for all keys that is causal attention.

  Raises:
    ValueError: if sizes disagree or a setting is impossible.

  Example:
    >>> k = jnp.array([2, 0, 1.5, -3, 1, 0])[None, None, :, None]
    >>> v = jnp.arange(6.0)[None, None, :, None]
    >>> config = AnchorConfig(block=1, step=2, theta=0.6)
    >>> read, stats = jax.jit(anchor_attention, static_argnames="config")(
    ...   jnp.ones_like(v), k, v, config)
    >>> [round(x, 3) for x in read.out[0, 0, :, 0].tolist()]
    [0.0, 0.119, 0.774, 0.783, 1.365, 1.598]
    >>> stats.count.tolist()
    [[[0, 0, 1]]]

  Cost: 4 d FLOPs for each pair that is read and N^2 d / b for the choice, a
  head. A head holds O(N) values, a square of logits of one tile, G *
  max_stripes positions, and the keys and values of one group (kernels: of
  eight); heads follow one another. Mapped by `jax.vmap`, nothing is skipped:
  the keys that are left out are masked.

  On an Explicit mesh batch and heads may be sharded.
  """
  state = anchor_state(
    q, k, v, config, segment_ids=segment_ids, implementation=implementation
  )
  stripes = stripe_select(q, k, state.anchor, config, segment_ids=segment_ids)
  read = stripe_attention(
    state.read,
    q,
    k,
    v,
    stripes.index,
    stripes.count,
    config,
    segment_ids=segment_ids,
    implementation=implementation,
  )
  kept = _kept_fraction(q, k, stripes, config, segment_ids)
  return read, AnchorStats(stripes.count, stripes.overflow, kept)


def anchor_state(
  q: Float[Array, "B H N d"],
  k: Float[Array, "B K N d"],
  v: Float[Array, "B K N e"],
  config: AnchorConfig,
  *,
  segment_ids: Int[Array, "B N"] | None = None,
  implementation: Implementation | None = None,
) -> AnchorState:
  """Attention over the first block of keys and those near the row.

  Near are the block before the group and the group itself up to the row.

  Args:
    q: as in `anchor_attention`, and so are the rest.
    k: keys.
    v: values.
    config: of which `block` and `step` are read.
    segment_ids: packed sequences and padding.
    implementation: as above.

  Returns:
    What was read, and the anchors, which pass no gradient.

  Raises:
    ValueError: as `anchor_attention`.

  Example:
    >>> x = jnp.array([2, 0, 4, 1, 1, 1])[None, None, :, None] / 2
    >>> config = AnchorConfig(block=1, step=2)
    >>> first = jax.jit(anchor_state, static_argnames="config")
    >>> first(jnp.ones_like(x), x, x, config).anchor[0, 0].tolist()
    [1.0, 1.0, 2.0, 2.0, 1.0, 1.0]

  Cost: 4 d N (2 b + b * step / 2) FLOPs a head, more by the half of a tile.
  """
  _check(config, segment_ids, q, k, v)
  block, _, group = _sizes(config)

  def head(q, k, v, start):
    num_rows = q.shape[0]
    q, k, v, start = _whole_groups(config, start, q, k, v)
    row = jnp.arange(q.shape[0])

    def groups(implementation, arrays):
      queries, row, start = arrays  # [c, rows of a group, ...]
      first = row[:, :1]
      sink = start[:, :1] + jnp.arange(block)[None]
      near = first - block + jnp.arange(block + group)[None]
      position = jnp.concatenate([sink, near], axis=1)
      valid = jnp.concatenate([sink < first - block, near >= 0], axis=1)
      keys, values = (
        jnp.take(x, position, axis=0, mode="clip") for x in (k, v)
      )
      unread = q.shape[0]  # comes after every row
      return row_groups.read_between(
        queries,
        keys,
        values,
        start,
        row,
        jnp.where(valid, position, unread),
        largest_tile=config.largest_tile,
        implementation=implementation,
      )

    found = row_groups.each_group(
      groups, implementation, group, (q, row, start)
    )
    read = AttentionState(found.out, found.lse)
    return jax.tree.map(
      lambda x: x[:num_rows], AnchorState(read, found.highest)
    )

  return causal_heads.each_head(head, q, (k, v), segment_ids)


def stripe_select(
  q: Float[Array, "B H N d"],
  k: Float[Array, "B K N d"],
  anchor: Float[Array, "B H N"],
  config: AnchorConfig,
  *,
  segment_ids: Int[Array, "B N"] | None = None,
) -> Stripes:
  """The keys in the middle that come near the anchors of a group of rows.

  A key is chosen if, for one block of the group,

      mean(q) k / sqrt(d) >= mean(anchor) - theta

  with the means over the rows of the block that can read it. No sort: the
  chosen are counted and written to where they belong, and only where there
  are too many the nearest are searched for.

  Args:
    q: as in `anchor_attention`.
    k: keys.
    anchor: see `anchor_state`.
    config: static.
    segment_ids: packed sequences and padding.

  Returns:
    The stripes of every head, `max_stripes` or N of them. No gradient passes.

  Raises:
    ValueError: as `anchor_attention`.

  Example:
    >>> x = jnp.array([2, 0, 1.5, -3, 1, 0])[None, None, :, None]
    >>> config = AnchorConfig(block=1, step=2, theta=0.6, max_stripes=2)
    >>> choose = jax.jit(stripe_select, static_argnames="config")
    >>> found = choose(0 * x + 1, x, jnp.full((1, 1, 6), 2.0), config)
    >>> found.index[0, 0, 2].tolist(), found.count[0, 0, 2].item()
    ([2, 5], 1)

  Cost: 2 d N^2 / b FLOPs a head.
  """
  _check(config, segment_ids, q, k)
  block, step, group = _sizes(config)
  num_keys = q.shape[2]
  room = min(config.max_stripes, num_keys)
  tail = _tail(config, num_keys)

  def head(q, k, start, anchor):
    pad = -num_keys % group
    anchor = jnp.pad(anchor, (0, pad), constant_values=-jnp.inf)
    q, k, start = _whole_groups(config, start, q, k)
    begin = start[::group]  # of what the group's rows read behind it
    reads = _readers(start, begin).reshape(-1, step, block)
    number = jnp.sum(reads, axis=-1, dtype=jnp.float32)

    def means(x):
      x = x.reshape(*reads.shape, -1).astype(jnp.float32)
      total = jnp.sum(jnp.where(reads[..., None], x, 0), axis=2)
      return total / jnp.maximum(number, 1)[..., None]

    keys = k[:num_keys].astype(jnp.float32)
    position = jnp.arange(num_keys)

    def choose(arrays):
      i, query, anchor, number, begin = arrays
      logits = jnp.matmul(query, keys.T, precision="highest")
      logits = logits * keys.shape[-1] ** -0.5
      above = jnp.where(number[:, None] > 0, logits - anchor, -jnp.inf)
      above = jnp.max(above, axis=0)  # [N]
      behind = (position >= begin + block) & (position < i * group - block)
      chosen = behind & ((above >= -config.theta) | (i == tail))
      count = jnp.sum(chosen, dtype=jnp.int32)
      index = _compact(chosen, room)
      if config.overflow == "top":
        index = jax.lax.cond(
          count > room,
          lambda: packing.pack(chosen, room, above).index,
          lambda: index,
        )
      more = jnp.where(i == tail, 0, jnp.maximum(count - room, 0))
      return Stripes(index, count, more)

    groups = jnp.arange(begin.shape[0], dtype=jnp.int32)
    return jax.lax.map(choose, (groups, means(q), means(anchor), number, begin))

  q, k, anchor = jax.lax.stop_gradient((q, k, anchor))
  return causal_heads.each_head(head, q, (k,), segment_ids, anchor)


def stripe_attention(
  state: AttentionState,
  q: Float[Array, "B H N d"],
  k: Float[Array, "B K N d"],
  v: Float[Array, "B K N e"],
  index: Int32[Array, "B H G S"],
  count: Int32[Array, "B H G"],
  config: AnchorConfig,
  *,
  segment_ids: Int[Array, "B N"] | None = None,
  implementation: Implementation | None = None,
) -> AttentionState:
  """Goes on from the anchors' state with the stripes.

  The keys of a group are gathered once, for all its rows.

  Args:
    state: see `anchor_state`.
    q: as in `anchor_attention`.
    k: keys.
    v: values.
    index: see `Stripes`.
    count: see `Stripes`. Where it is above S, `overflow` says whether the S
      stripes are read or all keys between the first and the last; the rows
      that fill no group read all of them.
    config: static.
    segment_ids: packed sequences and padding.
    implementation: as above.

  Returns:
    What was read in both.

  Raises:
    ValueError: as `anchor_attention`.

  Example:
    >>> x = jnp.zeros((1, 1, 6, 1))
    >>> state = AttentionState(x, x[..., 0])
    >>> index = jnp.array([[[[5], [5], [1]]]], dtype=jnp.int32)
    >>> count = jnp.array([[[0, 0, 1]]], dtype=jnp.int32)
    >>> jax.jit(stripe_attention, static_argnames="config")(
    ...   state, x, x, x + 1, index, count, AnchorConfig(block=1, step=2)
    ... ).out[0, 0, :, 0].tolist()
    [0.0, 0.0, 0.0, 0.0, 0.5, 0.5]

  Cost: 4 d FLOPs for each row and stripe, tiles being filled up; count * d
  values gathered a group.
  """
  _check(config, segment_ids, q, k, v)
  block, _, group = _sizes(config)
  tail = _tail(config, q.shape[2])
  room = index.shape[-1]

  def head(q, k, v, start, state, index, count):
    num_rows = q.shape[0]
    q, k, v, start = _whole_groups(config, start, q, k, v)
    reads = _readers(start, start[::group])
    number = jnp.arange(count.shape[0])
    every = _reads_all(config, count, room, number == tail)

    def limits(first, end):
      """Of rows: what those read that read behind their group."""
      end = jnp.where(reads, jnp.repeat(end, group), 0)
      return jnp.broadcast_to(first, end.shape), end - 1

    def read(implementation, *asked):
      return row_groups.read_between(
        *asked,
        largest_tile=config.largest_tile,
        implementation=implementation,
      )

    @functools.partial(jax.checkpoint, static_argnums=0)
    def groups(implementation, arrays):
      queries, first, last, index = arrays
      keys, values = (jnp.take(x, index, axis=0) for x in (k, v))
      slot = jnp.broadcast_to(jnp.arange(room)[None], index.shape)
      return read(implementation, queries, keys, values, first, last, slot)

    chosen = jnp.where(every, 0, jnp.minimum(count, room))
    rows = q, *limits(0, chosen)
    parts = [row_groups.each_group(groups, implementation, group, rows, index)]
    if config.overflow == "dense" or tail >= 0:
      behind = jnp.where(every, number * group - block, 0)
      asked = q, k, v, *limits(start + block, behind), jnp.arange(k.shape[0])
      found = read(implementation, *(x[None] for x in asked))
      parts.append(jax.tree.map(lambda x: x[0], found))
    for part in parts:
      part = AttentionState(part.out[:num_rows], part.lse[:num_rows])
      state = attention.merge(state, part)
    return state

  return causal_heads.each_head(
    head, q, (k, v), segment_ids, state, index, count
  )


def _check(config, segment_ids, q, k, v=None):
  checks.in_range(
    1,
    1 << 30,
    block=config.block,
    step=config.step,
    max_stripes=config.max_stripes,
    largest_tile=config.largest_tile,
  )
  checks.one_of(("top", "dense", "truncate"), overflow=config.overflow)
  checks.has_rank(4, q=q, k=k, v=v)
  for name, x in dict(k=k, v=k if v is None else v).items():
    checks.divisible(x.shape[1], heads_of_q=q.shape[1])
    checks.same_size(**{"q_tokens": q.shape[2], f"{name}_tokens": x.shape[2]})
  if segment_ids is not None:
    checks.same_size(q_tokens=q.shape[2], segment_ids=segment_ids.shape[1])


def _sizes(config):
  return config.block, config.step, config.block * config.step


def _tail(config, num_rows):
  """The group that has too few rows, -1 for none."""
  *_, group = _sizes(config)
  return num_rows // group if num_rows % group else -1


def _whole_groups(config, start, *arrays):
  """Arrays and starts of a head filled up to whole groups; padding is 0."""
  *_, group = _sizes(config)
  num_rows = start.shape[0]
  pad = -num_rows % group
  valid = start <= jnp.arange(num_rows)
  arrays = (jnp.where(valid[:, None], x, 0) for x in arrays)
  arrays = (jnp.pad(x, ((0, pad), (0, 0))) for x in arrays)
  fill = num_rows + pad  # no row is there
  start = jnp.where(valid, start, fill)
  return *arrays, jnp.pad(start, (0, pad), constant_values=fill)


def _readers(start, begin):
  """True for rows that read what lies behind their group.

  Segments being runs, only the one of a group's first row can.
  """
  begin = jnp.repeat(begin, start.shape[0] // begin.shape[0])
  return (start == begin) & (start < start.shape[0])


def _reads_all(config, count, room, is_tail):
  """Whether a group reads all keys behind it for want of room."""
  return (count > room) & (is_tail | (config.overflow == "dense"))


def _kept_fraction(q, k, stripes, config, segment_ids):
  """Pairs that were read, of all that causal attention reads: [B, H]."""
  block, _, group = _sizes(config)
  room, tail = stripes.index.shape[-1], _tail(config, q.shape[2])

  def head(q, k, start, count):
    (start,) = _whole_groups(config, start)
    row = jnp.arange(start.shape[0])
    pairs = jnp.where(start < start.shape[0], row - start + 1, 0)
    behind = jnp.maximum(row // group * group - block - start, 0)
    between = jnp.maximum(behind - block, 0)  # what stripes are chosen from
    every = _reads_all(config, count, room, jnp.arange(count.shape[0]) == tail)
    read = jnp.where(every, between[::group], jnp.minimum(count, room))
    rows = jnp.sum(_readers(start, start[::group]).reshape(-1, group), axis=1)
    total, exact, more = (
      jnp.sum(x, dtype=jnp.float32)
      for x in (pairs, pairs - between, rows.astype(jnp.float32) * read)
    )
    return (exact + more) / jnp.maximum(total, 1)

  return causal_heads.each_head(head, q, (k,), segment_ids, stripes.count)


def _compact(chosen, room):
  """Ascending positions of the first True, then the last position."""
  size = chosen.shape[0]
  place = jnp.where(chosen, jnp.cumsum(chosen) - 1, room)
  position = jnp.arange(size, dtype=jnp.int32)
  index = jnp.full_like(position, size - 1, shape=(room,))
  return index.at[place].set(position, mode="drop")

"""Who may read whom, as a rule about two tokens instead of an array.

    query_tokens = tokens(100, kind=kinds, segment=segments)
    may_read(every(causal, same_segment), query_tokens, query_tokens)
    # bool[100, 100]

A rule is a function of two `Tokens`, the one that reads and the one that is
read, made of `<`, `<=`, `==`, `+`, `-`, `&`, `|` and `~`. It is asked about
tokens, or about blocks of them of which only the range of each field is known
(`Span`): then it says whether some pair and whether every pair of the two
blocks may read, which is what attention needs to leave blocks out
(`block_kinds`, `tokjax.kernels.sparse_attention`). Blocks are judged with
care: a block said to be empty is, one said to be full is.

Masks as constants, for few tokens: `tokjax.ops.attention_masks`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.typing import Array, Bool, Int

__all__ = [
  "EMPTY",
  "FULL",
  "PARTIAL",
  "TEXT",
  "VISUAL",
  "Known",
  "Rule",
  "Span",
  "Tokens",
  "apart",
  "block_kinds",
  "causal",
  "cut_tokens",
  "every",
  "level_causal",
  "local",
  "may_read",
  "neighbours",
  "no_visual_pairs",
  "same_segment",
  "tokens",
]

EMPTY, PARTIAL, FULL = 0, 1, 2
TEXT, VISUAL = 0, 1


class Tokens(NamedTuple):
  """What a rule may ask of tokens; each field int32 [N] or [B, N].

  Attributes:
    position: place in the sequence.
    segment: the packed sequence that a token belongs to.
    kind: `TEXT`, `VISUAL`, or others of one's own.
    level: scale, diagonal or cell, in the order of generation.
    group: the set that a token is one of.
    row: of the map that a visual token is from.
    column: likewise.
  """

  position: Any
  segment: Any
  kind: Any
  level: Any
  group: Any
  row: Any
  column: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Span:
  """Numbers of which only the least and the greatest are known.

  Attributes:
    low: the least.
    high: the greatest.
  """

  low: Any
  high: Any

  def __add__(self, other):
    other = _span(other)
    return Span(self.low + other.low, self.high + other.high)

  def __sub__(self, other):
    other = _span(other)
    return Span(self.low - other.high, self.high - other.low)

  def __le__(self, other):
    other = _span(other)
    return Known(self.low <= other.high, self.high <= other.low)

  def __lt__(self, other):
    other = _span(other)
    return Known(self.low < other.high, self.high < other.low)

  def __ge__(self, other):
    return _span(other) <= self

  def __gt__(self, other):
    return _span(other) < self

  def __eq__(self, other):
    other = _span(other)
    same = (self.low == other.high) & (self.high == other.low)
    return (self <= other) & (self >= other) & Known(True, same)

  def __ne__(self, other):
    return ~(self == other)

  __hash__ = None


@dataclasses.dataclass(frozen=True)
class Known:
  """What is known of a statement about pairs of two blocks.

  Attributes:
    some: False: of no pair is it true.
    all: True: it is true of every pair.
  """

  some: Any
  all: Any

  def __and__(self, other):
    return Known(self.some & other.some, self.all & other.all)

  def __or__(self, other):
    return Known(self.some | other.some, self.all | other.all)

  def __invert__(self):
    return Known(jnp.logical_not(self.all), jnp.logical_not(self.some))


Rule = Callable[[Tokens, Tokens], Any]


def tokens(num_tokens: int, **fields: Int[Array, "*B N"]) -> Tokens:
  """Tokens in a row.

  Args:
    num_tokens: N.
    **fields: of `Tokens`, each [N] or [B, N]. Not given, a position is the
      index and everything else 0.

  Returns:
    int32 fields.

  Raises:
    ValueError: for an unknown field or one of another length.

  Example:
    >>> tokens(3, kind=jnp.array([0, 1, 1])).position.tolist()
    [0, 1, 2]
  """
  for name, field in fields.items():
    checks.one_of(Tokens._fields, field=name)
    checks.same_size(num_tokens=num_tokens, **{name: field.shape[-1]})
  start = {name: jnp.zeros(num_tokens, jnp.int32) for name in Tokens._fields}
  start["position"] = jnp.arange(num_tokens, dtype=jnp.int32)
  given = {name: jnp.asarray(x, jnp.int32) for name, x in fields.items()}
  return Tokens(**(start | given))


def causal(reader: Tokens, read: Tokens):
  """What came before, and oneself.

  Example:
    >>> may_read(causal, tokens(2), tokens(2)).tolist()
    [[True, False], [True, True]]
  """
  return read.position <= reader.position


def local(window: int) -> Rule:
  """Fewer than `window` positions away, on both sides.

  Example:
    >>> rule = every(causal, local(2))
    >>> may_read(rule, tokens(3), tokens(3)).astype(int).tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
  """

  def rule(reader, read):
    away = reader.position - read.position
    return (away < window) & (away > -window)

  return rule


def same_segment(reader: Tokens, read: Tokens):
  """Of the same packed sequence.

  Example:
    >>> packed = tokens(3, segment=jnp.array([0, 0, 1]))
    >>> may_read(same_segment, packed, packed).astype(int).tolist()
    [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
  """
  return reader.segment == read.segment


def level_causal(reader: Tokens, read: Tokens):
  """Of the same level or one before: next-scale, diagonal and cell orders.

  Source: the scale-causal attention of HieraTok and VAR, the block-causal one
  of NAR and xAR.

  Example:
    >>> scales = tokens(5, level=jnp.array([0, 1, 1, 1, 1]))
    >>> may_read(level_causal, scales, scales).sum(axis=1).tolist()
    [1, 5, 5, 5, 5]
  """
  return read.level <= reader.level


def apart(reader: Tokens, read: Tokens):
  """Nobody else of the own group: items that are sets do not read themselves.

  Tokens that are in no set need a group each.

  Source: the sparse mask of SETRec, together with `causal`.

  Example:
    >>> sets = tokens(3, group=jnp.array([0, 0, 1]))
    >>> may_read(apart, sets, sets).astype(int).tolist()
    [[1, 0, 1], [0, 1, 1], [1, 1, 1]]
  """
  other = reader.group != read.group
  return other | (reader.position == read.position)


def no_visual_pairs(reader: Tokens, read: Tokens):
  """Causal, but a visual token reads no other visual token.

  Source: NAAViT of SAISA; that it reads itself and the text before it is ours.

  Example:
    >>> mixed = tokens(3, kind=jnp.array([VISUAL, VISUAL, TEXT]))
    >>> may_read(no_visual_pairs, mixed, mixed).astype(int).tolist()
    [[1, 0, 0], [0, 1, 0], [1, 1, 1]]
  """
  itself = reader.position == read.position
  pair = (reader.kind == VISUAL) & (read.kind == VISUAL)
  return causal(reader, read) & (~pair | itself)


def neighbours(window: int) -> Rule:
  """Causal, but visual tokens read those of a square window, all around them.

  Args:
    window: side of the square, odd.

  Raises:
    ValueError: if the side is even.

  Source: neighbour-aware attention of "YOPO" pruning of LLaVA.

  Example:
    >>> places = jnp.arange(9)
    >>> picture = tokens(9, kind=0 * places + VISUAL, row=places // 3,
    ...                  column=places % 3)
    >>> may_read(neighbours(3), picture, picture).sum(axis=1).tolist()
    [4, 6, 4, 6, 9, 6, 4, 6, 4]
  """
  checks.divisible(2, window_minus_1=window - 1)
  reach = window // 2

  def rule(reader, read):
    down, right = reader.row - read.row, reader.column - read.column
    near = (down <= reach) & (down >= -reach)
    near = near & (right <= reach) & (right >= -reach)
    pair = (reader.kind == VISUAL) & (read.kind == VISUAL)
    return (pair & near) | (~pair & causal(reader, read))

  return rule


def every(*rules: Rule) -> Rule:
  """What all of some rules allow.

  Example:
    >>> may_read(every(causal), tokens(1), tokens(1)).item()
    True
  """

  def rule(reader, read):
    found = [one(reader, read) for one in rules]
    allowed = found[0]
    for more in found[1:]:
      allowed = allowed & more
    return allowed

  return rule


def may_read(
  rule: Rule, readers: Tokens, read: Tokens
) -> Bool[Array, "N M"] | Bool[Array, "B N M"]:
  """The rule for all pairs, as attention takes it; for tiles and tests.

  Args:
    rule: of this module, or one's own.
    readers: N tokens.
    read: M tokens.

  Returns:
    True where a reader may read.

  Example:
    >>> may_read(local(1), tokens(2), tokens(2)).tolist()
    [[True, False], [False, True]]
  """
  pairs = _pairs(readers, read)
  return jnp.broadcast_to(rule(*pairs), _shape(pairs))


def block_kinds(
  rule: Rule,
  readers: Tokens,
  read: Tokens,
  *,
  block_size: int | tuple[int, int],
) -> Int[Array, "*B n m"]:
  """What of each pair of blocks may be read: nothing, some or everything.

  Args:
    rule: as of `may_read`.
    readers: N tokens.
    read: M tokens.
    block_size: tokens of a block, or readers and read of one.

  Returns:
    int8: `EMPTY`, `PARTIAL` or `FULL`; PARTIAL also where the ranges do not
    tell. Of each example where a field has a batch axis.

  Example:
    >>> block_kinds(causal, tokens(4), tokens(4), block_size=2).tolist()
    [[1, 0], [2, 1]]
  """
  sizes = (
    (block_size, block_size) if isinstance(block_size, int) else block_size
  )
  low, high = (
    _pairs(
      *(
        jax.tree.map(functools.partial(most, axis=-1), cut_tokens(x, n))
        for x, n in zip((readers, read), sizes, strict=True)
      )
    )
    for most in (jnp.min, jnp.max)
  )
  spans = (Tokens(*map(Span, *ends)) for ends in zip(low, high, strict=True))
  known = rule(*spans)
  kinds = jnp.where(known.all, FULL, jnp.where(known.some, PARTIAL, EMPTY))
  return jnp.broadcast_to(kinds, _shape(low)).astype(jnp.int8)


def cut_tokens(given: Tokens, size: int) -> Tokens:
  """Tokens in blocks; the last token fills up the last block.

  Args:
    given: fields [N] or [B, N].
    size: tokens of a block.

  Returns:
    Fields [n, size] or [B, n, size] of n = ceil(N / size) blocks.

  Example:
    >>> cut_tokens(tokens(3), 2).position.tolist()
    [[0, 1], [2, 2]]
  """

  def cut(x):
    missing = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % size)]
    x = jnp.pad(x, missing, mode="edge")
    return x.reshape(*x.shape[:-1], -1, size)

  return jax.tree.map(cut, given)


def _pairs(readers, read):
  """Fields of both, such that an operation of two is one of all pairs."""
  readers = jax.tree.map(lambda x: x[..., :, None], readers)
  read = jax.tree.map(lambda x: x[..., None, :], read)
  return _same_rank(readers, read), _same_rank(read, readers)


def _shape(pairs):
  """Of an answer about all pairs, whatever fields a rule asks for."""
  return jnp.broadcast_shapes(*(x.shape for x in jax.tree.leaves(pairs)))


def _span(x):
  return x if isinstance(x, Span) else Span(x, x)


def _same_rank(given, other):
  """Fields with a batch axis where any has one."""
  most = max(x.ndim for x in (*given, *other))
  return jax.tree.map(lambda x: x[None] if x.ndim < most else x, given)

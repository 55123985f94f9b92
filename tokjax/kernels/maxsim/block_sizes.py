"""Tile sizes of the TPU kernel of MaxSim, and the rule that picks them.

The rule works from powers of two, so that neighbouring shapes share a tile.
No TPU has timed it yet: it is built from the footprint of a tile and from the
cost of one grid step (about a third of a microsecond), and a measured table
would take its place.
"""

import dataclasses

from tokjax.checks import divisible, in_range

__all__ = ["BlockSizes", "default_block_sizes"]

# Values in one similarity tile: 2 MiB of float32. The kernel holds about three
# arrays of that size (similarities, masked similarities, positions), which
# with the double-buffered operands stays inside the 16 MiB that a TPU core
# grants a kernel by default.
_FORWARD_TILE = 1 << 19
# The backward holds the one-hot weights in float32 and as two bfloat16 parts.
_BACKWARD_TILE = 1 << 18
_LANES = 128
_MAX_ROWS = 512  # query rows of a tile: the ridge point of v6e in bfloat16
_MAX_QUERIES = 32  # the sum per query is unrolled
_MAX_TOKENS = 4096  # document rows of a tile: 1 MiB of bfloat16 at D = 128


@dataclasses.dataclass(frozen=True)
class BlockSizes:
  """What one grid step of the TPU kernel holds.

  Attributes:
    queries: queries in a tile; 1 where `query_tokens` cuts a query.
    query_tokens: query tokens in a tile, of each of its queries.
    documents: documents in a tile, a multiple of 8.
    document_tokens: tokens of each of those documents, a multiple of 16, and
      of 128 from 128 on.

  Raises:
    ValueError: if a size is out of range or no multiple.

  Example:
    >>> BlockSizes(4, 32, 16, 128).rows
    128
  """

  queries: int
  query_tokens: int
  documents: int
  document_tokens: int

  def __post_init__(self):
    in_range(1, _MAX_QUERIES, queries=self.queries)
    in_range(1, 1 << 12, query_tokens=self.query_tokens)
    in_range(8, 1 << 12, documents=self.documents)
    in_range(16, 1 << 14, document_tokens=self.document_tokens)
    divisible(8, documents=self.documents)
    step = _LANES if self.document_tokens >= _LANES else 16
    divisible(step, document_tokens=self.document_tokens)

  @property
  def rows(self) -> int:
    """Query rows of a tile, which lie along the lanes."""
    return self.queries * self.query_tokens

  @property
  def tokens(self) -> int:
    """Document rows of a tile, which lie along the sublanes."""
    return self.documents * self.document_tokens


def default_block_sizes(
  num_queries: int,
  query_tokens: int,
  num_documents: int,
  document_tokens: int,
  *,
  itemsize: int = 2,
  backward: bool = False,
) -> BlockSizes:
  """Tile sizes that fit the on-chip memory, from the shape alone.

  Query rows come first (up to 512, whole queries; a longer query is cut),
  since each document is read once per query tile. What the tile has left goes
  to document rows: many documents of 128 tokens, so that short documents skip
  work at a fine grain; more tokens of each where there are few documents.

  Args:
    num_queries: Nq.
    query_tokens: Q.
    num_documents: Nd.
    document_tokens: N.
    itemsize: bytes of one input value; float32 halves the tile.
    backward: whether the tile is for the backward kernels.

  Returns:
    The sizes. None exceeds its axis by more than the rounding.

  Example:
    >>> default_block_sizes(1, 32, 1000, 300)
    BlockSizes(queries=1, query_tokens=32, documents=32, document_tokens=128)
  """
  budget = (_BACKWARD_TILE if backward else _FORWARD_TILE) * 2 // itemsize
  max_rows = _MAX_ROWS // 2 if backward else _MAX_ROWS
  if query_tokens > max_rows:
    num_cuts = -(-query_tokens // max_rows)
    queries, query_tokens = 1, _round_up(-(-query_tokens // num_cuts), 8)
  else:
    queries = min(num_queries, _MAX_QUERIES, max_rows // query_tokens)
  rows = _round_up(queries * query_tokens, _LANES)  # lanes are padded

  tokens = min(budget // rows, _MAX_TOKENS * 2 // itemsize)
  if document_tokens < _LANES:
    block_tokens = _round_up(document_tokens, 16)
  else:
    block_tokens = _LANES
  documents = _power_of_two_below(tokens // block_tokens)
  documents = max(8, min(documents, _round_up(num_documents, 8)))
  while (
    block_tokens >= _LANES
    and block_tokens < document_tokens
    and documents * block_tokens * 2 <= tokens
  ):
    block_tokens *= 2
  return BlockSizes(queries, query_tokens, documents, block_tokens)


def _round_up(size, multiple):
  return -(-size // multiple) * multiple


def _power_of_two_below(size):
  return 1 << max(size.bit_length() - 1, 0)

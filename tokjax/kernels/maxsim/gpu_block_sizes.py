"""Tile sizes of the Hopper kernel of MaxSim, and the rules that pick them.

The rules come from the size of shared memory and of the register file. No GPU
has timed them yet; a measured table would take their place.
"""

import dataclasses

from tokjax.checks import divisible, in_range

__all__ = [
  "SMEM_BYTES",
  "BlockSizes",
  "default_block_sizes",
  "padded_query",
  "walking_blocks",
]

SMEM_BYTES = 227 * 1024  # what one block may have on Hopper
_OTHER_BYTES = 4096  # barriers, scratch of reductions, alignment
_MAX_STAGES = 6


@dataclasses.dataclass(frozen=True)
class BlockSizes:
  """How the kernel cuts its work; two warpgroups of a block compute.

  Attributes:
    rows: query rows of one warpgroup, 64 or 128.
    tokens: document tokens of one tile, a multiple of 8 up to 256 (of 32 for
      float32).
    stages: document tiles in flight per ring.
    shared: whether both warpgroups take the same document tile with different
      rows (one ring), or the same rows with documents of their own (two
      rings). float32 tiles are written to, so they cannot be shared.
    multiprocessors: blocks that run at once, 132 on an H100 SXM and an H200.

  Raises:
    ValueError: if a size is out of range or no multiple.

  Example:
    >>> BlockSizes(rows=64, tokens=104, stages=3, shared=False).rings
    2
  """

  rows: int
  tokens: int
  stages: int
  shared: bool
  multiprocessors: int = 132

  def __post_init__(self):
    in_range(64, 128, rows=self.rows)
    divisible(64, rows=self.rows)
    in_range(8, 256, tokens=self.tokens)
    divisible(8, tokens=self.tokens)
    in_range(1, 16, stages=self.stages)
    in_range(1, 1 << 12, multiprocessors=self.multiprocessors)

  @property
  def rings(self) -> int:
    """Rings of document tiles in a block."""
    return 1 if self.shared else 2

  @property
  def block_rows(self) -> int:
    """Query rows of a block."""
    return self.rows * (2 if self.shared else 1)

  def smem_bytes(self, width: int, itemsize: int) -> int:
    """Shared memory of a block, operand by operand.

    Args:
      width: D.
      itemsize: bytes of an input value; 4 means float32, which keeps the
        query rows in two parts and one more tile per warpgroup.

    Returns:
      Bytes, with a margin for barriers and alignment.

    Example:
      >>> sizes = BlockSizes(rows=64, tokens=104, stages=3, shared=False)
      >>> sizes.smem_bytes(128, 2) // 1024  # 16 rows, 6 tiles of 26, the rest
      176
    """
    split = itemsize == 4
    queries = (2 if split else 1) * self.block_rows * width * itemsize
    tiles = self.rings * self.stages + (2 if split else 0)
    best = 2 * self.rows * 4
    tiles_bytes = tiles * self.tokens * width * itemsize
    return queries + tiles_bytes + best + _OTHER_BYTES


def default_block_sizes(
  num_queries: int,
  query_tokens: int,
  document_tokens: int,
  width: int,
  *,
  itemsize: int = 2,
  return_index: bool = False,
) -> BlockSizes:
  """Tile sizes that fit the chip, from the shape alone.

  Up to 64 query rows the two warpgroups walk documents of their own, which
  is the case bound by HBM; from there on they share document tiles, with 128
  rows each when there are that many. Documents are cut in equal tiles of at
  most 128 tokens (64 with the arg max of 128 rows, so that the registers
  suffice), and shared memory is filled with stages.

  Args:
    num_queries: Nq.
    query_tokens: Q.
    document_tokens: N.
    width: D.
    itemsize: bytes of an input value.
    return_index: whether the arg max is wanted.

  Returns:
    The sizes.

  Example:
    >>> default_block_sizes(1, 32, 300, 128).tokens  # three tiles
    104
    >>> default_block_sizes(128, 32, 300, 128).block_rows
    256
  """
  num_rows = num_queries * padded_query(query_tokens)
  shared = num_rows > 64 and itemsize == 2
  rows = 128 if shared and num_rows > 128 else 64
  if itemsize == 4:
    tokens = 32
  else:
    most = 64 if return_index and rows == 128 else 128
    tokens = _equal_tiles(document_tokens, most)
  stages = _MAX_STAGES
  sizes = BlockSizes(rows, tokens, stages, shared)
  while stages > 1 and sizes.smem_bytes(width, itemsize) > SMEM_BYTES:
    stages -= 1
    sizes = dataclasses.replace(sizes, stages=stages)
  return sizes


def padded_query(query_tokens: int) -> int:
  """Rows that a query takes: 8, 16 or 32, or a multiple of 64.

  Args:
    query_tokens: Q.

  Returns:
    The least such number that holds Q. A tile then holds whole queries, or a
    query fills whole tiles.

  Example:
    >>> [padded_query(n) for n in (5, 32, 48, 100)]
    [8, 32, 64, 128]
  """
  for rows in (8, 16, 32):
    if query_tokens <= rows:
      return rows
  return _round_up(query_tokens, 64)


def walking_blocks(
  num_query_blocks: int, num_documents: int, sizes: BlockSizes
) -> int:
  """Blocks that share the documents of one query block.

  The count with the fewest documents one after the other, waves of blocks
  times documents per walker; the smaller count among equals.

  Args:
    num_query_blocks: query rows / `sizes.block_rows`.
    num_documents: Nd.
    sizes: tile sizes.

  Returns:
    At least 1, at most what keeps every walker busy.

  Example:
    >>> sizes = default_block_sizes(1, 32, 300, 128)
    >>> walking_blocks(1, 1000, sizes)  # 250 walkers of 4 documents
    125
  """
  most = min(_cdiv(num_documents, sizes.rings), sizes.multiprocessors)

  def steps(blocks):
    waves = _cdiv(blocks * num_query_blocks, sizes.multiprocessors)
    return waves * _cdiv(num_documents, blocks * sizes.rings)

  return min(range(1, most + 1), key=lambda blocks: (steps(blocks), blocks))


def _equal_tiles(document_tokens, most):
  """Tokens of a tile: equal tiles, and no tile longer than its document."""
  num_tiles = _cdiv(document_tokens, most)
  tokens = _round_up(_cdiv(document_tokens, num_tiles), 8)
  if tokens > document_tokens >= 8:
    tokens = _round_up(_cdiv(document_tokens, num_tiles + 1), 8)
  return tokens


def _cdiv(size, multiple):
  return -(-size // multiple)


def _round_up(size, multiple):
  return _cdiv(size, multiple) * multiple

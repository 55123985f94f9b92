"""Tile sizes of the Hopper kernel of nearest codes, and their rules.

The rules come from the size of shared memory and the number of
multiprocessors. No GPU has timed them; a measured table would take their place.
"""

import dataclasses

from tokjax.checks import divisible, in_range

__all__ = [
  "MAX_CODES",
  "MAX_WIDTH",
  "PARTS",
  "SMEM_BYTES",
  "BlockSizes",
  "default_block_sizes",
  "padded_width",
]

SMEM_BYTES = 227 * 1024  # what one block may have on Hopper
PARTS = 3  # bfloat16 values that sum to a float32
MAX_CODES = 128  # of a tile, by registers
MAX_WIDTH = 256  # by shared memory
_OTHER_BYTES = 4096  # barriers, scratch of reductions, alignment
_MAX_STAGES = 8
_LEAST_STAGES = 3
_MULTIPROCESSORS = 132  # of an H100 SXM and an H200


@dataclasses.dataclass(frozen=True)
class BlockSizes:
  """How the kernel cuts its work; two warpgroups of a block compute.

  Attributes:
    codes: codes of a tile, a multiple of 32 up to 128.
    slab: values in a row of a swizzled slab: 16, 32 or 64.
    span: columns of a copy: all of the three parts of a tile of codes, those
      of one part, or one slab.
    stages: copies in flight.
    splits: blocks that share the codes of a tile of tokens.
    tokens: of a block, 64 for each warpgroup.

  Raises:
    ValueError: if a size is out of range or no multiple.

  Example:
    >>> BlockSizes(codes=128, slab=16, span=48, stages=4).splits
    1
  """

  codes: int
  slab: int
  span: int
  stages: int
  splits: int = 1
  tokens: int = dataclasses.field(default=128, init=False)

  def __post_init__(self):
    in_range(32, MAX_CODES, codes=self.codes)
    divisible(32, codes=self.codes)
    in_range(16, 64, slab=self.slab)
    divisible(16, slab=self.slab)
    in_range(self.slab, PARTS * MAX_WIDTH, span=self.span)
    divisible(self.slab, span=self.span)
    in_range(1, _MAX_STAGES, stages=self.stages)
    in_range(1, 1 << 31, splits=self.splits)

  def smem_bytes(self, width: int) -> int:
    """Shared memory of a block.

    Args:
      width: of a part, padded.

    Returns:
      Bytes, with a margin for barriers and alignment.

    Example:
      >>> sizes = BlockSizes(codes=128, slab=16, span=48, stages=4)
      >>> sizes.smem_bytes(16) // 1024  # 12 tokens, 4 tiles of 12, the rest
      64
    """
    tokens = 2 * self.tokens * PARTS * width
    return tokens + self.stages * 2 * self.codes * self.span + _OTHER_BYTES


def default_block_sizes(
  num_tokens: int, num_codes: int, dim: int, *, codes: int = MAX_CODES
) -> BlockSizes:
  """Tile sizes that fit the chip, from the shape alone.

  Copies are as large as leaves room for three of them. Where the tokens make
  too few blocks for the chip, several share the codes between them: the count
  with the fewest tiles one after the other, a tile's time counted for the
  start of a block, and the smaller count among equals.

  Args:
    num_tokens: n.
    num_codes: K.
    dim: D, at most 256.
    codes: codes of a tile.

  Returns:
    The sizes.

  Example:
    >>> default_block_sizes(65536, 16384, 8)
    BlockSizes(codes=128, slab=16, span=48, stages=8, splits=1, tokens=128)
    >>> default_block_sizes(4096, 16384, 256)
    BlockSizes(codes=128, slab=32, span=32, stages=3, splits=4, tokens=128)
  """
  width = padded_width(dim)
  whole = next(slab for slab in (64, 32, 16) if width % slab == 0)
  copies = [(whole, PARTS * width), (whole, width)]
  copies += [(slab, slab) for slab in (64, 32, 16) if slab <= whole]
  for slab, span in copies:
    sizes = BlockSizes(codes, slab, span, _MAX_STAGES)
    while sizes.stages > 1 and sizes.smem_bytes(width) > SMEM_BYTES:
      sizes = dataclasses.replace(sizes, stages=sizes.stages - 1)
    if sizes.stages >= _LEAST_STAGES:
      break
  num_blocks = _cdiv(num_tokens, sizes.tokens)
  num_tiles = _cdiv(num_codes, codes)

  def steps(splits):
    waves = _cdiv(num_blocks * splits, _MULTIPROCESSORS)
    return waves * (_cdiv(num_tiles, splits) + 1)

  splits = range(1, min(num_tiles, _MULTIPROCESSORS) + 1)
  splits = min(splits, key=lambda count: (steps(count), count))
  # Each has tiles of its own.
  splits = _cdiv(num_tiles, _cdiv(num_tiles, splits))
  return dataclasses.replace(sizes, splits=splits)


def padded_width(dim: int) -> int:
  """Width of a part as the matrix instructions take it.

  Args:
    dim: D.

  Returns:
    The next multiple of 16.

  Example:
    >>> padded_width(8), padded_width(64)
    (16, 64)
  """
  return _cdiv(dim, 16) * 16


def _cdiv(size, multiple):
  return -(-size // multiple)

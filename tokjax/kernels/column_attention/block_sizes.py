"""Tile sizes of the column-attention kernels, and the rules that pick them.

The rules come from what a tile holds on chip. No TPU or GPU has timed them; a
measured table would take their place.
"""

import dataclasses

from tokjax.checks import divisible, in_range

__all__ = ["BlockSizes", "default_block_sizes", "gpu_stages"]

_MAX_ROWS = 640
_MAX_KEYS = 1024
_LANES = 128
_SUBLANES = 16  # of bfloat16

_SMEM_BYTES = 227 * 1024  # what one block may have on Hopper
_OTHER_BYTES = 4096  # barriers, scratch of reductions, alignment
_MAX_STAGES = 4


@dataclasses.dataclass(frozen=True)
class BlockSizes:
  """What one grid step of the TPU kernels holds.

  Attributes:
    rows: query rows of a tile, along the lanes, a multiple of 128.
    keys: keys of a tile, along the sublanes, a multiple of 16.

  Raises:
    ValueError: if a size is out of range or no multiple.

  Example:
    >>> BlockSizes(rows=512, keys=576).keys
    576
  """

  rows: int
  keys: int

  def __post_init__(self):
    in_range(_LANES, 1 << 12, rows=self.rows)
    divisible(_LANES, rows=self.rows)
    in_range(_SUBLANES, 1 << 12, keys=self.keys)
    divisible(_SUBLANES, keys=self.keys)


def default_block_sizes(num_rows: int, num_keys: int) -> BlockSizes:
  """Equal tiles, as few as the limits allow.

  A tile of the largest size, 640 x 1,024 scores, is 2.5 MiB of float32; with
  the masked copy and the exponentials the kernels hold 8 MiB.

  Args:
    num_rows: R.
    num_keys: S.

  Returns:
    The sizes. None exceeds its axis by more than the rounding.

  Example:
    >>> default_block_sizes(2880, 2880)
    BlockSizes(rows=640, keys=960)
  """
  return BlockSizes(
    _equal(num_rows, _MAX_ROWS, _LANES), _equal(num_keys, _MAX_KEYS, _SUBLANES)
  )


def gpu_stages(dim: int, rows: int, columns: int) -> int:
  """Tiles that the Hopper kernels keep in flight.

  Args:
    dim: width of one head.
    rows: rows that stay in shared memory.
    columns: rows of one streamed tile.

  Returns:
    As many as fit, at most four.

  Example:
    >>> gpu_stages(64, 128, 128), gpu_stages(256, 128, 128)
    (4, 2)
  """
  free = _SMEM_BYTES - _OTHER_BYTES - 2 * rows * dim
  return min(_MAX_STAGES, free // (2 * columns * dim))


def _equal(size, most, multiple):
  parts = -(-size // most)
  part = -(-size // parts)
  return -(-part // multiple) * multiple

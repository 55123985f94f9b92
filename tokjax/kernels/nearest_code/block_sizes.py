"""Tile sizes of the nearest-code kernel, and the rule that picks them.

The rule comes from what a tile holds on chip. No TPU has timed it; a measured
table would take its place.
"""

import dataclasses

from tokjax.checks import divisible, in_range

__all__ = ["BlockSizes", "default_block_sizes"]

_MAX_TOKENS = 1024
_MAX_CODES = 512
_LANES = 128


@dataclasses.dataclass(frozen=True)
class BlockSizes:
  """What one grid step of the TPU kernel holds.

  Attributes:
    tokens: rows of a tile, a multiple of 128 up to 1,024.
    codes: codes of a tile, likewise.

  Raises:
    ValueError: if a size is out of range or no multiple.

  Example:
    >>> BlockSizes(tokens=512, codes=256).codes
    256
  """

  tokens: int
  codes: int

  def __post_init__(self):
    in_range(_LANES, 1024, tokens=self.tokens, codes=self.codes)
    divisible(_LANES, tokens=self.tokens, codes=self.codes)


def default_block_sizes(num_tokens: int, num_codes: int) -> BlockSizes:
  """Equal tiles, as few as the limits allow.

  Every tile of tokens reads all codes, so that few large ones save traffic.
  Wider tiles of codes would save steps of the grid, whose cost is small beside
  the product of 1,024 tokens with 512 codes, and take longer to compile.

  Args:
    num_tokens: n.
    num_codes: K.

  Returns:
    The sizes. None exceeds its axis by more than the rounding to 128.

  Example:
    >>> default_block_sizes(1600, 100)
    BlockSizes(tokens=896, codes=128)
  """
  return BlockSizes(
    _equal(num_tokens, _MAX_TOKENS), _equal(num_codes, _MAX_CODES)
  )


def _equal(size, most):
  parts = -(-size // most)
  part = -(-size // parts)
  return -(-part // _LANES) * _LANES

"""What the Hopper kernels have in common: rings of tiles, short vectors.

One warpgroup fetches tiles into slots of shared memory while others compute:

    fill_rings(num_tiles, num_slots, (wait, ask))
    mask = load_vector(valid, tile, COLUMN)  # one value per column of a tile
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from tokjax.typing import Array

__all__ = ["COLUMN", "ROW", "fill_rings", "load_vector"]

ROW = plgpu.Layout.WGMMA.reduce(1)  # one value per row of an accumulator
COLUMN = plgpu.Layout.WGMMA.reduce(0)  # one value per column


def fill_rings(
  num_tiles: int | Array, num_slots: int, *rings: tuple[Callable, Callable]
) -> None:
  """Keeps rings of slots full, then waits until all has been read.

  Tile i goes through slot i % num_slots of each ring.

  Args:
    num_tiles: how many go through each ring, may be none.
    num_slots: of a ring, static; where `num_tiles` is static too, may be more.
    *rings: of each, in the order in which they are served, wait(slot), which
      returns when the tile in a slot has been read, and ask(tile, slot), which
      starts the copies of a tile into a slot.
  """
  if isinstance(num_tiles, int):
    ahead = min(num_slots, num_tiles)
  else:
    ahead = jnp.minimum(num_slots, num_tiles)

  @pl.loop(0, ahead)
  def _(tile):
    for _, ask in rings:
      ask(tile, tile)

  @pl.loop(ahead, num_tiles)
  def _(tile):
    slot = lax.rem(tile, jnp.int32(num_slots))
    for wait, ask in rings:
      wait(slot)
      ask(tile, slot)

  @pl.loop(num_tiles - ahead, num_tiles)
  def _(tile):
    slot = lax.rem(tile, jnp.int32(num_slots))
    for wait, _ in rings:
      wait(slot)


def load_vector(ref, place, layout) -> Array:
  """A short vector into registers; it need not be read at full width.

  Args:
    ref: in device or shared memory.
    place: index of the vector.
    layout: `ROW` or `COLUMN`.
  """
  return plgpu.load(ref, place, layout=layout, optimized=False)

"""Nearest codes on Hopper GPUs: product, offset and arg max of a tile on chip.

A warpgroup holds 64 tokens in shared memory and meets tiles of 128 codes, which
a third warpgroup fetches into a ring of shared-memory slots; the scores stay in
registers:

  scores[tokens, codes] = tokens @ tile of codes^T - offset     (wgmma)

The tensor cores take bfloat16: tokens and codes enter as three parts each (24
bits), of whose nine products the six large ones are summed in float32, small
ones first. XLA makes the parts, 6 bytes a value.

As on TPU, 32-column slices of the scores are compared one after the other with
the best score that each token has seen in each column, and the columns with
each other once, after the last tile. Earlier slices keep ties, and so do lower
indices among the columns. Where there are few tokens several blocks share the
codes, each with tiles next to each other, and XLA compares what they found.

Bound: the tensor cores, 12 N K D FLOPs of bfloat16; for widths up to 16, to
which smaller ones are padded, the comparisons, four instructions a score. Codes
are read once for each tile of 128 tokens, mostly from L2. The kernel has been
compiled for H100 and run in the Mosaic GPU interpreter on CPU; it has not run
on a GPU, and no fraction of the bound has been measured.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from tokjax import compat
from tokjax.kernels.bfloat16_parts import bfloat16_parts
from tokjax.kernels.hopper_tiles import COLUMN, fill_rings, load_vector
from tokjax.kernels.nearest_code import gpu_block_sizes
from tokjax.kernels.nearest_code.gpu_block_sizes import PARTS, BlockSizes
from tokjax.kernels.padding import pad_to
from tokjax.typing import Array, Float, Int32

__all__ = ["nearest", "unsupported"]

_COMPUTE = 2  # warpgroups that compute; one more fetches
_ROWS = 64  # tokens of a warpgroup
_SLICE = 32  # columns that are compared at once


def unsupported(x, codes, block_size: int | None = None) -> str | None:
  """Why this kernel cannot take the arguments, or None when it can.

  Args:
    x: [n, D], an array or a ShapeDtypeStruct.
    codes: [K, D], likewise.
    block_size: as in `nearest_code`.

  Returns:
    The reason, from shapes alone.

  Example:
    >>> x, codes = jnp.zeros((256, 8)), jnp.zeros((4096, 8))
    >>> unsupported(x, codes) is None
    True
    >>> unsupported(x, codes, 100)
    'block_size 100 is not a multiple of 32 up to 128'
  """
  if 0 in x.shape:
    return f"x is empty: {x.shape}"
  if codes.shape[1] > gpu_block_sizes.MAX_WIDTH:
    return f"width {codes.shape[1]} is more than {gpu_block_sizes.MAX_WIDTH}"
  if block_size is not None and (
    block_size % _SLICE or block_size > gpu_block_sizes.MAX_CODES
  ):
    return f"block_size {block_size} is not a multiple of 32 up to 128"
  return None


def nearest(
  x: Float[Array, "n D"],
  codes: Float[Array, "K D"],
  offset: Float[Array, " K"],
  *,
  block_size: int | None = None,
  block_sizes: BlockSizes | None = None,
  interpret=False,
) -> tuple[Int32[Array, " n"], Float[Array, " n"]]:
  """The code of each row, as `reference.nearest` finds it.

  Args:
    x: rows, float32.
    codes: finite, float32.
    offset: float32; inf for a code that must not be chosen.
    block_size: codes of one tile, a multiple of 32; None for 128.
    block_sizes: all tile sizes; None takes those of `default_block_sizes`.
    interpret: settings of the Mosaic GPU interpreter; False on a GPU.

  Returns:
    What `reference.nearest` returns, but the score of a row that holds NaN is
    -inf.
  """
  (num_tokens, dim), num_codes = x.shape, codes.shape[0]
  sizes = block_sizes or gpu_block_sizes.default_block_sizes(
    num_tokens, num_codes, dim, codes=block_size or gpu_block_sizes.MAX_CODES
  )
  num_blocks = pl.cdiv(num_tokens, sizes.tokens)
  num_tiles = pl.cdiv(num_codes, sizes.codes)
  rows, tiles = num_blocks * sizes.tokens, num_tiles * sizes.codes
  width = gpu_block_sizes.padded_width(dim)
  x = pad_to(pad_to(x, 0, rows), 1, width)
  codes = pad_to(pad_to(codes, 0, tiles), 1, width)
  offset = pad_to(offset, 0, tiles, jnp.inf)
  x, codes, offset = compat.varying_together(
    jnp.concatenate(bfloat16_parts(x, PARTS), axis=1),
    # The smallest parts first, the order in which they are summed.
    jnp.concatenate(bfloat16_parts(codes, PARTS)[::-1], axis=1),
    offset.reshape(num_tiles, sizes.codes),
  )
  program = _Program(
    sizes=sizes, width=width, num_blocks=num_blocks, num_tiles=num_tiles
  )
  shape = (sizes.splits, rows // _ROWS, _ROWS)
  kernel = plgpu.kernel(
    program.body,
    out_type=[
      compat.result_like(shape, dtype, x) for dtype in (jnp.int32, jnp.float32)
    ],
    scratch_types=program.scratch(),
    grid=(num_blocks * sizes.splits,),
    grid_names=("block",),
    num_threads=_COMPUTE + 1,
    thread_name="warpgroup",
    kernel_name="nearest_code",
    interpret=interpret or None,
  )
  # `plgpu.kernel` forgets over which mesh axes its results vary.
  index, score, _ = compat.varying_together(*kernel(x, codes, offset), x)
  index, score = (
    y.reshape(sizes.splits, rows)[:, :num_tokens] for y in (index, score)
  )
  highest = jnp.max(score, axis=0)
  last = jnp.iinfo(jnp.int32).max
  index = jnp.where(score == highest[None, :], index, last)
  return jnp.min(index, axis=0), highest


@dataclasses.dataclass(frozen=True)
class _Program:
  """What one block does; every size is static.

  A block holds the tokens of tile `block % num_blocks`, so that blocks that run
  side by side read the same codes at about the same time.
  """

  sizes: BlockSizes
  width: int  # of a part
  num_blocks: int
  num_tiles: int  # of codes

  @property
  def tiles_per_split(self) -> int:
    return pl.cdiv(self.num_tiles, self.sizes.splits)

  @property
  def copies(self) -> int:
    """Copies of a tile of codes."""
    return PARTS * self.width // self.sizes.span

  def scratch(self):
    """Shared memory and barriers of a block.

    At D = 256: 192 KiB of tokens and three slots of 8 KiB.
    """
    sizes = self.sizes
    transforms = (
      plgpu.TilingTransform((8, sizes.slab)),
      plgpu.SwizzleTransform(2 * sizes.slab),
    )

    def rows(*shape):
      return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)

    return dict(
      tokens_smem=rows(_COMPUTE, _ROWS, PARTS * self.width),
      codes_smem=rows(sizes.stages, sizes.codes, sizes.span),
      tokens_ready=plgpu.Barrier(num_barriers=_COMPUTE),
      full=plgpu.Barrier(num_barriers=sizes.stages),
      empty=plgpu.Barrier(num_arrivals=_COMPUTE, num_barriers=sizes.stages),
    )

  def body(self, tokens, codes, offset, index, score, **scratch):
    """One block.

    Args:
      tokens: in device memory, bfloat16[n, 3 width], the largest part first.
      codes: bfloat16[K, 3 width], the smallest part first.
      offset: float32[tiles, codes].
      index: int32[splits, n / 64, 64], a result.
      score: float32[splits, n / 64, 64], likewise.
      **scratch: what `scratch` names.
    """
    block = lax.axis_index("block")
    place = lax.rem(block, jnp.int32(self.num_blocks))
    split = lax.div(block, jnp.int32(self.num_blocks))
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == _COMPUTE)
    def _():
      plgpu.set_max_registers(56, action="decrease")
      self.fetch(tokens, codes, place, split, **scratch)

    @pl.when(warpgroup < _COMPUTE)
    def _():
      plgpu.set_max_registers(224, action="increase")
      found = self.compute(offset, split, warpgroup, **scratch)
      tile = place * _COMPUTE + warpgroup
      index[split, tile], score[split, tile] = found

  def tile(self, split, step):
    """Tile of codes at a step; past the end the last one is met again."""
    tile = split * self.tiles_per_split + step
    return jnp.minimum(tile, self.num_tiles - 1)

  def fetch(
    self,
    tokens,
    codes,
    place,
    split,
    *,
    tokens_smem,
    codes_smem,
    tokens_ready,
    full,
    empty,
  ):
    """Asks for the tokens, then keeps the ring full."""
    sizes = self.sizes
    for i in range(_COMPUTE):
      plgpu.copy_gmem_to_smem(
        tokens.at[pl.ds(place * sizes.tokens + i * _ROWS, _ROWS)],
        tokens_smem.at[i],
        tokens_ready.at[i],
      )

    def wait(slot):
      plgpu.barrier_wait(empty.at[slot])

    def ask(step, slot):
      tile = self.tile(split, lax.div(step, jnp.int32(self.copies)))
      column = lax.rem(step, jnp.int32(self.copies)) * sizes.span
      plgpu.copy_gmem_to_smem(
        codes.at[
          pl.ds(tile * sizes.codes, sizes.codes), pl.ds(column, sizes.span)
        ],
        codes_smem.at[slot],
        full.at[slot],
      )

    total = self.tiles_per_split * self.copies
    fill_rings(total, sizes.stages, (wait, ask))

  def compute(
    self,
    offset,
    split,
    warpgroup,
    *,
    tokens_smem,
    codes_smem,
    tokens_ready,
    full,
    empty,
  ):
    """The best code of 64 tokens, and its score."""
    sizes = self.sizes
    plgpu.barrier_wait(tokens_ready.at[warpgroup])

    def meet(step, carry):
      best, first = carry
      tile = self.tile(split, step)
      shift = load_vector(offset, tile, COLUMN)
      scores = self.product(
        tokens_smem.at[warpgroup], codes_smem, step, full, empty
      )
      scores = scores - lax.broadcast_in_dim(shift, scores.shape, [1])
      for start in range(0, sizes.codes, _SLICE):
        part = lax.slice(scores, (0, start), (_ROWS, start + _SLICE))
        better = part > best  # strict, and False for NaN
        best = jnp.where(better, part, best)
        here = _full(tile * sizes.codes + start, jnp.int32)
        first = jnp.where(better, here, first)
      return best, first

    best, first = lax.fori_loop(
      0,
      self.tiles_per_split,
      meet,
      (_full(-jnp.inf, jnp.float32), _full(0, jnp.int32)),
    )
    column = plgpu.broadcasted_iota(
      jnp.int32, first.shape, 1, layout=plgpu.Layout.WGMMA
    )
    highest = jnp.max(best, axis=1)
    hit = best == lax.broadcast_in_dim(highest, best.shape, [0])
    last = jnp.iinfo(jnp.int32).max
    return jnp.min(jnp.where(hit, first + column, last), axis=1), highest

  def product(self, tokens, codes_smem, step, full, empty):
    """float32[64, codes] inner products of the tokens with a tile."""
    sizes = self.sizes

    def multiply(accumulator):
      before = None
      for copy in range(self.copies):
        slot = lax.rem(step * self.copies + copy, jnp.int32(sizes.stages))
        plgpu.barrier_wait(full.at[slot])
        pairs = self.pairs(copy)
        for ours, theirs in pairs:
          plgpu.wgmma(
            accumulator,
            tokens.at[:, ours],
            plgpu.transpose_ref(codes_smem.at[slot, :, theirs], (1, 0)),
          )
        if before is not None:  # the products with that slot are done
          plgpu.wgmma_wait(len(pairs))
          plgpu.barrier_arrive(empty.at[before])
        before = slot
      products = accumulator[...]
      plgpu.barrier_arrive(empty.at[before])
      return products

    shape = (_ROWS, sizes.codes)
    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))

  def pairs(self, copy):
    """Columns of the tokens, and those of a copy that they are to meet."""
    size = min(self.sizes.span, self.width)
    found = []
    for start in range(0, self.sizes.span, size):
      part, column = divmod(copy * self.sizes.span + start, self.width)
      # The smallest part of a code meets only the largest of a token.
      for other in reversed(range(part + 1)):
        ours = pl.ds(other * self.width + column, size)
        found.append((ours, pl.ds(start, size)))
    return found


def _full(value, dtype):
  values = jnp.full((_ROWS, _SLICE), value, dtype)
  return plgpu.layout_cast(values, plgpu.Layout.WGMMA)

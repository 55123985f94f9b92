"""The gated MLP on Hopper GPUs: active rows alone, each read once.

A block stands on each multiprocessor and takes its share of the list of active
units, whose length only the device knows. One warpgroup fetches unit after
unit into a ring of shared-memory slots, one bulk copy a row, for rows are
contiguous; four compute, on CUDA cores:

  hidden = gate * <x, up row>        total += hidden * down row

A warpgroup holds the float32 totals of one or two tokens in registers. Where
that leaves warpgroups over, they take units in turn and add up at the end;
eight tokens of width 4,096 employ all four at each unit. Blocks write their
totals, which XLA adds up: no atomics, and the same sum every time.

Bound: memory. For A active units 2 A D weights move, with width 4,096 and
bfloat16 16 KiB a unit, and a ring of 128 to 192 KiB keeps them under way. The
totals of all blocks, 2.1 MB a token, pass through L2. The instructions of eight
tokens come near: 16 D multiplications a unit are 512 cycles of a
multiprocessor, conversions to float32 cost about as much, and 16 KiB take some
1,000 cycles to come. The kernel has been compiled for H100 and run in the
Mosaic GPU interpreter on CPU; nothing has been measured on a chip.
"""

import dataclasses
import functools
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from tokjax import compat
from tokjax.typing import Array, Float, Int32

__all__ = ["gated_rows_forward", "unsupported"]

# Multiprocessors of an H100 or H200; Hoppers with fewer take a second round.
_BLOCKS = 132
_COMPUTE = 4  # warpgroups that compute; one more fetches
_TOKENS = 8
_LANES = 128  # threads of a warpgroup
_MAX_DIM = 8192  # totals of a warpgroup: 64 registers of each thread
_MAX_SLOTS = 32
_SMEM_BYTES = 225 << 10  # of 227 KiB; dot products and barriers have the rest


def unsupported(x, w_up) -> str | None:
  """Why this kernel cannot take the arguments, or None when it can.

  Args:
    x: [..., D], an array or a ShapeDtypeStruct.
    w_up: [F, D], likewise.

  Returns:
    The reason, from shapes and dtypes alone.

  Example:
    >>> import jax
    >>> x = jax.ShapeDtypeStruct((8, 4096), "bfloat16")
    >>> unsupported(x, jax.ShapeDtypeStruct((11008, 4096), "bfloat16")) is None
    True
    >>> unsupported(x, jax.ShapeDtypeStruct((11008, 100), "bfloat16"))
    'width 100 is not a multiple of 128 up to 8192'
  """
  dim = w_up.shape[1]
  num_tokens = math.prod(x.shape[:-1])
  if x.dtype not in (jnp.float32, jnp.bfloat16):
    return f"dtype {x.dtype} is neither float32 nor bfloat16"
  if not 1 <= num_tokens <= _TOKENS:
    return f"{num_tokens} tokens are not 1 to {_TOKENS}"
  if dim % _LANES or not 1 <= dim <= _MAX_DIM:
    return f"width {dim} is not a multiple of 128 up to {_MAX_DIM}"
  program = _Program(_padded(num_tokens), dim, x.dtype)
  if program.groups > _COMPUTE or program.slots < 2:
    return f"{num_tokens} {x.dtype} tokens are too many of width {dim}"
  return None


def gated_rows_forward(
  x: Float[Array, "n D"],
  gate: Float[Array, "n F"],
  w_up: Float[Array, "F D"],
  w_down: Float[Array, "F D"],
  index: Int32[Array, " C"],
  count: Int32[Array, ""],
  *,
  num_blocks: int = _BLOCKS,
  interpret=False,
) -> Float[Array, "n D"]:
  """What `reference.gated_rows_forward` returns, from the rows named alone.

  Args:
    x: tokens, at most 8, float32 or bfloat16.
    gate: zero for all units that `index` does not name.
    w_up: one row per unit.
    w_down: likewise.
    index: units to read; what comes after the first `count` is not read.
    count: how many.
    num_blocks: among how many they are shared.
    interpret: settings of the Mosaic GPU interpreter; False on a GPU.

  Returns:
    In the dtype of `x`. Products are those of the operands, with float32 sums;
    hidden values are rounded to the dtype of `x`, as in the reference.
  """
  num_tokens, dim = x.shape
  program = _Program(_padded(num_tokens), dim, x.dtype)
  missing = ((0, program.num_tokens - num_tokens), (0, 0))
  x, gate = jnp.pad(x, missing), jnp.pad(gate, missing)
  row = program.row
  x, gate, w_up, w_down, index, count = compat.varying_together(
    x.reshape(-1, *row),
    gate,
    w_up.reshape(-1, *row),
    w_down.reshape(-1, *row),
    index,
    count[None],
  )
  shape = (num_blocks, program.num_tokens, *row)
  kernel = plgpu.kernel(
    program.body,
    out_type=compat.result_like(shape, jnp.float32, x),
    scratch_types=program.scratch(),
    grid=(num_blocks,),
    grid_names=("block",),
    num_threads=_COMPUTE + 1,
    thread_name="warpgroup",
    # No sum crosses warps.
    compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=0),
    kernel_name="gated_rows",
    interpret=interpret or None,
  )
  totals = kernel(x, gate, w_up, w_down, index, count)
  # `plgpu.kernel` forgets over which mesh axes its results vary.
  totals, _ = compat.varying_together(totals, x)
  total = jnp.sum(totals, axis=0).reshape(program.num_tokens, dim)
  return total[:num_tokens].astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class _Program:
  """What one block does; every size is static.

  A row is seen as chunks of 4 warps times `vector` values of 32 lanes each.
  """

  num_tokens: int  # 1, 2, 4 or 8
  dim: int
  dtype: jnp.dtype

  @property
  def vector(self) -> int:
    """Values that a thread reads at once."""
    return math.gcd(self.dim // _LANES, 8)

  @property
  def row(self) -> tuple[int, int, int]:
    """Shape of a row."""
    width = 32 * self.vector
    return self.dim // (4 * width), 4, width

  @property
  def layout(self):
    """Where the values of a chunk lie: axes of warps, lanes and vectors."""
    tiles = plgpu.Tiling(((4, 32 * self.vector), (self.vector,)))
    return plgpu.Layout.TILED(
      tiles, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
    )

  @property
  def group(self) -> int:
    """Tokens of a warpgroup."""
    return 2 if self.num_tokens > 1 and 2 * self.dim <= _MAX_DIM else 1

  @property
  def groups(self) -> int:
    """Warpgroups that share a unit."""
    return self.num_tokens // self.group

  @property
  def parts(self) -> int:
    """Units that are worked on at once: one more of each is under way."""
    parts = _COMPUTE // self.groups
    while parts > 1 and self.room(parts) < 2 * parts:
      parts //= 2
    return parts

  @property
  def slots(self) -> int:
    """Units in the ring. A slot is always of the same part."""
    slots = min(self.room(self.parts), _MAX_SLOTS)
    return slots // self.parts * self.parts

  def room(self, parts) -> int:
    """Units for which there is shared memory."""
    size = self.num_tokens * self.dim
    held = [size * self.dtype.itemsize, 4 * size if parts > 1 else 0]
    left = _SMEM_BYTES - sum(-(-x // 1024) * 1024 for x in held)
    return left // (2 * self.dim * self.dtype.itemsize)

  def scratch(self):
    """Shared memory and barriers of a block.

    One token of 4,096 bfloat16 values: 8 KiB, and 16 for its totals; the ring
    has twelve slots of 16 KiB. Eight tokens: 64 KiB, and ten slots.
    """
    tokens, several = (self.num_tokens, *self.row), self.parts > 1
    return dict(
      x_smem=plgpu.SMEM(tokens, self.dtype),
      rows_smem=plgpu.SMEM((self.slots, 2, *self.row), self.dtype),
      dots_smem=plgpu.SMEM((_COMPUTE, self.group, 4), jnp.float32),
      total_smem=plgpu.SMEM(tokens, jnp.float32) if several else None,
      x_ready=plgpu.Barrier(),
      full=plgpu.Barrier(num_arrivals=2, num_barriers=self.slots),
      empty=plgpu.Barrier(num_arrivals=self.groups, num_barriers=self.slots),
      turn=plgpu.Barrier(num_arrivals=self.groups, num_barriers=self.parts - 1)
      if several
      else None,
    )

  def body(self, x, gate, w_up, w_down, index, count, out, **scratch):
    """One block.

    Args:
      x: in device memory, [tokens, *row].
      gate: [tokens, F].
      w_up: [F, *row].
      w_down: [F, *row].
      index: int32[C].
      count: int32[1].
      out: float32[blocks, tokens, *row], the result.
      **scratch: what `scratch` names.
    """
    block = lax.axis_index("block")
    warpgroup = lax.axis_index("warpgroup")
    num_blocks = jnp.int32(out.shape[0])
    first = lax.div(block * count[0], num_blocks)
    end = lax.div((block + 1) * count[0], num_blocks)
    units = first, end - first

    @pl.when(warpgroup == _COMPUTE)
    def _():
      plgpu.set_max_registers(32, action="decrease")
      self.fetch(x, w_up, w_down, index, units, **scratch)

    @pl.when(warpgroup < self.groups * self.parts)
    def _():
      plgpu.set_max_registers(112, action="increase")
      group = lax.rem(warpgroup, jnp.int32(self.groups))
      part = lax.div(warpgroup, jnp.int32(self.groups))
      first_token = group * self.group
      totals = self.compute(
        gate, index, units, warpgroup, first_token, part, **scratch
      )
      for number in range(self.parts):
        given = number, totals, out.at[block], first_token
        add = functools.partial(self.add_up, *given, **scratch)
        pl.when(part == number)(add)

  def fetch(
    self,
    x,
    w_up,
    w_down,
    index,
    units,
    *,
    x_smem,
    rows_smem,
    x_ready,
    full,
    empty,
    **_,
  ):
    """Asks for the tokens, then keeps the ring full till all is consumed."""
    plgpu.copy_gmem_to_smem(x, x_smem, x_ready)
    first, number = units
    ahead = jnp.minimum(number, self.slots)

    def slot(i):
      return lax.rem(i, jnp.int32(self.slots))

    # As `hopper_tiles.fill_rings`, in one loop: three spill registers where two
    # float32 tokens are 4,096 wide.
    @pl.loop(0, number + ahead)
    def _(i):
      @pl.when(i >= ahead)
      def _():
        plgpu.barrier_wait(empty.at[slot(i - ahead)])

      @pl.when(i < number)
      def _():
        unit = index[first + i]
        for k, weight in enumerate((w_up, w_down)):
          plgpu.copy_gmem_to_smem(
            weight.at[unit], rows_smem.at[slot(i), k], full.at[slot(i)]
          )

  def compute(
    self,
    gate,
    index,
    units,
    warpgroup,
    first_token,
    part,
    *,
    x_smem,
    rows_smem,
    dots_smem,
    x_ready,
    full,
    empty,
    **_,
  ):
    """Totals of the tokens of a warpgroup, over its part of the units.

    Returns:
      For each token the chunks of its row, float32[4, 32 * vector].
    """
    first, number = units
    tokens, chunks = range(self.group), range(self.row[0])
    zero = plgpu.layout_cast(jnp.zeros(self.row[1:], jnp.float32), self.layout)
    dots_smem = dots_smem.at[warpgroup]
    plgpu.barrier_wait(x_ready)

    def step(i, totals):
      place = i * self.parts + part
      unit = index[first + place]
      factors = [
        gate[first_token + t, unit].astype(jnp.float32) for t in tokens
      ]
      slot = lax.rem(place, jnp.int32(self.slots))
      plgpu.barrier_wait(full.at[slot])
      for t in tokens:  # one by one: registers are scarce
        products = zero
        for k in chunks:
          row = self.load(rows_smem, (slot, 0, k))
          products += self.load(x_smem, (first_token + t, k)) * row
        dots_smem[t] = jnp.sum(products, axis=1)  # of each warp
      hidden = []
      for t in tokens:
        dot = sum(dots_smem[t, warp] for warp in range(4))
        rounded = (factors[t] * dot).astype(self.dtype)
        hidden.append(rounded.astype(jnp.float32))
      totals = [list(total) for total in totals]
      for k in chunks:
        row = self.load(rows_smem, (slot, 1, k))
        for t in tokens:
          totals[t][k] += hidden[t] * row
      plgpu.barrier_arrive(empty.at[slot])
      return totals

    steps = lax.div(number - part + self.parts - 1, jnp.int32(self.parts))
    return lax.fori_loop(
      0, steps, step, [[zero for _ in chunks] for _ in tokens]
    )

  def add_up(self, number, totals, out, first_token, *, total_smem, turn, **_):
    """Parts add their totals one after the other; the last one writes."""
    if number:
      plgpu.barrier_wait(turn.at[number - 1])
    last = number == self.parts - 1
    result = out if last else total_smem
    for t in range(self.group):
      for k in range(self.row[0]):
        place = (first_token + t, k)
        before = self.load(total_smem, place) if number else 0
        result[place] = before + totals[t][k]
    if not last:
      plgpu.barrier_arrive(turn.at[number])

  def load(self, ref, place):
    """A chunk, as float32[4, 32 * vector]."""
    values = plgpu.load(ref, place, layout=self.layout, optimized=False)
    return values.astype(jnp.float32)


def _padded(num_tokens):
  """The next power of two."""
  return 1 << (num_tokens - 1).bit_length()

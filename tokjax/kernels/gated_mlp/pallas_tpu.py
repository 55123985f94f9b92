"""The gated MLP on TPU: active rows are fetched one by one, as they lie.

A row of a [units, width] array is no contiguous piece of a TPU's memory. Tiles
of eight rows and 128 columns are; within them a float32 row is a run of 512
bytes, and so are two rows of bfloat16, which share words. These runs are what
is fetched: a group is one unit in float32 and an aligned pair in bfloat16, of
which one asynchronous copy brings all runs. Whole tiles would be one burst,
but of eight units one is nearly always active: with half of the units active at
random 100 % of the tiles are needed, 75 % of the pairs and 50 % of the rows;
with a tenth 57, 19 and 10 %. Nothing is laid out anew.

The groups that some token needs stand in scalar memory. The kernel walks over
them in chunks: while the copies of one chunk are under way, the rows of the
one before are multiplied, [rows, D] x [D, tokens] -> [rows, tokens], gated, and
multiplied with their rows of the down projection. Gates come along as a packed
array, in which a dynamic rotation finds those of a group.

Bound: memory. For A units in the groups that are read 2 A D weights move, with
width 4,096 and bfloat16 16 KiB a unit. Of 14,336 units, the call of one token:
235 MB if all are active, 176 MB if half, 45 MB if a tenth is, at random, and
0.5 MB of gates. For more tokens the union counts. The copies, of 16 KiB here,
are issued one after the other, which may bound fast chips before memory does.
The kernel has been compiled for TPU v5e, v6e and v7x and run in interpret mode;
nothing has been measured on a chip.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tokjax import compat
from tokjax.ops import packing
from tokjax.typing import Array, Float

__all__ = ["gated_rows_forward", "unsupported"]

_LANES = 128
_TOKENS = 8
_MAX_DIM = 16_384
_MAX_GROUPS = 1 << 16  # by scalar memory
_MAX_ROWS = 256  # of a chunk
_BUFFER_BYTES = 16 << 20  # two chunks of rows of both weights
_VMEM_LIMIT_BYTES = 48 << 20


def unsupported(x, w_up) -> str | None:
  """Why this kernel cannot take the arguments, or None when it can.

  Args:
    x: [..., D], an array or a ShapeDtypeStruct.
    w_up: [F, D], likewise.

  Returns:
    The reason, from shapes and dtypes alone.

  Example:
    >>> import jax
    >>> x = jax.ShapeDtypeStruct((1, 256), "bfloat16")
    >>> unsupported(x, jax.ShapeDtypeStruct((1024, 256), "bfloat16")) is None
    True
    >>> unsupported(x, jax.ShapeDtypeStruct((1023, 256), "bfloat16"))
    'num_units 1023 is odd, and bfloat16 rows are read in pairs'
  """
  num_units, dim = w_up.shape
  num_tokens = math.prod(x.shape[:-1])
  if x.dtype not in (jnp.float32, jnp.bfloat16):
    return f"dtype {x.dtype} is neither float32 nor bfloat16"
  if not 1 <= num_tokens <= _TOKENS:
    return f"{num_tokens} tokens are not 1 to {_TOKENS}"
  if dim % _LANES or not 1 <= dim <= _MAX_DIM:
    return f"width {dim} is not a multiple of 128 up to {_MAX_DIM}"
  group = _group(x.dtype)
  if num_units % group:
    return f"num_units {num_units} is odd, and bfloat16 rows are read in pairs"
  if not 1 <= num_units // group <= _MAX_GROUPS:
    return f"num_units {num_units} are not 1 to {group * _MAX_GROUPS}"
  return None


def gated_rows_forward(
  x: Float[Array, "n D"],
  gate: Float[Array, "n F"],
  w_up: Float[Array, "F D"],
  w_down: Float[Array, "F D"],
  *,
  rows: int | None = None,
  interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "n D"]:
  """What `reference.gated_rows_forward` returns, from the active rows alone.

  Args:
    x: tokens, at most 8, float32 or bfloat16. As in XLA's products, float32
      values are rounded to bfloat16 for the matrix unit.
    gate: zero for the units that are not to be read.
    w_up: one row per unit.
    w_down: likewise.
    rows: of a chunk, a multiple of 16; None for a rule.
    interpret: whether to run the body step by step on any device, or how.

  Returns:
    In the dtype of `x`.

  Example:
    >>> x, gate = jnp.ones((1, 128)), jnp.array([[0.5, 0.0]])
    >>> w = jnp.stack([jnp.ones(128), jnp.full(128, jnp.nan)])
    >>> run = jax.jit(gated_rows_forward, static_argnames="interpret")
    >>> run(x, gate, w, w, interpret=True)[0, :2].tolist()
    [64.0, 64.0]
  """
  (num_tokens, dim), num_units = x.shape, gate.shape[1]
  group = _group(x.dtype)
  rows = rows or _chunk_rows(num_units, dim, x.dtype)
  padding = ((0, _TOKENS - num_tokens), (0, 0))
  x, gate = jnp.pad(x, padding), jnp.pad(gate, padding)
  active = jnp.any(gate != 0, axis=0).reshape(-1, group).any(axis=1)
  kept = packing.pack(active, active.shape[0])
  count = jnp.sum(active, dtype=jnp.int32)[None]
  # Sixteen units fill the lanes: [F / 16, 16 units of 8 tokens].
  gate = jnp.pad(gate, ((0, 0), (0, -num_units % (_LANES // _TOKENS))))
  gate = gate.astype(jnp.float32).T.reshape(-1, _LANES)
  index, count, x, gate, w_up, w_down = compat.varying_together(
    kept.index, count, x, gate, w_up, w_down
  )

  def whole(*shape):
    return pl.BlockSpec(shape, lambda i, *_: (0, 0))

  in_place = pl.BlockSpec(memory_space=pltpu.HBM)
  output = pl.pallas_call(
    functools.partial(_kernel, group=group),
    out_shape=compat.result_like((_TOKENS, dim), x.dtype, x),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(1,),
      in_specs=[whole(*x.shape), whole(*gate.shape), in_place, in_place],
      out_specs=whole(_TOKENS, dim),
      scratch_shapes=[
        pltpu.VMEM((2, rows, dim), x.dtype),
        pltpu.VMEM((2, rows, dim), x.dtype),
        pltpu.VMEM((2, rows, _LANES), jnp.float32),
        pltpu.VMEM((_TOKENS, dim), jnp.float32),
        pltpu.SemaphoreType.DMA((2,)),
      ],
    ),
    compiler_params=pltpu.CompilerParams(vmem_limit_bytes=_VMEM_LIMIT_BYTES),
    cost_estimate=pl.CostEstimate(  # as if all units were active
      flops=4 * _TOKENS * num_units * dim,
      bytes_accessed=w_up.nbytes + w_down.nbytes + gate.nbytes,
      transcendentals=0,
    ),
    interpret=interpret,
    name="gated_rows",
  )(index, count, x, gate, w_up, w_down)
  return output[:num_tokens]


def _kernel(
  index_ref,  # int32[F / group] in scalar memory: active groups, ascending
  count_ref,  # int32[1], likewise: how many
  x_ref,  # [8, D]              16 * D bytes, twice
  gate_ref,  # f32[F / 16, 128]  32 * F, twice
  up_hbm,  # [F, D]
  down_hbm,  # [F, D]
  out_ref,  # [8, D]            16 * D, twice
  up_ref,  # scratch [2, rows, D]: the rows of a chunk, and of the next
  down_ref,  # likewise
  factor_ref,  # scratch f32[2, rows, 128]: their gates, in the first 8 lanes
  total_ref,  # scratch f32[8, D]
  copied,  # a semaphore for each of the two chunks
  *,
  group: int,
):
  # With 256 rows of 4,096 bfloat16 values the buffers have 8 MiB, gates of
  # 14,336 units 0.5 MiB.
  per_chunk = up_ref.shape[1] // group
  count = count_ref[0]
  num_chunks = jax.lax.div(count + per_chunk - 1, per_chunk)

  def groups_of(chunk):
    return jnp.minimum(count - chunk * per_chunk, per_chunk)

  def copies(slot, j, number):
    there = pl.ds(pl.multiple_of(number * group, group), group)
    here = pl.ds(pl.multiple_of(j * group, group), group)
    return [
      pltpu.make_async_copy(
        hbm.at[there], buffer.at[slot, here], copied.at[slot]
      )
      for hbm, buffer in ((up_hbm, up_ref), (down_hbm, down_ref))
    ]

  def start(chunk):
    slot = jax.lax.rem(chunk, 2)
    factor_ref[slot] = jnp.zeros(factor_ref.shape[1:], jnp.float32)

    def ask(j, carry):
      number = index_ref[chunk * per_chunk + j]
      for copy in copies(slot, j, number):
        copy.start()
      for k in range(group):
        unit = number * group + k
        place = unit * _TOKENS
        lanes = gate_ref[pl.ds(jax.lax.div(place, _LANES), 1)]  # [1, 128]
        lanes = pltpu.roll(lanes, -place & (_LANES - 1), 1)
        factor_ref[slot, pl.ds(j * group + k, 1)] = lanes
      return carry

    jax.lax.fori_loop(0, groups_of(chunk), ask, 0)

  def finish(chunk):
    slot = jax.lax.rem(chunk, 2)

    def wait(j, carry):
      for copy in copies(slot, j, 0):  # of equal size
        copy.wait()
      return carry

    jax.lax.fori_loop(0, groups_of(chunk), wait, 0)
    hidden = jax.lax.dot_general(
      up_ref[slot],
      x_ref[...],
      (((1,), (1,)), ((), ())),
      preferred_element_type=jnp.float32,
    )  # [rows, 8]
    factor = factor_ref[slot][:, :_TOKENS]
    # What lies in rows of no group, or was read beside an active unit.
    hidden = jnp.where(factor != 0, factor * hidden, 0).astype(x_ref.dtype)
    total_ref[...] += jax.lax.dot_general(
      hidden,
      down_ref[slot],
      (((0,), (0,)), ((), ())),
      preferred_element_type=jnp.float32,
    )  # [8, D]

  total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
  # The last chunk may leave rows as they are; zeros times these must be zero.
  down_ref[...] = jnp.zeros(down_ref.shape, down_ref.dtype)

  @pl.when(num_chunks > 0)
  def _():
    start(jnp.int32(0))

  def step(chunk, carry):
    @pl.when(chunk + 1 < num_chunks)
    def _():
      start(chunk + 1)

    finish(chunk)
    return carry

  jax.lax.fori_loop(0, num_chunks, step, 0)
  out_ref[...] = total_ref[...].astype(out_ref.dtype)


def _group(dtype):
  """Units that one copy brings: those that share 32-bit words."""
  return 4 // jnp.dtype(dtype).itemsize


def _chunk_rows(num_units, dim, dtype):
  """Rows of a chunk: what fits, and no more than there are."""
  fits = _BUFFER_BYTES // (4 * dim * jnp.dtype(dtype).itemsize)
  rows = min(_MAX_ROWS, fits, num_units + 15)
  return rows // 16 * 16

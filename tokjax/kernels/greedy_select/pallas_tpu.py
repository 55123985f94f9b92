"""Greedy selection on TPU: all K steps of an example in one launch.

One grid step is one example. Its state (similarity to the nearest pick, sum,
variance left, or best cover of each target) stays in vector memory from the
first pick to the last; a step reads the table row of the last pick, updates
the state, and finds the next pick by a max and a min over the lanes.

A table of up to 14 MiB is brought into vector memory whole, while the example
before is worked on. A larger one stays in HBM, and each step copies the tile
of 8 rows (16 in bfloat16) in which the row lies: a slice of one row would need
the table in another layout. "coverage" reads all of the table at every step
and takes tables in vector memory only; from HBM the plain version is bound by
the same bytes.

Bound: latency. A step over 576 tokens is some tens of vector operations in a
chain, and one copy of 92 KB (8 rows of 2,880 float32) takes 0.1 us at 819 GB/s
plus the wait for HBM. XLA launches several operations a step instead. These
kernels have been compiled for TPU v5e, v6e and v7x and run in interpret mode;
nothing has been measured on a chip.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tokjax import compat
from tokjax.kernels.greedy_select import block_sizes
from tokjax.kernels.greedy_select.reference import DEPENDENT
from tokjax.typing import Array, Float, Int32

__all__ = ["select", "unsupported"]

_MAX_TOKENS = 1 << 16
_FACTOR_BYTES = 16 << 20
_VMEM_LIMIT_BYTES = 56 << 20
_ROWS = 8  # rows of the factor worked on at once, 1 << 3


def unsupported(table, objective: str, num_keep: int) -> str | None:
  """Why this kernel cannot take the arguments, or None when it can.

  Args:
    table: [B, M, N], an array or a ShapeDtypeStruct.
    objective: as in `greedy_select`.
    num_keep: K.

  Returns:
    The reason, from shapes and dtypes alone.

  Example:
    >>> import jax
    >>> table = jax.ShapeDtypeStruct((1, 2880, 2880), "float32")
    >>> unsupported(table, "max_min", 320) is None
    True
    >>> unsupported(table, "coverage", 320)
    'coverage of 2880 x 2880 float32 does not fit the vector memory'
  """
  if table.dtype not in (jnp.float32, jnp.bfloat16):
    return f"dtype {table.dtype} is neither float32 nor bfloat16"
  if 0 in table.shape:
    return f"an axis is empty: {table.shape}"
  _, rows, tokens = table.shape
  if tokens > _MAX_TOKENS:
    return f"{tokens} tokens are more than {_MAX_TOKENS}"
  if objective == "coverage" and not _resident(table):
    return (
      f"coverage of {rows} x {tokens} {table.dtype} does not fit the vector "
      "memory"
    )
  if objective == "dpp" and 4 * num_keep * tokens > _FACTOR_BYTES:
    return f"{num_keep} x {tokens} factor does not fit the vector memory"
  return None


def select(
  table: Float[Array, "B M N"],
  opening: Float[Array, "B N"],
  bonus: Float[Array, "B N"],
  *,
  num_keep: int,
  objective: str,
  weight: float,
  interpret: bool = False,
) -> tuple[Int32[Array, "B K"], Float[Array, "B K"]]:
  """Picks as `reference.select` does.

  Args:
    table: similarities, float32 or bfloat16.
    opening: score of the first pick, -inf where a column must never be picked.
    bonus: score of a column by itself; for "dpp" the diagonal of the table.
    num_keep: number of picks.
    objective: which score.
    weight: factor of the similarity in "max_min" and "mmr".
    interpret: whether to run the body step by step on any device.

  Returns:
    What `reference.select` returns.

  Example:
    >>> table = -jnp.abs(jnp.arange(5.0)[:, None] - jnp.arange(5.0)[None, :])
    >>> opening = jnp.array([[1.0, 0.0, 0.0, 0.0, 0.0]])
    >>> index, gain = select(
    ...     table[None], opening, jnp.zeros((1, 5)), num_keep=3,
    ...     objective="max_min", weight=1.0, interpret=True)
    >>> index.tolist(), gain.tolist()
    ([[0, 4, 2]], [[1.0, 4.0, 2.0]])
  """
  batch, _, num_tokens = table.shape
  resident = _resident(table)
  group = block_sizes.tpu_group(table.dtype.itemsize)
  missing = -table.shape[1] % group
  if missing:  # whole tiles of rows; rows of zeros cover nothing
    table = jnp.pad(table, ((0, 0), (0, missing), (0, 0)))
  num_rows = table.shape[1]
  table, opening, bonus = compat.varying_together(
    table, opening[:, None, :], bonus[:, None, :]
  )

  def whole(*shape):
    return pl.BlockSpec((None, *shape), lambda b: (b, 0, 0))

  vector = functools.partial(pltpu.VMEM, dtype=jnp.float32)
  scratch = dict(allowed_ref=vector((1, num_tokens)))
  if objective == "coverage":
    scratch["state_ref"] = vector((num_rows, 1))
  else:
    scratch["state_ref"] = vector((1, num_tokens))
  if objective == "dpp":
    rows = -(-num_keep // _ROWS) * _ROWS
    scratch["factor_ref"] = vector((rows, num_tokens))
  if not resident:
    scratch["tile_ref"] = pltpu.VMEM((group, num_tokens), table.dtype)
    scratch["copied"] = pltpu.SemaphoreType.DMA

  index, gain = pl.pallas_call(
    functools.partial(
      _kernel,
      num_keep=num_keep,
      objective=objective,
      weight=weight,
      group=group,
    ),
    out_shape=[
      compat.result_like((batch, 1, num_keep), dtype, table)
      for dtype in (jnp.int32, jnp.float32)
    ],
    grid=(batch,),
    in_specs=[
      whole(num_rows, num_tokens)
      if resident
      else pl.BlockSpec(memory_space=pl.ANY),
      whole(1, num_tokens),
      whole(1, num_tokens),
    ],
    out_specs=[whole(1, num_keep)] * 2,
    scratch_shapes=scratch,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel",), vmem_limit_bytes=_VMEM_LIMIT_BYTES
    ),
    cost_estimate=_cost(table, num_keep, objective, resident, group),
    interpret=interpret,
    name="greedy_select",
  )(table, opening, bonus)
  return index[:, 0], gain[:, 0]


def _kernel(
  table_ref,  # [M, N] in vector memory, twice; or [B, M, N] in HBM
  opening_ref,  # f32[1, N]   32 N bytes (sublanes are padded), twice
  bonus_ref,  # f32[1, N]     32 N, twice
  index_ref,  # int32[1, K]   32 K, twice
  gain_ref,  # f32[1, K]      32 K, twice
  *,
  allowed_ref,  # scratch f32[1, N]: 0 where a column may be picked, else -inf
  state_ref,  # scratch f32[1, N]; coverage f32[M, 1]: 512 M (lanes are padded)
  factor_ref=None,  # scratch f32[K, N]
  tile_ref=None,  # scratch [group, N]: 32 N
  copied=None,  # semaphore
  num_keep,
  objective,
  weight,
  group,
):
  # At N = 576 in float32: table 2.9 MB, the rest 0.2 MB; at 16,384 streamed in
  # bfloat16: 4.2 MB.
  example = pl.program_id(0)
  lane = jax.lax.broadcasted_iota(jnp.int32, allowed_ref.shape, 1)
  slot = jax.lax.broadcasted_iota(jnp.int32, index_ref.shape, 1)

  def row(pick):  # f32[1, N]
    base = pl.multiple_of(pick & -group, group)  # a power of two
    if tile_ref is None:
      tile = table_ref[pl.ds(base, group), :]
    else:
      source = table_ref.at[example, pl.ds(base, group), :]
      copy = pltpu.make_async_copy(source, tile_ref, copied)
      copy.start()
      copy.wait()
      tile = tile_ref[...]
    tile = tile.astype(jnp.float32)
    number = jax.lax.broadcasted_iota(jnp.int32, tile.shape, 0)
    own = number == pick - base
    return jnp.sum(jnp.where(own, tile, 0.0), axis=0, keepdims=True)

  def nearest(pick, step):
    state_ref[...] = jnp.maximum(state_ref[...], row(pick))
    return bonus_ref[...] - weight * state_ref[...]

  def total(pick, step):
    state_ref[...] += row(pick)
    return -state_ref[...]

  def cover(pick, step):
    return _cover(table_ref, state_ref, bonus_ref, lane, pick, group)

  def dpp(pick, step):
    left = _remove(row(pick), state_ref[...], factor_ref, lane, pick, step - 1)
    left = jnp.where(left > DEPENDENT * bonus_ref[...], left, 0.0)
    state_ref[...] = left
    return left

  def choose(scores, step):
    """Writes down the best column and returns it."""
    scores = jnp.where(allowed_ref[...] == 0, scores, -jnp.inf)
    gain = jnp.max(scores)
    best = jnp.where(scores == gain, lane, lane.shape[1] - 1)
    pick = jnp.min(best)  # ties: lower index
    index_ref[...] = jnp.where(slot == step, pick, index_ref[...])
    gain_ref[...] = jnp.where(slot == step, gain, gain_ref[...])
    return pick

  update = dict(max_min=nearest, mmr=nearest, max_sum=total)
  update |= dict(coverage=cover, dpp=dpp)
  opening = opening_ref[...]
  allowed_ref[...] = jnp.where(opening > -jnp.inf, 0.0, -jnp.inf)
  if objective in ("max_min", "mmr"):
    state_ref[...] = jnp.full(state_ref.shape, -jnp.inf, jnp.float32)
  elif objective == "dpp":
    state_ref[...] = bonus_ref[...]
  else:
    state_ref[...] = jnp.zeros(state_ref.shape, jnp.float32)

  def step(number, pick):
    allowed_ref[...] = jnp.where(lane == pick, -jnp.inf, allowed_ref[...])
    return choose(update[objective](pick, number), number)

  jax.lax.fori_loop(1, num_keep, step, choose(opening, 0))


def _cover(table_ref, best_ref, bonus_ref, lane, pick, group):
  """Takes up a pick in the best cover of each target; gains of all, [1, N]."""

  def rows(i, gain):
    place = pl.ds(pl.multiple_of(i * group, group), group)
    part = table_ref[place, :].astype(jnp.float32)  # [group, N]
    own = jnp.where(lane == pick, part, 0.0)  # [group, N]
    column = jnp.sum(own, axis=1, keepdims=True)
    best = jnp.maximum(best_ref[place, :], column)  # [group, 1]
    best_ref[place, :] = best
    more = jnp.maximum(part - best, 0.0)
    return gain + jnp.sum(more, axis=0, keepdims=True)

  return jax.lax.fori_loop(0, table_ref.shape[0] // group, rows, bonus_ref[...])


def _remove(row, left, factor_ref, lane, pick, step):
  """Variances once a pick is known, [1, N]; writes its row of the factor."""
  block = pl.multiple_of(step & -_ROWS, _ROWS)

  @pl.when(step == block)
  def _():  # the rows below the factor must not be read as they are
    factor_ref[pl.ds(block, _ROWS), :] = jnp.zeros(
      (_ROWS, factor_ref.shape[1]), jnp.float32
    )

  def rows(i, product):
    place = pl.ds(pl.multiple_of(i * _ROWS, _ROWS), _ROWS)
    part = factor_ref[place, :]  # [8, N]
    own = jnp.where(lane == pick, part, 0.0)
    column = jnp.sum(own, axis=1, keepdims=True)  # [8, 1]
    return product + jnp.sum(column * part, axis=0, keepdims=True)

  product = jax.lax.fori_loop(0, (step >> 3) + 1, rows, jnp.zeros_like(left))
  variance = jnp.sum(
    jnp.where(lane == pick, left, 0.0), axis=1, keepdims=True
  )  # [1, 1]
  usable = variance > 0
  scale = jax.lax.rsqrt(jnp.where(usable, variance, 1.0))
  new = jnp.where(usable, (row - product) * scale, 0.0)
  number = jax.lax.broadcasted_iota(jnp.int32, (_ROWS, lane.shape[1]), 0)
  place = pl.ds(block, _ROWS)
  factor_ref[place, :] = jnp.where(
    number == step - block, new, factor_ref[place, :]
  )
  return left - new * new


def _resident(table) -> bool:
  return block_sizes.table_fits_vmem(*table.shape[1:], table.dtype.itemsize)


def _cost(table, num_keep, objective, resident, group):
  batch, num_rows, num_tokens = table.shape
  each = {"coverage": 5 * num_rows, "dpp": 3 * num_keep}.get(objective, 6)
  read = num_rows if resident else num_keep * group
  return pl.CostEstimate(
    flops=batch * num_keep * num_tokens * each,
    bytes_accessed=batch * read * num_tokens * table.dtype.itemsize,
    transcendentals=0,
  )

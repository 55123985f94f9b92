"""Greedy selection on Hopper GPUs: all K steps of an example in one launch.

One block of one warpgroup is one example. The state (similarity to the nearest
pick, or sum) stays in shared memory, each thread with its own part of it, so
that a step needs no barrier but those of its two reductions; it reads one row
of the table from L2 or HBM, which coalesces. Up to 4,096 candidates are in
registers at once.

"coverage" and "dpp" read a whole matrix at every step, which one block does
far more slowly than the chip: XLA has them.

Bound: latency of one row read and two reductions a step; B blocks run side by
side. The kernel has been compiled for H100 and run in the Mosaic GPU
interpreter on CPU; it has not run on a GPU.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from tokjax import compat
from tokjax.kernels.greedy_select import block_sizes
from tokjax.typing import Array, Float, Int32

__all__ = ["select", "unsupported"]

_MAX_TOKENS = 24_576  # two float32 vectors in 227 KB of shared memory
_SUPPORTED = ("max_min", "max_sum", "mmr")


def unsupported(table, objective: str, num_keep: int) -> str | None:
  """Why this kernel cannot take the arguments, or None when it can.

  Args:
    table: [B, N, N], an array or a ShapeDtypeStruct.
    objective: as in `greedy_select`.
    num_keep: K, any.

  Returns:
    The reason, from shapes and dtypes alone.

  Example:
    >>> unsupported(jnp.zeros((1, 8, 8)), "max_min", 2) is None
    True
    >>> unsupported(jnp.zeros((1, 8, 8)), "coverage", 2)
    'coverage reads the whole table at every step'
  """
  if objective not in _SUPPORTED:
    what = "table" if objective == "coverage" else "factor"
    return f"{objective} reads the whole {what} at every step"
  if table.dtype not in (jnp.float32, jnp.bfloat16):
    return f"dtype {table.dtype} is neither float32 nor bfloat16"
  if 0 in table.shape:
    return f"an axis is empty: {table.shape}"
  if table.shape[2] > _MAX_TOKENS:
    return f"{table.shape[2]} tokens are more than {_MAX_TOKENS}"
  return None


def select(
  table: Float[Array, "B N N"],
  opening: Float[Array, "B N"],
  bonus: Float[Array, "B N"],
  *,
  num_keep: int,
  objective: str,
  weight: float,
  interpret=False,
) -> tuple[Int32[Array, "B K"], Float[Array, "B K"]]:
  """Picks as `reference.select` does.

  Args:
    table: similarities, float32 or bfloat16; rows are padded to a multiple of
      256 values, which copies a table that is not.
    opening: score of the first pick, -inf where a column must never be picked.
    bonus: score of a column by itself.
    num_keep: number of picks.
    objective: "max_min", "max_sum" or "mmr".
    weight: factor of the similarity in "max_min" and "mmr".
    interpret: settings of the Mosaic GPU interpreter; False on a GPU.

  Returns:
    What `reference.select` returns.
  """
  batch, _, num_tokens = table.shape
  chunk = block_sizes.gpu_chunk(num_tokens)
  padded = -(-num_tokens // chunk) * chunk
  missing = padded - num_tokens
  if missing:
    table = jnp.pad(table, ((0, 0), (0, 0), (0, missing)))
    edge = ((0, 0), (0, missing))
    opening = jnp.pad(opening, edge, constant_values=-jnp.inf)
    bonus = jnp.pad(bonus, edge)
  table, opening, bonus = compat.varying_together(table, opening, bonus)
  kernel = plgpu.kernel(
    functools.partial(
      _body,
      num_keep=num_keep,
      summed=objective == "max_sum",
      weight=weight,
      chunk=chunk,
      last=num_tokens - 1,
    ),
    out_type=[
      compat.result_like((batch, num_keep), dtype, table)
      for dtype in (jnp.int32, jnp.float32)
    ],
    scratch_types=dict(
      state_smem=plgpu.SMEM((padded,), jnp.float32),
      allowed_smem=plgpu.SMEM((padded,), jnp.float32),
    ),
    grid=(batch,),
    grid_names=("example",),
    kernel_name="greedy_select",
    interpret=interpret or None,
  )
  out = kernel(table, opening, bonus)
  # `plgpu.kernel` forgets over which mesh axes its results vary.
  return compat.varying_together(*out, table)[:-1]


def _body(
  table,  # [B, N, padded] in device memory
  opening,  # f32[B, padded]
  bonus,  # f32[B, padded]
  index,  # int32[B, K]
  gain,  # f32[B, K]
  *,
  state_smem,  # f32[padded]
  allowed_smem,  # f32[padded]: 0 where a column may be picked, else -inf
  num_keep,
  summed,
  weight,
  chunk,
  last,
):
  example = lax.axis_index("example")
  layout = plgpu.Layout.WG_STRIDED((chunk,), vec_size=2)
  position = plgpu.broadcasted_iota(jnp.int32, (chunk,), 0, layout=layout)

  def full(value, dtype=jnp.float32):
    return plgpu.layout_cast(jnp.full((chunk,), value, dtype), layout)

  def load(ref, place):
    values = plgpu.load(ref, place, layout=layout, optimized=False)
    return values.astype(jnp.float32)

  def choose(scores_of, step):
    """Writes down the best column and returns it."""

    def better(i, carry):
      best, where = carry
      scores = scores_of(i, pl.ds(i * chunk, chunk))
      higher = scores > best  # ties: lower index
      where = jnp.where(higher, position + i * chunk, where)
      return jnp.where(higher, scores, best), where

    best, where = lax.fori_loop(
      0,
      state_smem.shape[0] // chunk,
      better,
      (full(-jnp.inf), full(0, jnp.int32)),
    )
    top = jnp.max(best)
    pick = jnp.min(jnp.where(best == top, where, last))
    index[example, step] = pick
    gain[example, step] = top
    return pick

  def begin(i, place):
    scores = load(opening, (example, place))
    state_smem[place] = full(0.0 if summed else -jnp.inf)
    allowed_smem[place] = jnp.where(scores > -jnp.inf, full(0.0), -jnp.inf)
    return scores

  def step(number, pick):
    def scores(i, place):
      allowed = load(allowed_smem, place)
      allowed = jnp.where(position + i * chunk == pick, -jnp.inf, allowed)
      allowed_smem[place] = allowed
      row = load(table, (example, pick, place))
      state = load(state_smem, place)
      state = state + row if summed else jnp.maximum(state, row)
      state_smem[place] = state
      if summed:
        scores = -state
      else:
        scores = load(bonus, (example, place)) - weight * state
      return jnp.where(allowed == 0, scores, -jnp.inf)

    return choose(scores, number)

  lax.fori_loop(1, num_keep, step, choose(begin, 0))

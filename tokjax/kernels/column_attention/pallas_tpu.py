"""Column attention on TPU: two passes over tiles of scores, on chip.

Both passes make the same tile, keys along the sublanes and rows along the
lanes, so that numbers per row are plain vectors of lanes:

  scores[keys, rows] = key tile @ query tile^T * scale

Rows pass. The maximum and the sum of exponentials over keys are carried from
key tile to key tile, as in attention kernels; each row leaves its maximum and
its highest probability, which is one over that sum.

Columns pass. exp(scores - maximum) * (row_weight * highest) is added up over
row tiles, elementwise into a [keys, 128] accumulator whose lanes are summed
once, at the end. (The logarithm of the sum would lose digits of large scores.)

No more than a tile exists at a time, and nothing but the results, a number per
row or key, reaches HBM. Tiles that a causal mask hides are neither computed nor
fetched.

Bound: for heads of 64, one product costs the matrix unit less than the
exponentials and comparisons cost the vector unit, some ten operations for each
of 2 R S scores a head. These kernels have been compiled for TPU v5e, v6e and
v7x and run in interpret mode; no fraction of the bound has been measured on a
chip.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tokjax import compat
from tokjax.kernels.column_attention import block_sizes as block_sizes_lib
from tokjax.kernels.padding import pad_to
from tokjax.typing import Array, Float, Int32

__all__ = ["column_attention_forward", "unsupported"]

_LANES = 128
_VMEM_LIMIT_BYTES = 32 << 20
# Score of a hidden key. Finite: exp(hidden - hidden) must not be NaN.
_HIDDEN = -1e30
_NO_KEY, _NO_ROW, _WEIGHTLESS = -2, -1, -3  # ids that meet nothing


def unsupported(q, k) -> str | None:
  """Why these kernels cannot take the arguments, or None when they can.

  Args:
    q: [B, H, R, d], an array or a ShapeDtypeStruct.
    k: [B, Hk, S, d], likewise.

  Returns:
    The reason, from shapes and dtypes alone.

  Example:
    >>> import jax
    >>> half = jax.ShapeDtypeStruct((1, 2, 8, 64), "float16")
    >>> unsupported(half, half)
    'dtype float16 is neither float32 nor bfloat16'
  """
  for array in (q, k):
    if array.dtype not in (jnp.float32, jnp.bfloat16):
      return f"dtype {array.dtype} is neither float32 nor bfloat16"
  if 0 in q.shape or 0 in k.shape:
    return f"an axis is empty: {q.shape}, {k.shape}"
  if q.shape[-1] > 1024:
    return f"width {q.shape[-1]} is above 1024"
  return None


def column_attention_forward(
  q: Float[Array, "B H R d"],
  k: Float[Array, "B Hk S d"],
  row_ids: Int32[Array, "B R"] | None,
  key_ids: Int32[Array, "B S"] | None,
  row_weight: Float[Array, "B H R"],
  softmax: tuple[Float[Array, "B H R"], Float[Array, "B H R"]] | None = None,
  *,
  scale: float,
  causal: bool,
  block_sizes: block_sizes_lib.BlockSizes | None = None,
  interpret: bool = False,
):
  """Weighted column sums of the softmax, and two numbers of each row.

  Args:
    q: queries, float32 or bfloat16.
    k: keys of the same dtype.
    row_ids: a row sees the keys of its id; None, with `key_ids`, for all.
    key_ids: ids of the keys.
    row_weight: factor of each row, float32.
    softmax: highest score and highest probability of each row, where they are
      known; 0 where a row sees nothing.
    scale: factor of the inner products.
    causal: whether row i sees only keys j <= i + (S - R).
    block_sizes: tile sizes; None takes the default rule.
    interpret: whether to run the body step by step on any device.

  Returns:
    What `reference.column_attention_forward` returns.
  """
  num_rows, num_keys = q.shape[2], k.shape[2]
  sizes = block_sizes or block_sizes_lib.default_block_sizes(num_rows, num_keys)
  tiles = _Tiles(
    sizes=sizes,
    batch=q.shape[0],
    heads=q.shape[1],
    key_heads=k.shape[1],
    num_rows=num_rows,
    num_keys=num_keys,
    dim=q.shape[3],
    scale=scale,
    causal=causal,
    masked=row_ids is not None
    or bool(num_rows % sizes.rows or num_keys % sizes.keys),
    interpret=interpret,
  )
  if row_ids is None:
    row_ids = jnp.zeros_like(q[:, 0, :, 0], dtype=jnp.int32)
    key_ids = jnp.zeros_like(k[:, 0, :, 0], dtype=jnp.int32)
  row_ids = pad_to(row_ids, 1, tiles.num_i * sizes.rows, _NO_ROW)
  key_ids = pad_to(key_ids, 1, tiles.num_j * sizes.keys, _NO_KEY)
  operands = compat.varying_together(
    # A tile may not exceed its array; larger arrays stay as they are.
    pad_to(q, 2, sizes.rows, 0) if num_rows < sizes.rows else q,
    pad_to(k, 2, sizes.keys, 0) if num_keys < sizes.keys else k,
    row_ids.reshape(tiles.batch, tiles.num_i, 1, sizes.rows),
    key_ids.reshape(tiles.batch, tiles.num_j, 1, sizes.keys),
    row_weight,
  )
  *operands, row_weight = operands
  flat = (tiles.batch, tiles.heads, -1)
  if softmax is None:
    softmax = (
      x.reshape(flat)[..., :num_rows] for x in tiles.rows_pass(*operands)
    )
  top, highest = softmax
  live = row_weight != 0  # a row of weight zero may hold NaN
  received = tiles.columns_pass(
    *operands,
    jnp.where(live, top, 0),
    jnp.where(live, row_weight * highest, 0),
  )
  return (
    received.reshape(flat)[..., :num_keys],
    jnp.where(highest == 0, -jnp.inf, top - jnp.log(highest)),
    highest,
  )


@dataclasses.dataclass(frozen=True)
class _Tiles:
  """Sizes of one call; every one is static.

  The axes of a grid are example b, head h, row tile i and key tile j.
  """

  sizes: block_sizes_lib.BlockSizes
  batch: int
  heads: int
  key_heads: int
  num_rows: int
  num_keys: int
  dim: int
  scale: float
  causal: bool
  masked: bool  # whether ids are compared
  interpret: bool

  @property
  def num_i(self) -> int:
    return pl.cdiv(self.num_rows, self.sizes.rows)

  @property
  def num_j(self) -> int:
    return pl.cdiv(self.num_keys, self.sizes.keys)

  @property
  def shift(self) -> int:
    """Row i sees keys up to i + shift when causal."""
    return self.num_keys - self.num_rows

  def last_key_tile(self, i):
    """The last key tile that a row tile sees, 0 where it sees none."""
    if not self.causal:
      return self.num_j - 1
    last = (i + 1) * self.sizes.rows - 1 + self.shift
    last = _quotient(jnp.maximum(last, 0), self.sizes.keys)
    return jnp.minimum(last, self.num_j - 1)

  def first_row_tile(self, j):
    """The first row tile that sees a key tile; the last where none does."""
    if not self.causal:
      return 0
    first = jnp.maximum(j * self.sizes.keys - self.shift, 0)
    return jnp.minimum(_quotient(first, self.sizes.rows), self.num_i - 1)

  def key_head(self, h):
    return _quotient(h, self.heads // self.key_heads)

  def rows_pass(self, q, k, row_ids, key_ids):
    """float32 maxima and highest probabilities, [B, H, I, 1, rows]."""
    rows, keys = self.sizes.rows, self.sizes.keys

    def key_tile(i, j):
      return jnp.minimum(j, self.last_key_tile(i))

    shape = (self.batch, self.heads, self.num_i, 1, rows)
    spec = pl.BlockSpec(
      (None, None, None, 1, rows), lambda b, h, i, j: (b, h, i, 0, 0)
    )
    return pl.pallas_call(
      functools.partial(_rows_kernel, tiles=self),
      out_shape=[compat.result_like(shape, jnp.float32, q)] * 2,
      grid=(self.batch, self.heads, self.num_i, self.num_j),
      in_specs=[
        pl.BlockSpec(
          (None, None, rows, self.dim), lambda b, h, i, j: (b, h, i, 0)
        ),
        pl.BlockSpec(
          (None, None, keys, self.dim),
          lambda b, h, i, j: (b, self.key_head(h), key_tile(i, j), 0),
        ),
        pl.BlockSpec((None, None, 1, rows), lambda b, h, i, j: (b, i, 0, 0)),
        pl.BlockSpec(
          (None, None, 1, keys), lambda b, h, i, j: (b, key_tile(i, j), 0, 0)
        ),
      ],
      out_specs=[spec, spec],
      scratch_shapes=[pltpu.VMEM((1, rows), jnp.float32)],
      compiler_params=_compiler_params(),
      cost_estimate=self.cost(q, k, self.num_i),
      interpret=self.interpret,
      name="column_attention_rows",
    )(q, k, row_ids, key_ids)

  def columns_pass(self, q, k, row_ids, key_ids, offset, row_weight):
    """float32[B, H, J, 1, keys] sums over rows."""
    rows, keys = self.sizes.rows, self.sizes.keys

    def row_tile(i, j):
      return jnp.maximum(i, self.first_row_tile(j))

    def in_tiles(x):  # [B, H, R] -> [B, H, I, 1, rows]
      x = pad_to(x, 2, self.num_i * rows, 0)
      return x.reshape(self.batch, self.heads, self.num_i, 1, rows)

    per_row = pl.BlockSpec(
      (None, None, None, 1, rows),
      lambda b, h, j, i: (b, h, row_tile(i, j), 0, 0),
    )
    return pl.pallas_call(
      functools.partial(_columns_kernel, tiles=self),
      out_shape=compat.result_like(
        (self.batch, self.heads, self.num_j, 1, keys), jnp.float32, q
      ),
      grid=(self.batch, self.heads, self.num_j, self.num_i),
      in_specs=[
        pl.BlockSpec(
          (None, None, rows, self.dim),
          lambda b, h, j, i: (b, h, row_tile(i, j), 0),
        ),
        pl.BlockSpec(
          (None, None, keys, self.dim),
          lambda b, h, j, i: (b, self.key_head(h), j, 0),
        ),
        pl.BlockSpec(
          (None, None, 1, rows), lambda b, h, j, i: (b, row_tile(i, j), 0, 0)
        ),
        pl.BlockSpec((None, None, 1, keys), lambda b, h, j, i: (b, j, 0, 0)),
        per_row,
        per_row,
      ],
      out_specs=pl.BlockSpec(
        (None, None, None, 1, keys), lambda b, h, j, i: (b, h, j, 0, 0)
      ),
      scratch_shapes=[pltpu.VMEM((keys, _LANES), jnp.float32)],
      compiler_params=_compiler_params(),
      cost_estimate=self.cost(q, k, self.num_j),
      interpret=self.interpret,
      name="column_attention_columns",
    )(q, k, row_ids, key_ids, in_tiles(offset), in_tiles(row_weight))

  def cost(self, q, k, times):
    """What one pass tells XLA: a product, an exponential per score."""
    scores = self.batch * self.heads * self.num_rows * self.num_keys
    scores = scores // 2 if self.causal else scores
    return pl.CostEstimate(
      flops=2 * scores * self.dim,
      transcendentals=scores,
      bytes_accessed=(q.nbytes + k.nbytes) * times,
    )

  def scores(self, q_ref, k_ref, row_ids, key_ids, i, j):
    """float32[keys, rows], `_HIDDEN` where the row does not see the key."""
    rows, keys = self.sizes.rows, self.sizes.keys
    scores = self.scale * jax.lax.dot_general(
      k_ref[...],
      q_ref[...],
      (((1,), (1,)), ((), ())),
      # By default the matrix unit rounds float32 operands to bfloat16.
      precision="highest" if q_ref.dtype == jnp.float32 else None,
      preferred_element_type=jnp.float32,
    )
    if self.masked:
      # From lanes to sublanes: [1, keys] -> [1, keys, 1].
      seen = key_ids[:, :, None].reshape(keys, 1) == row_ids
      scores = jnp.where(seen, scores, _HIDDEN)
    if self.causal:
      key = jax.lax.broadcasted_iota(jnp.int32, (keys, rows), 0) + j * keys
      row = jax.lax.broadcasted_iota(jnp.int32, (keys, rows), 1) + i * rows
      scores = jnp.where(key <= row + self.shift, scores, _HIDDEN)
    return scores


def _rows_kernel(
  q_ref,  # [rows, d]           rows * d * itemsize bytes, twice
  k_ref,  # [keys, d]           keys * d * itemsize, twice
  row_ids_ref,  # int32[1, rows]
  key_ids_ref,  # int32[1, keys]
  top_ref,  # f32[1, rows]
  highest_ref,  # f32[1, rows]
  total_ref,  # scratch f32[1, rows]
  *,
  tiles,
):
  # On top: scores, their masked copy, exponentials, 4 * keys * rows each.
  i, j = pl.program_id(2), pl.program_id(3)

  @pl.when(j == 0)
  def _():
    top_ref[...] = jnp.full(top_ref.shape, _HIDDEN, jnp.float32)
    total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)

  @pl.when(j <= tiles.last_key_tile(i))
  def _():
    scores = tiles.scores(
      q_ref, k_ref, row_ids_ref[...], key_ids_ref[...], i, j
    )
    old = top_ref[...]
    top = jnp.maximum(old, jnp.max(scores, axis=0, keepdims=True))
    part = jnp.sum(jnp.exp(scores - top), axis=0, keepdims=True)
    total_ref[...] = total_ref[...] * jnp.exp(old - top) + part
    top_ref[...] = top

  @pl.when(j == pl.num_programs(3) - 1)
  def _():
    # Sums over hidden keys alone mean nothing.
    blind = top_ref[...] <= _HIDDEN
    top_ref[...] = jnp.where(blind, 0.0, top_ref[...])
    highest_ref[...] = jnp.where(blind, 0.0, 1.0 / total_ref[...])


def _columns_kernel(
  q_ref,  # [rows, d]           rows * d * itemsize bytes, twice
  k_ref,  # [keys, d]           keys * d * itemsize, twice
  row_ids_ref,  # int32[1, rows]
  key_ids_ref,  # int32[1, keys]
  offset_ref,  # f32[1, rows]
  weight_ref,  # f32[1, rows]
  received_ref,  # f32[1, keys]
  sum_ref,  # scratch f32[keys, 128]
  *,
  tiles,
):
  # On top: as in the rows pass.
  j, i = pl.program_id(2), pl.program_id(3)

  @pl.when(i == 0)
  def _():
    sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)

  @pl.when(i >= tiles.first_row_tile(j))
  def _():
    weight = weight_ref[...]
    row_ids = row_ids_ref[...]
    if tiles.masked:  # a row of weight zero may hold NaN
      row_ids = jnp.where(weight != 0, row_ids, _WEIGHTLESS)
    scores = tiles.scores(q_ref, k_ref, row_ids, key_ids_ref[...], i, j)
    weighted = jnp.exp(scores - offset_ref[...]) * weight
    total = sum_ref[...]
    for start in range(0, tiles.sizes.rows, _LANES):
      total += weighted[:, start : start + _LANES]
    sum_ref[...] = total

  @pl.when(i == pl.num_programs(3) - 1)
  def _():
    received_ref[...] = jnp.sum(sum_ref[...].T, axis=0, keepdims=True)


def _compiler_params():
  """The last grid axis accumulates; the others are independent."""
  return pltpu.CompilerParams(
    dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
    vmem_limit_bytes=_VMEM_LIMIT_BYTES,
  )


def _quotient(x, divisor):
  """Of a number that is not negative; `//` would look at its sign."""
  return jax.lax.div(x, np.int32(divisor))

"""Column attention on Hopper GPUs: two passes over tiles of scores, on chip.

A warpgroup holds 64 rows of one operand in shared memory and meets tiles of
128 rows of the other, which a third warpgroup fetches into a ring of
shared-memory slots; the product stays in registers (wgmma):

  scores[still, moving] = still rows @ moving tile^T

Rows pass. Queries stand still and keys move; the maximum and the sum of
exponentials of each query are carried along.

Columns pass. Keys stand still and queries move; each tile gives
exp(scores - maximum) * (row_weight / sum), summed over its queries.

Tiles that a causal mask hides from all rows of a block are not fetched.
Exponentials are those of the hardware, to the base of two (2 ulp).

Bound: for heads of 64 the exponentials, some 2 R S a head. The kernels have
been compiled for H100 and run in the Mosaic GPU interpreter on CPU; they have
not run on a GPU, and no fraction of the bound has been measured.
"""

import dataclasses
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from tokjax import compat
from tokjax.kernels.column_attention import block_sizes
from tokjax.kernels.hopper_tiles import COLUMN, ROW, fill_rings, load_vector
from tokjax.kernels.padding import pad_to_multiple
from tokjax.typing import Array, Float, Int32

__all__ = ["column_attention_forward", "unsupported"]

_MAX_DIM = 256  # by shared memory
_COMPUTE = 2  # warpgroups that compute; one more fetches
_STILL = 64  # rows of a warpgroup
_BLOCK = _COMPUTE * _STILL
_MOVING = 128  # rows of a fetched tile
_LOG2_E = math.log2(math.e)
_NO_KEY, _NO_ROW, _WEIGHTLESS = -2, -1, -3  # ids that meet nothing


def unsupported(q, k) -> str | None:
  """Why these kernels cannot take the arguments, or None when they can.

  Args:
    q: [B, H, R, d], an array or a ShapeDtypeStruct.
    k: [B, Hk, S, d], likewise.

  Returns:
    The reason, from shapes and dtypes alone.

  Example:
    >>> q = jnp.zeros((1, 2, 8, 64))
    >>> unsupported(q, q)
    'dtype must be bfloat16, got float32'
  """
  for array in (q, k):
    if array.dtype != jnp.bfloat16:
      return f"dtype must be bfloat16, got {array.dtype}"
  if q.shape[-1] > _MAX_DIM:
    return f"d must be at most {_MAX_DIM}, got {q.shape[-1]}"
  if 0 in (*q.shape, *k.shape):
    return f"no axis may be empty, got {q.shape}, {k.shape}"
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
  interpret=False,
):
  """Weighted column sums of the softmax, and two numbers of each row.

  Args:
    q: queries, bfloat16.
    k: keys, bfloat16.
    row_ids: a row sees the keys of its id; None, with `key_ids`, for all.
    key_ids: ids of the keys.
    row_weight: factor of each row, float32.
    softmax: highest score and highest probability of each row, where they are
      known; 0 where a row sees nothing.
    scale: factor of the inner products.
    causal: whether row i sees only keys j <= i + (S - R).
    interpret: settings of the Mosaic GPU interpreter; False on a GPU.

  Returns:
    What `reference.column_attention_forward` returns.
  """
  batch, heads, num_rows, _ = q.shape
  key_heads, num_keys = k.shape[1:3]
  masked = row_ids is not None or bool(num_rows % _BLOCK or num_keys % _BLOCK)
  if row_ids is None:
    row_ids = jnp.zeros_like(q[:, 0, :, 0], dtype=jnp.int32)
    key_ids = jnp.zeros_like(k[:, 0, :, 0], dtype=jnp.int32)
  q, k = (pad_to_multiple(pad_to_multiple(x, 2, _BLOCK), 3, 16) for x in (q, k))
  row_ids = pad_to_multiple(row_ids, 1, _BLOCK, _NO_ROW)
  key_ids = pad_to_multiple(key_ids, 1, _BLOCK, _NO_KEY)
  weight = pad_to_multiple(row_weight, 2, _BLOCK)
  # A row of weight zero may hold NaN; it is kept out of the columns.
  column_ids = jnp.where(weight != 0, row_ids[:, None, :], _WEIGHTLESS)
  dim = q.shape[3]
  q, k, row_ids, key_ids, column_ids, weight = compat.varying_together(
    q.reshape(batch * heads, -1, dim),
    k.reshape(batch * key_heads, -1, dim),
    row_ids,
    key_ids,
    column_ids.reshape(batch * heads, -1),
    weight.reshape(batch * heads, -1),
  )
  program = _Program(
    heads=batch * heads,
    heads_per_example=heads,
    heads_per_key_head=heads // key_heads,
    num_rows=q.shape[1],
    num_keys=k.shape[1],
    dim=dim,
    shift=num_keys - num_rows,
    scale=scale * _LOG2_E,
    causal=causal,
    masked=masked,
    columns=False,
  )
  if softmax is None:
    top, total = program.call(
      (q, k, _tiles(row_ids, _STILL), _tiles(key_ids, _MOVING)), interpret
    )
    top, total = (x.reshape(batch * heads, -1) for x in (top, total))
    highest = jnp.where(total == 0, 0, 1 / jnp.where(total == 0, 1, total))
  else:
    top, highest = (
      pad_to_multiple(x, 2, _BLOCK).reshape(batch * heads, -1) for x in softmax
    )
    top *= _LOG2_E
  live = (weight != 0) & (highest != 0)
  offset = jnp.where(live, top, 0)
  share = jnp.where(live, weight * highest, 0)
  (received,) = dataclasses.replace(program, columns=True).call(
    (
      k,
      q,
      _tiles(key_ids, _STILL),
      *(_tiles(x, _MOVING) for x in (column_ids, offset, share)),
    ),
    interpret,
  )

  def shaped(x, size):
    return x.reshape(batch, heads, -1)[..., :size]

  log_normalizer = top / _LOG2_E - jnp.log(highest)
  log_normalizer = jnp.where(highest == 0, -jnp.inf, log_normalizer)
  return (
    shaped(received, num_keys),
    shaped(log_normalizer, num_rows),
    shaped(highest, num_rows),
  )


@dataclasses.dataclass(frozen=True)
class _Program:
  """What one block does in one of the passes; every size is static."""

  heads: int  # of all examples
  heads_per_example: int
  heads_per_key_head: int
  num_rows: int  # padded
  num_keys: int  # padded
  dim: int
  shift: int  # row i sees keys up to i + shift when causal
  scale: float  # to the base of two
  causal: bool
  masked: bool  # whether ids are compared
  columns: bool  # which pass

  @property
  def num_still(self) -> int:
    return self.num_keys if self.columns else self.num_rows

  @property
  def num_moving(self) -> int:
    return self.num_rows if self.columns else self.num_keys

  @property
  def blocks_per_head(self) -> int:
    return self.num_still // _BLOCK

  @property
  def num_tiles(self) -> int:
    return self.num_moving // _MOVING

  @property
  def stages(self) -> int:
    most = block_sizes.gpu_stages(self.dim, _BLOCK, _MOVING)
    return min(most, self.num_tiles)

  def call(self, operands, interpret):
    """Runs the pass.

    Args:
      operands: still [heads, n, d], moving [heads, n, d], ids of the still
        rows [B, n / 64, 64], ids of the moving rows [B or heads, n / 128, 128];
        in the columns pass also maxima and shares of the moving rows.
      interpret: settings of the interpreter, or False.

    Returns:
      Arrays [heads, still / 64, 64]: the top scores and the sums of
      exponentials, or the columns.
    """
    shape = (self.heads, self.num_still // _STILL, _STILL)
    out = compat.result_like(shape, jnp.float32, operands[0])
    swizzle = plgpu.find_swizzle(self.dim * 16)
    transforms = (
      plgpu.TilingTransform((8, swizzle // 2)),
      plgpu.SwizzleTransform(swizzle),
    )

    def rows(count, size):
      return plgpu.SMEM(
        (count, size, self.dim), jnp.bfloat16, transforms=transforms
      )

    results = plgpu.kernel(
      self.body,
      out_type=[out] if self.columns else [out, out],
      scratch_types=dict(
        still_smem=rows(_COMPUTE, _STILL),
        moving_smem=rows(self.stages, _MOVING),
        still_ready=plgpu.Barrier(num_barriers=_COMPUTE),
        full=plgpu.Barrier(num_barriers=self.stages),
        empty=plgpu.Barrier(num_arrivals=_COMPUTE, num_barriers=self.stages),
      ),
      grid=(self.heads * self.blocks_per_head,),
      grid_names=("block",),
      num_threads=_COMPUTE + 1,
      thread_name="warpgroup",
      compiler_params=plgpu.CompilerParams(approx_math=True),
      kernel_name="column_attention_" + ("columns" if self.columns else "rows"),
      interpret=interpret or None,
    )(*operands)
    # `plgpu.kernel` forgets over which mesh axes its results vary.
    return compat.varying_together(*results, operands[0])[:-1]

  def body(self, still, moving, still_ids, moving_ids, *refs, **scratch):
    """One block.

    Args:
      still: in device memory, as in `call`; likewise the next three.
      moving: the operand that is fetched in tiles.
      still_ids: ids of the still rows.
      moving_ids: ids of the moving rows.
      *refs: maxima and shares in the columns pass, then the results.
      **scratch: what `call` names.
    """
    block = lax.axis_index("block")
    head = lax.div(block, jnp.int32(self.blocks_per_head))
    place = lax.rem(block, jnp.int32(self.blocks_per_head))
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == _COMPUTE)
    def _():
      plgpu.set_max_registers(56, action="decrease")
      self.fetch(still, moving, head, place, **scratch)

    @pl.when(warpgroup < _COMPUTE)
    def _():
      plgpu.set_max_registers(224, action="increase")
      self.compute(
        still_ids, moving_ids, refs, head, place, warpgroup, **scratch
      )

  def seen_tiles(self, place):
    """First tile that a block meets, and one past the last; never none."""
    if not self.causal:
      return 0, self.num_tiles
    start = place * _BLOCK
    if self.columns:
      first = lax.div(jnp.maximum(start - self.shift, 0), jnp.int32(_MOVING))
      return jnp.minimum(first, self.num_tiles - 1), jnp.int32(self.num_tiles)
    last = jnp.maximum(start + _BLOCK - 1 + self.shift, 0)
    last = lax.div(last, jnp.int32(_MOVING)) + 1
    return jnp.int32(0), jnp.minimum(last, self.num_tiles)

  def fetch(
    self,
    still,
    moving,
    head,
    place,
    *,
    still_smem,
    moving_smem,
    still_ready,
    full,
    empty,
  ):
    """Asks for the still rows, then keeps the ring full."""
    key_head = lax.div(head, jnp.int32(self.heads_per_key_head))
    still_head, moving_head = (
      (key_head, head) if self.columns else (head, key_head)
    )
    for i in range(_COMPUTE):
      plgpu.copy_gmem_to_smem(
        still.at[still_head, pl.ds(place * _BLOCK + i * _STILL, _STILL)],
        still_smem.at[i],
        still_ready.at[i],
      )
    first, end = self.seen_tiles(place)

    def wait(slot):
      plgpu.barrier_wait(empty.at[slot])

    def ask(step, slot):
      plgpu.copy_gmem_to_smem(
        moving.at[moving_head, pl.ds((first + step) * _MOVING, _MOVING)],
        moving_smem.at[slot],
        full.at[slot],
      )

    fill_rings(end - first, self.stages, (wait, ask))

  def compute(
    self,
    still_ids,
    moving_ids,
    refs,
    head,
    place,
    warpgroup,
    *,
    still_smem,
    moving_smem,
    still_ready,
    full,
    empty,
  ):
    """Meets the tiles with 64 still rows."""
    example = lax.div(head, jnp.int32(self.heads_per_example))
    tile64 = place * _COMPUTE + warpgroup
    ids = None
    if self.masked:
      ids = load_vector(still_ids, (example, tile64), ROW)
    first, end = self.seen_tiles(place)
    plgpu.barrier_wait(still_ready.at[warpgroup])

    def scores(tile):
      """float32[64, 128], -inf where hidden."""
      other = None
      if self.masked:
        owner = head if self.columns else example
        other = load_vector(moving_ids, (owner, tile), COLUMN)
      slot = lax.rem(tile - first, jnp.int32(self.stages))
      plgpu.barrier_wait(full.at[slot])
      product = _product(still_smem.at[warpgroup], moving_smem.at[slot])
      plgpu.barrier_arrive(empty.at[slot])
      product = product * self.scale
      shape = (_STILL, _MOVING)
      if self.masked:
        seen = lax.broadcast_in_dim(ids, shape, [0]) == lax.broadcast_in_dim(
          other, shape, [1]
        )
        product = jnp.where(seen, product, -jnp.inf)
      if self.causal:
        still = _iota(shape, 0) + tile64 * _STILL
        moving = _iota(shape, 1) + tile * _MOVING
        key, row = (still, moving) if self.columns else (moving, still)
        product = jnp.where(key <= row + self.shift, product, -jnp.inf)
      return product

    def full_rows(value):
      values = jnp.full((_STILL,), value, jnp.float32)
      return plgpu.layout_cast(values, ROW)

    if self.columns:
      offsets, weights, received = refs

      def add(tile, total):
        offset = load_vector(offsets, (head, tile), COLUMN)
        weight = load_vector(weights, (head, tile), COLUMN)
        product = scores(tile)
        offset = lax.broadcast_in_dim(offset, product.shape, [1])
        weight = lax.broadcast_in_dim(weight, product.shape, [1])
        weighted = jnp.exp2(product - offset) * weight
        return total + jnp.sum(weighted, axis=1)

      received[head, tile64] = lax.fori_loop(first, end, add, full_rows(0.0))
      return

    def normalize(tile, carry):
      top, total = carry
      product = scores(tile)
      new = jnp.maximum(top, jnp.max(product, axis=1))
      # Before the first visible key there is no maximum to subtract.
      offset = jnp.where(new == -jnp.inf, 0.0, new)
      exponential = jnp.exp2(
        product - lax.broadcast_in_dim(offset, product.shape, [0])
      )
      total = total * jnp.exp2(top - offset) + jnp.sum(exponential, axis=1)
      return new, total

    carry = (full_rows(-jnp.inf), full_rows(0.0))
    top, total = lax.fori_loop(first, end, normalize, carry)
    refs[0][head, tile64] = top
    refs[1][head, tile64] = total


def _product(still, moving):
  """float32[64, 128] inner products of the rows."""

  def multiply(accumulator):
    plgpu.wgmma(accumulator, still, plgpu.transpose_ref(moving, (1, 0)))
    return accumulator[...]

  return pl.run_scoped(multiply, plgpu.ACC((_STILL, _MOVING), jnp.float32))


def _iota(shape, axis):
  return plgpu.broadcasted_iota(
    jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA
  )


def _tiles(x, size):
  """[n, rows] -> [n, rows / size, size]."""
  return x.reshape(x.shape[0], -1, size)

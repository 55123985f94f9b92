"""Attention under a rule on Hopper GPUs: only the blocks that are not empty.

A block of the grid owns 128 queries of one head and goes through the list of
their blocks of 128 keys (`block_lists`). Two warpgroups hold 64 queries each;
a third one reads the list and fetches keys and values into two rings of
shared-memory slots. Of each block of keys a warpgroup makes

  scores  = queries @ keys^T                   float32[64, 128], registers
  weights = exp2(scores - highest so far)      of the pairs that the rule allows
  out     = out * exp2(highest before - highest so far) + weights @ values

with both products on the tensor cores (wgmma), the weights as its first operand
in registers, in bfloat16. The rule is asked on the spot, about the 64 x 128
pairs of a block that is PARTIAL, and loads what it asks for; a FULL block has
no mask. Exponentials are those of the hardware, to the base of two (2 ulp).

For d = e = 128 a block of the grid holds 32 KiB of queries and two slots of
32 KiB each for keys and for values, 160 KiB, and a thread 160 registers of
results, weights and scores, or of results and the product that joins them.

Bound: the tensor cores, 32,768 (d + e) FLOPs a pair of blocks, for 256 (d + e)
bytes of keys and values, which other queries of the head leave in the L2 cache;
with heads of 64 also the exponentials, 16,384 a pair. The kernel has been
compiled for H100 and run in the Mosaic GPU interpreter on CPU; nothing has been
measured on a chip.
"""

import dataclasses
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from tokjax import compat
from tokjax.kernels.hopper_tiles import COLUMN, ROW, fill_rings, load_vector
from tokjax.kernels.padding import pad_to_multiple
from tokjax.kernels.sparse_attention.block_lists import block_lists
from tokjax.ops.mask_rules import FULL, Rule, Tokens
from tokjax.typing import Array, Float

__all__ = ["rule_attention_forward", "unsupported"]

_MAX_DIM = 128  # of queries and keys, and of values, by registers
_COMPUTE = 2  # warpgroups that compute; one more fetches
_ROWS = 64  # queries of a warpgroup
_BLOCK = _COMPUTE * _ROWS
_KEYS = 128  # of a fetched tile
_SHAPE = (_ROWS, _KEYS)  # of a tile of scores
_SMEM_BYTES = 227 * 1024  # what one block may have on Hopper
_OTHER_BYTES = 4096  # barriers, scratch of reductions, alignment
_MAX_STAGES = 4
_LOG2_E = math.log2(math.e)


def unsupported(q, k, v, readers: Tokens, read: Tokens) -> str | None:
  """Why this kernel cannot take the arguments, or None when it can.

  Args:
    q: [B, H, N, d], an array or a ShapeDtypeStruct.
    k: [B, K, M, d], likewise.
    v: [B, K, M, e], likewise.
    readers: N tokens.
    read: M tokens.

  Returns:
    The reason, from shapes and dtypes alone.

  Example:
    >>> from tokjax.ops import mask_rules
    >>> x, given = jnp.zeros((1, 2, 8, 64)), mask_rules.tokens(8)
    >>> unsupported(x, x, x, given, given)
    'dtype must be bfloat16, got float32'
  """
  del readers, read  # any will do
  for array in (q, k, v):
    if array.dtype != jnp.bfloat16:
      return f"dtype must be bfloat16, got {array.dtype}"
  for name, array in (("d", q), ("e", v)):
    if array.shape[-1] > _MAX_DIM:
      return f"{name} must be at most {_MAX_DIM}, got {array.shape[-1]}"
  if 0 in (*q.shape, *k.shape, *v.shape):
    return f"no axis may be empty, got {q.shape}, {k.shape}, {v.shape}"
  return None


def rule_attention_forward(
  q: Float[Array, "B H N d"],
  k: Float[Array, "B K M d"],
  v: Float[Array, "B K M e"],
  rule: Rule,
  readers: Tokens,
  read: Tokens,
  *,
  interpret=False,
) -> tuple[
  Float[Array, "B H N e"], Float[Array, "B H N"], Float[Array, "B H N"]
]:
  """What `reference.rule_attention_forward` returns.

  Args:
    q: queries, bfloat16.
    k: keys, bfloat16.
    v: values, bfloat16.
    rule: who may read whom.
    readers: what the queries are.
    read: what the keys are.
    interpret: settings of the Mosaic GPU interpreter; False on a GPU.
  """
  batch, heads, num_rows, dim = q.shape
  key_heads, num_keys, value_dim = v.shape[1:]
  lists = block_lists(rule, readers, read, query_block=_BLOCK, key_block=_KEYS)
  q = pad_to_multiple(pad_to_multiple(q, 2, _BLOCK), 3, 16)
  k, v = (pad_to_multiple(pad_to_multiple(x, 2, _KEYS), 3, 16) for x in (k, v))
  operands = compat.varying_together(
    q.reshape(batch * heads, -1, q.shape[-1]),
    *(x.reshape(batch * key_heads, -1, x.shape[-1]) for x in (k, v)),
    _fields(readers, _ROWS),
    _fields(read, _KEYS),
    *lists,
  )
  program = _Program(
    rule=rule,
    heads=batch * heads,
    heads_per_example=heads,
    heads_per_key_head=heads // key_heads,
    num_blocks=q.shape[2] // _BLOCK,
    num_keys=num_keys,
    dim=q.shape[3],
    value_dim=v.shape[3],
    scale=dim**-0.5 * _LOG2_E,
  )
  out, top, total = program.call(operands, interpret)
  out, top, total = (
    x.reshape(batch, heads, -1, *rest)[:, :, :num_rows]
    for x, rest in ((out, out.shape[2:]), (top, ()), (total, ()))
  )
  highest = top / _LOG2_E
  some = total > 0
  lse = jnp.where(some, highest + jnp.log(jnp.where(some, total, 1)), -jnp.inf)
  return out[..., :value_dim], lse, highest


@dataclasses.dataclass(frozen=True)
class _Program:
  """What one block of the grid does; every size is static."""

  rule: Rule
  heads: int  # of all examples
  heads_per_example: int
  heads_per_key_head: int
  num_blocks: int  # of queries
  num_keys: int  # before padding
  dim: int  # padded
  value_dim: int  # padded
  scale: float  # to the base of two

  @property
  def stages(self) -> int:
    """Slots of each ring, as many as fit."""
    free = _SMEM_BYTES - _OTHER_BYTES - 2 * _BLOCK * self.dim
    most = free // (2 * _KEYS * (self.dim + self.value_dim))
    return min(_MAX_STAGES, most, pl.cdiv(self.num_keys, _KEYS))

  def call(self, operands, interpret):
    """Runs the kernel.

    Args:
      operands: q [heads, n, d], k [key heads, m, d], v [key heads, m, e],
        fields of the readers [7, B, n / 64, 64] and of the keys
        [7, B, m / 128, 128], then the lists; B is 1 where all examples agree.
      interpret: settings of the interpreter, or False.

    Returns:
      float32: results [heads, n, e]; highest scores, to the base of two, and
      sums of exponentials [heads, n / 64, 64].
    """
    num_rows = self.num_blocks * _BLOCK
    q = operands[0]
    short = compat.result_like(
      (self.heads, num_rows // _ROWS, _ROWS), jnp.float32, q
    )
    long = compat.result_like(
      (self.heads, num_rows, self.value_dim), jnp.float32, q
    )

    def rows(count, size, width):
      swizzle = plgpu.find_swizzle(width * 16)
      transforms = (
        plgpu.TilingTransform((8, swizzle // 2)),
        plgpu.SwizzleTransform(swizzle),
      )
      return plgpu.SMEM(
        (count, size, width), jnp.bfloat16, transforms=transforms
      )

    def barriers(num_arrivals=1):
      return plgpu.Barrier(num_arrivals=num_arrivals, num_barriers=self.stages)

    results = plgpu.kernel(
      self.body,
      out_type=[long, short, short],
      scratch_types=dict(
        q_smem=rows(_COMPUTE, _ROWS, self.dim),
        k_smem=rows(self.stages, _KEYS, self.dim),
        v_smem=rows(self.stages, _KEYS, self.value_dim),
        q_full=plgpu.Barrier(num_barriers=_COMPUTE),
        k_full=barriers(),
        v_full=barriers(),
        k_empty=barriers(_COMPUTE),
        v_empty=barriers(_COMPUTE),
      ),
      grid=(self.heads * self.num_blocks,),
      grid_names=("block",),
      num_threads=_COMPUTE + 1,
      thread_name="warpgroup",
      compiler_params=plgpu.CompilerParams(approx_math=True),
      kernel_name="rule_attention",
      interpret=interpret or None,
    )(*operands)
    # `plgpu.kernel` forgets over which mesh axes its results vary.
    return compat.varying_together(*results, q)[:-1]

  def body(
    self, q, k, v, readers, read, index, kind, count, *results, **scratch
  ):
    """One block of the grid; what there is in device memory is as in `call`."""
    block = lax.axis_index("block")
    head = lax.div(block, jnp.int32(self.num_blocks))
    place = lax.rem(block, jnp.int32(self.num_blocks))
    example = lax.div(head, jnp.int32(self.heads_per_example))
    row = (example if count.shape[0] > 1 else 0, place)
    num_tiles = count[row]
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == _COMPUTE)
    def _():
      plgpu.set_max_registers(24, action="decrease")
      self.fetch(q, k, v, head, place, index, row, num_tiles, **scratch)

    @pl.when(warpgroup < _COMPUTE)
    def _():
      plgpu.set_max_registers(240, action="increase")
      tile64 = place * _COMPUTE + warpgroup

      def met(step):
        """Number and kind of a tile of keys."""
        return index[(*row, step)], kind[(*row, step)]

      def mask(tile, scores):
        """-inf where the rule does not allow a pair."""
        reader = _Loaded(readers, example, tile64, ROW, 0)
        key = _Loaded(read, example, tile, COLUMN, 1)
        allowed = self.rule(reader, key)
        if self.num_keys % _KEYS:
          number = tile * _KEYS + plgpu.broadcasted_iota(
            jnp.int32, _SHAPE, 1, layout=plgpu.Layout.WGMMA
          )
          allowed &= number < self.num_keys
        return jnp.where(allowed, scores, -jnp.inf)

      out, top, total = self.compute(met, mask, warpgroup, num_tiles, **scratch)
      results[0][head, pl.ds(tile64 * _ROWS, _ROWS)] = out
      results[1][head, tile64] = top
      results[2][head, tile64] = total

  def fetch(
    self,
    q,
    k,
    v,
    head,
    place,
    index,
    row,
    num_tiles,
    *,
    q_smem,
    k_smem,
    v_smem,
    q_full,
    k_full,
    v_full,
    k_empty,
    v_empty,
  ):
    """Asks for the queries, then keeps the rings full."""
    for i in range(_COMPUTE):
      plgpu.copy_gmem_to_smem(
        q.at[head, pl.ds(place * _BLOCK + i * _ROWS, _ROWS)],
        q_smem.at[i],
        q_full.at[i],
      )
    key_head = lax.div(head, jnp.int32(self.heads_per_key_head))

    def ring(source, smem, full, empty):
      def wait(slot):
        plgpu.barrier_wait(empty.at[slot])

      def ask(step, slot):
        rows = pl.ds(index[(*row, step)] * _KEYS, _KEYS)
        plgpu.copy_gmem_to_smem(
          source.at[key_head, rows], smem.at[slot], full.at[slot]
        )

      return wait, ask

    fill_rings(
      num_tiles,
      self.stages,
      ring(k, k_smem, k_full, k_empty),
      ring(v, v_smem, v_full, v_empty),
    )

  def compute(
    self,
    met,
    mask,
    warpgroup,
    num_tiles,
    *,
    q_smem,
    k_smem,
    v_smem,
    q_full,
    k_full,
    v_full,
    k_empty,
    v_empty,
  ):
    """Results, highest scores and sums of exponentials of 64 queries."""
    q_smem = q_smem.at[warpgroup]
    plgpu.barrier_wait(q_full.at[warpgroup])

    def add(step, carry):
      out, top, total = carry
      tile, kind = met(step)
      slot = lax.rem(step, jnp.int32(self.stages))
      plgpu.barrier_wait(k_full.at[slot])
      keys = plgpu.transpose_ref(k_smem.at[slot], (1, 0))
      scores = _product(_SHAPE, q_smem, keys)
      plgpu.barrier_arrive(k_empty.at[slot])
      scores = lax.cond(
        kind == FULL, lambda: scores, lambda: mask(tile, scores)
      )
      new = jnp.maximum(top, jnp.max(scores, axis=1) * self.scale)
      # Before the first key that is read there is nothing to subtract.
      offset = jnp.where(new == -jnp.inf, 0.0, new)
      weights = jnp.exp2(scores * self.scale - _over(offset, _SHAPE))
      shrink = jnp.exp2(top - offset)
      total = total * shrink + jnp.sum(weights, axis=1)
      weights = weights.astype(jnp.bfloat16)
      plgpu.barrier_wait(v_full.at[slot])
      mixed = _product(out.shape, weights, v_smem.at[slot])
      plgpu.barrier_arrive(v_empty.at[slot])
      return out * _over(shrink, out.shape) + mixed, new, total

    start = (
      _full((_ROWS, self.value_dim), 0.0, plgpu.Layout.WGMMA),
      _full((_ROWS,), -jnp.inf, ROW),
      _full((_ROWS,), 0.0, ROW),
    )
    out, top, total = lax.fori_loop(0, num_tiles, add, start)
    some = jnp.where(total > 0, total, 1.0)
    return out * _over(1 / some, out.shape), top, total


class _Loaded:
  """`Tokens` of a tile of pairs, each field loaded when a rule asks for it."""

  def __init__(self, fields, example, place, layout, axis):
    self._fields = fields  # [7, B, places, size]
    self._place = (example if fields.shape[1] > 1 else 0, place)
    self._layout = layout
    self._axis = axis

  def __getattr__(self, name):  # asked only for what is not there yet
    if name not in Tokens._fields:
      raise AttributeError(f"tokens have {Tokens._fields}, not {name!r}")
    place = (Tokens._fields.index(name), *self._place)
    field = load_vector(self._fields, place, self._layout)
    found = lax.broadcast_in_dim(field, _SHAPE, [self._axis])
    setattr(self, name, found)
    return found


def _product(shape, left, right):
  """float32 product of two matrices, the second one in shared memory."""

  def multiply(accumulator):
    plgpu.wgmma(accumulator, left, right)
    return accumulator[...]

  return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def _over(rows, shape):
  """One value per row, for each of its columns."""
  return lax.broadcast_in_dim(rows, shape, [0])


def _full(shape, value, layout):
  return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _fields(given, size):
  """Fields [N] or [B, N] -> int32[7, B or 1, blocks, size]; the last fills."""
  batch = max(x.shape[0] if x.ndim == 2 else 1 for x in given)
  fields = jnp.stack([jnp.broadcast_to(x, (batch, x.shape[-1])) for x in given])
  missing = -fields.shape[2] % _BLOCK
  fields = jnp.pad(fields, ((0, 0), (0, 0), (0, missing)), mode="edge")
  return fields.reshape(*fields.shape[:2], -1, size)

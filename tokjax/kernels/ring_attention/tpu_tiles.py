"""Attention of a device's queries over keys it holds, in tiles, on TPU.

Pipelines inside of a kernel: arrays stay in HBM, tiles of [tile, d] queries and
keys come into VMEM while those before are multiplied, and no more than a tile
of scores exists at a time.

What queries have read so far lies in HBM as (out, lse): the state of an online
softmax of maximum lse, sum 1 and total out, from which the next keys go on.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

__all__ = ["Tiles"]

_LANES = 128
# Score of a hidden key. Finite: exp(hidden - hidden) must not be NaN.
_HIDDEN = -1e30


@dataclasses.dataclass(frozen=True)
class Tiles:
  """Sizes of what a device holds; every one is static.

  The axes of a pipeline are example b, head h, query tile i and key tile j.
  Queries that share a key head fetch its tiles each for themselves.
  """

  batch: int
  heads: int  # of queries
  key_heads: int  # a divisor
  num_rows: int  # of queries, and of keys
  dim: int  # of a query and a key
  value_dim: int
  tile: int  # rows of a tile, a divisor of `num_rows`

  @property
  def num_tiles(self) -> int:
    return self.num_rows // self.tile

  @property
  def scratch_shapes(self):
    """Highest score of each query of a tile, and its sum of exponentials.

    float32, lanes alike: 0.5 MiB each for 1,024 rows.
    """
    return [pltpu.VMEM((self.tile, _LANES), jnp.float32)] * 2

  def read_own(self, q, keys, state, scratch, *, causal):
    """Every query reads the keys of its device; the state begins.

    Args:
      q: [B, H, n, d].
      keys: [B, K, n, d], and the values [B, K, n, e].
      state: float32[B, H, n, e] results and [B, H, 1, n] lse, written.
      scratch: of `scratch_shapes`.
      causal: whether row i reads only rows up to i.
    """

    def last(i):
      return i if causal else self.num_tiles - 1

    def body(q_ref, k_ref, v_ref, out_ref, lse_ref):
      i, j = pl.program_id(2), pl.program_id(3)
      top_ref, total_ref = scratch
      refs = (q_ref, k_ref, v_ref, out_ref, top_ref, total_ref)

      @pl.when(j == 0)
      def _():
        top_ref[...] = jnp.full(top_ref.shape, _HIDDEN, jnp.float32)
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
        out_ref[...] = jnp.zeros(out_ref.shape, jnp.float32)

      @pl.when(j < last(i))
      def _():
        _add(*refs)

      @pl.when(j == last(i))
      def _():
        _add(*refs, triangle=causal)
        _finish(out_ref, lse_ref, top_ref, total_ref)

    pltpu.emit_pipeline(
      body,
      grid=(self.batch, self.heads, self.num_tiles, self.num_tiles),
      in_specs=[
        self._rows(self.dim, 0),
        # A hidden tile is not fetched.
        *self._keys(lambda i, j: jnp.minimum(j, last(i))),
      ],
      out_specs=self._state(0),
    )(q, *keys, *state)

  def read(
    self, q, keys, state, scratch, *, first, num_queries, num_keys, key_tile
  ):
    """Some queries read some keys of another device, and go on from a state.

    Args:
      q: [B, H, n, d].
      keys: [B, K, n, d], and the values [B, K, n, e].
      state: as `read_own` left it, or this; read and written.
      scratch: of `scratch_shapes`.
      first: of the tiles of queries.
      num_queries: how many tiles of queries, which may be none.
      num_keys: how many tiles of keys, at least one.
      key_tile: from 0 .. num_keys - 1 to the place of the tile.
    """

    def body(q_ref, k_ref, v_ref, out_before, lse_before, out_ref, lse_ref):
      j = pl.program_id(3)
      top_ref, total_ref = scratch

      @pl.when(j == 0)
      def _():
        lse = jnp.broadcast_to(lse_before[...], (_LANES, self.tile))
        top_ref[...] = lse.T
        total_ref[...] = jnp.ones(total_ref.shape, jnp.float32)
        out_ref[...] = out_before[...]

      _add(q_ref, k_ref, v_ref, out_ref, top_ref, total_ref)

      @pl.when(j == num_keys - 1)
      def _():
        _finish(out_ref, lse_ref, top_ref, total_ref)

    pipeline = pltpu.emit_pipeline(
      body,
      grid=(self.batch, self.heads, num_queries, num_keys),
      in_specs=[
        self._rows(self.dim, first),
        *self._keys(lambda i, j: key_tile(j)),
        *self._state(first),
      ],
      out_specs=self._state(first),
    )

    @pl.when(num_queries > 0)
    def _():
      # A tile of the state is fetched once, before it is written once.
      pipeline(q, *keys, *state, *state)

  # With 1,024 rows and widths of 128 in bfloat16 tiles of queries have 0.25,
  # of keys and values 0.5, of the state 0.5 MiB, each twice, and the state as
  # input and as output.

  def _rows(self, dim, first):
    return pl.BlockSpec(
      (None, None, self.tile, dim), lambda b, h, i, j: (b, h, first + i, 0)
    )

  def _keys(self, place):
    group = self.heads // self.key_heads
    return [
      pl.BlockSpec(
        (None, None, self.tile, dim),
        lambda b, h, i, j: (b, jax.lax.div(h, group), place(i, j), 0),
      )
      for dim in (self.dim, self.value_dim)
    ]

  def _state(self, first):
    lse = pl.BlockSpec(
      (None, None, 1, self.tile), lambda b, h, i, j: (b, h, 0, first + i)
    )
    return [self._rows(self.value_dim, first), lse]


def _add(
  q_ref,  # [tile, d]
  k_ref,  # [tile, d]
  v_ref,  # [tile, e]
  out_ref,  # f32[tile, e]
  top_ref,  # f32[tile, 128]
  total_ref,  # f32[tile, 128]
  *,
  triangle: bool = False,  # whether row i reads only keys up to i
):
  """One step of the online softmax.

  Scores and exponentials are tile x tile, 4 MiB each for 1,024 rows.
  """
  # By default the matrix unit rounds float32 operands to bfloat16.
  precision = "highest" if q_ref.dtype == jnp.float32 else None
  scores = q_ref.shape[1] ** -0.5 * jax.lax.dot_general(
    q_ref[...],
    k_ref[...],
    (((1,), (1,)), ((), ())),
    precision=precision,
    preferred_element_type=jnp.float32,
  )
  if triangle:
    row, column = (
      jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis) for axis in (0, 1)
    )
    scores = jnp.where(row >= column, scores, _HIDDEN)
  old = top_ref[:, :1]
  top = jnp.maximum(old, jnp.max(scores, axis=1, keepdims=True))
  weights = jnp.exp(scores - top)
  kept = jnp.exp(old - top)
  total = kept * total_ref[:, :1] + jnp.sum(weights, axis=1, keepdims=True)
  out_ref[...] = kept * out_ref[...] + jax.lax.dot_general(
    weights.astype(v_ref.dtype),
    v_ref[...],
    (((1,), (0,)), ((), ())),
    precision=precision,
    preferred_element_type=jnp.float32,
  )
  top_ref[...] = jnp.broadcast_to(top, top_ref.shape)
  total_ref[...] = jnp.broadcast_to(total, total_ref.shape)


def _finish(out_ref, lse_ref, top_ref, total_ref):
  """The state of a tile of queries as it lies in HBM."""
  out_ref[...] = out_ref[...] / total_ref[:, :1]
  lse = top_ref[...] + jnp.log(total_ref[...])
  lse_ref[...] = lse.T[:1]

"""Ring attention on TPU: the kernel sends keys on while it reads them.

All P - 1 steps are one kernel. A device writes its keys and values straight
into memory of its neighbour (a remote copy), and while they are on their way
computes the attention over those it holds (`tpu_tiles`). Two slots take turns:
from one a step reads and sends on, into the other comes what is read next.

    start                        step s, of 1 .. P - 1
    both neighbours are here     what comes in slot s % 2 has arrived
    send own keys, to slot 1     send it on, to slot (s + 1) % 2
    read own keys                read it
    they have left               it has left
                                 tell the sender that slot s % 2 is free

Nobody writes into a slot that is still read: from step 2 on a device sends only
after its neighbour has told that the slot is free, and is told so as often as
it will send, so that all semaphores end at zero. Each slot has a semaphore of
its own for what arrives, as a fast neighbour may fill both. A device that a
causal mask leaves nothing to read sends on all the same.

Bound: FLOPs. With tiles of 1,024 rows, 8,192 rows of width 128 on a device and
bfloat16, a step of a causal zigzag does 620 FLOPs or more for a byte of HBM.
Transfers hide behind it from n = 2 K F / (H W) rows on a device on, for F FLOPs
and W bytes of one direction of a link in a second; "both" needs half as many.
The kernel has been compiled for TPU v5e, v6e and v7x and run in interpret mode;
nothing has been measured on a chip. On v4 and v5p it would use one core of two.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tokjax import checks, compat
from tokjax.kernels.ring_attention import tpu_tiles
from tokjax.ops import attention
from tokjax.typing import Array, Float

__all__ = ["ring_attention_forward", "unsupported"]

_LANES = 128
_MAX_DIM = 256
_TILES = (1024, 512, 256, 128)  # rows, the largest that divides is taken
# For v5e, tiles of 1,024 rows take 9 MiB for widths of 128 and bfloat16,
# 15 for float32, and 28 for float32 of width 256.
_VMEM_LIMIT_BYTES = 32 << 20
_HOPS = {"kv": (1,), "both": (1, -1)}  # the way of each part of the keys


def unsupported(
  q, k, v, segment_ids=None, *, causal, layout, rotate="kv"
) -> str | None:
  """Why this kernel cannot take the arguments, or None when it can.

  Args:
    q: [B, H, n, d], an array or a ShapeDtypeStruct.
    k: [B, K, n, d], likewise.
    v: [B, K, n, e], likewise.
    segment_ids: of any kind; it takes none.
    causal: as of `ring_attention_forward`.
    layout: likewise.
    rotate: likewise.

  Returns:
    The reason, from shapes and dtypes alone.

  Example:
    >>> x = jax.ShapeDtypeStruct((1, 2, 384, 64), "bfloat16")
    >>> unsupported(x, x, x, causal=False, layout="contiguous") is None
    True
    >>> unsupported(x, x, x, causal=True, layout="zigzag")
    '384 rows are not a multiple of 128 for each of 2 parts'
  """
  if segment_ids is not None:
    return "segment_ids are not compared"
  dtypes = sorted({str(x.dtype) for x in (q, k, v)})
  if dtypes not in (["float32"], ["bfloat16"]):
    return f"dtypes {dtypes} are not all float32 or all bfloat16"
  if 0 in (*q.shape, *k.shape, *v.shape):
    return f"an axis is empty: {q.shape}, {k.shape}, {v.shape}"
  for dim in (q.shape[3], v.shape[3]):
    if dim > _MAX_DIM:
      return f"width {dim} is above {_MAX_DIM}"
  num_parts = _num_chunks(causal, layout) * len(_HOPS[rotate])
  if q.shape[2] % (_LANES * num_parts):
    return (
      f"{q.shape[2]} rows are not a multiple of {_LANES} for each of"
      f" {num_parts} parts"
    )
  return None


def ring_attention_forward(
  q: Float[Array, "B H n d"],
  k: Float[Array, "B K n d"],
  v: Float[Array, "B K n e"],
  *,
  axis_name: str,
  causal: bool,
  layout: Literal["zigzag", "contiguous"],
  rotate: Literal["kv", "both"] = "kv",
  tile: int | None = None,
  collective_id: int = 0,
  interpret: bool | pltpu.InterpretParams = False,
) -> attention.AttentionState:
  """What the rows of this device read on all devices of the ring.

  For `jax.shard_map`, manual over all axes of its mesh.

  Args:
    q: queries of this device's rows, float32 or bfloat16.
    k: keys of the same rows; K divides H.
    v: values of the same rows.
    axis_name: mesh axis over which rows are cut; of any size P.
    causal: whether a query reads only keys up to its own position.
    layout: "zigzag" or "contiguous", which rows are here, see
      `tokjax.parallel.ring_attention`.
    rotate: "kv" or "both", which ways keys and values go, see there.
    tile: queries, and keys, of a tile; None for the largest of 128 to 1,024
      that divides the rows of each part.
    collective_id: of the barrier; kernels of a program that meet other devices
      than this one's neighbours need another number.
    interpret: how to simulate the devices, for tests on CPU.

  Returns:
    float32 results and log-sum-exp of the own rows over all keys.

  Cost: with S = P n, 4 B H n S d FLOPs, half of them if causal, and P - 1 times
    B K n (d + e) numbers sent. HBM holds two slots of that size.
  """
  size = jax.lax.axis_size(axis_name)
  num_chunks = _num_chunks(causal, layout)
  hops = _HOPS[rotate]
  part_rows = q.shape[2] // (num_chunks * len(hops))
  tile = tile or next(rows for rows in _TILES if part_rows % rows == 0)
  checks.divisible(tile, rows_of_a_part=part_rows)
  tiles = tpu_tiles.Tiles(
    batch=q.shape[0],
    heads=q.shape[1],
    key_heads=k.shape[1],
    num_rows=q.shape[2],
    dim=q.shape[3],
    value_dim=v.shape[3],
    tile=tile,
  )
  ring = _Ring(size, hops, causal, num_chunks, tiles)
  places, q, k, v = compat.varying_together(_places(axis_name), q, k, v)
  in_place = pl.BlockSpec(memory_space=pl.ANY)  # where XLA puts it: HBM
  out, lse, *_ = pl.pallas_call(
    functools.partial(_kernel, ring=ring),
    out_shape=[
      compat.result_like(shape, dtype, q)
      for shape, dtype in (
        ((*q.shape[:3], v.shape[3]), jnp.float32),
        ((*q.shape[:2], 1, q.shape[2]), jnp.float32),
        # The slots. As results they have memory in HBM.
        ((2, *k.shape), k.dtype),
        ((2, *v.shape), v.dtype),
      )
    ],
    in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), *[in_place] * 3],
    out_specs=[in_place] * 4,
    scratch_shapes=[
      tiles.scratch_shapes,
      pltpu.SemaphoreType.DMA((len(hops),)),
      pltpu.SemaphoreType.DMA((len(hops), 2)),
      pltpu.SemaphoreType.REGULAR((len(hops),)),
    ],
    compiler_params=pltpu.CompilerParams(
      collective_id=collective_id if size > 1 else None,
      vmem_limit_bytes=_VMEM_LIMIT_BYTES,
    ),
    cost_estimate=ring.cost(q, k, v),
    interpret=interpret,
    name="ring_attention",
  )(places, q, k, v)
  return attention.AttentionState(out, lse[:, :, 0])


def _places(axis_name):
  """int32[3]: place in the ring, and among all devices those before and after.

  Not in the kernel, where indices of several mesh axes do not mix.
  """
  rank, size = jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name)

  def device(place):
    number = 0
    for name, length in jax.sharding.get_abstract_mesh().shape.items():
      index = place if name == axis_name else jax.lax.axis_index(name)
      number = number * length + index
    return number

  near = [device(jax.lax.rem(rank + hop + size, size)) for hop in (-1, 1)]
  return jnp.stack([rank, *near])


def _num_chunks(causal, layout):
  """Equal stretches of the sequence on a device, as far as it matters."""
  return 2 if causal and layout == "zigzag" else 1


@dataclasses.dataclass(frozen=True)
class _Ring:
  """What goes where, and which tiles meet; every setting is static."""

  size: int  # P
  hops: tuple[int, ...]  # the way of each part of the keys
  causal: bool
  num_chunks: int
  tiles: tpu_tiles.Tiles

  def parts(self, way):
    """The rows that go a way: all, or a stretch of each chunk."""
    ways = len(self.hops)
    chunks = self.num_chunks if ways > 1 else 1
    rows = self.tiles.num_rows // (chunks * ways)
    for chunk in range(chunks):
      yield pl.ds((chunk * ways + way) * rows, rows)

  def meeting(self, rank, way, step):
    """Tiles of queries, and of keys that go a way, which meet in a step."""
    ways, full = len(self.hops), self.tiles.num_tiles
    per_part = full // (self.num_chunks * ways)

    def place(j):  # of tile j of those that go this way
      chunk = jax.lax.div(j, per_part)
      return j + (chunk * (ways - 1) + way) * per_part

    first, num_queries, num_keys = 0, full, full // ways
    if self.causal:
      home = jax.lax.rem(rank - self.hops[way] * step + self.size, self.size)
      later = rank > home
      if self.num_chunks == 1:
        num_queries = jnp.where(later, full, 0)
      else:  # all queries read the early keys, or the late queries all keys
        first = jnp.where(later, 0, full // 2)
        num_queries = full - first
        num_keys = jnp.where(later, num_keys // 2, num_keys)
    return dict(
      first=first,
      num_queries=num_queries,
      num_keys=num_keys,
      key_tile=place,
    )

  def cost(self, q, k, v):
    """What this device reads in all steps, and sends."""
    tiles = self.tiles
    rows = tiles.batch * tiles.heads * tiles.num_rows
    pairs = rows * tiles.num_rows * self.size // (2 if self.causal else 1)
    keys = (k.nbytes + v.nbytes) * tiles.heads // tiles.key_heads
    state = 2 * 4 * rows * (tiles.value_dim + 1)
    return pl.CostEstimate(
      flops=2 * pairs * (tiles.dim + tiles.value_dim),
      transcendentals=pairs,
      bytes_accessed=self.size * (q.nbytes + keys * tiles.num_tiles + state),
      remote_bytes_transferred=(self.size - 1) * (k.nbytes + v.nbytes),
    )


def _kernel(
  places_ref,  # int32[3] of `_places`, in scalar memory
  q,  # [B, H, n, d]; this and the next are in HBM
  k,  # [B, K, n, d]
  v,  # [B, K, n, e]
  out,  # f32[B, H, n, e], complete after the last step
  lse,  # f32[B, H, 1, n], likewise
  k_slots,  # [2, B, K, n, d]: of step s in s % 2
  v_slots,  # [2, B, K, n, e]
  scratch,  # of the tiles
  sent,  # a semaphore for each way
  arrived,  # for each way and slot
  free,  # for each way: the neighbour there has a free slot
  *,
  ring: _Ring,
):
  ways = range(len(ring.hops))
  own = k, v
  rank = places_ref[0]

  def neighbour(hop):
    return dict(
      device_id=places_ref[1 if hop < 0 else 2],
      device_id_type=pl.DeviceIdType.LOGICAL,
    )

  def copies(keys, way, step):
    """The keys of a step, on their way to the next slot of the neighbour."""
    slot = jax.lax.rem(step + 1, 2)
    for source, slots in zip(keys, (k_slots, v_slots), strict=True):
      for rows in ring.parts(way):
        yield pltpu.make_async_remote_copy(
          source.at[:, :, rows],
          slots.at[slot, :, :, rows],
          sent.at[way],
          arrived.at[way, slot],
          **neighbour(ring.hops[way]),
        )

  def send(keys, way, step):
    for copy in copies(keys, way, step):
      copy.start()

  def wait_until_sent(keys, way, step):
    for copy in copies(keys, way, step):
      copy.wait_send()

  def wait_until_arrived(way, step):
    # As large as what was sent from here in the step before.
    for copy in copies(own, way, step - 1):
      copy.wait_recv()

  def later_step(step, carry):
    slot = jax.lax.rem(step, 2)
    keys = k_slots.at[slot], v_slots.at[slot]
    for way in ways:
      wait_until_arrived(way, step)

      @pl.when((step > 1) & (step < ring.size - 1))
      def _(way=way):
        pl.semaphore_wait(free.at[way], 1)

      @pl.when(step < ring.size - 1)
      def _(way=way):
        send(keys, way, step)

    for way in ways:
      meeting = ring.meeting(rank, way, step)
      ring.tiles.read(q, keys, (out, lse), scratch, **meeting)
    for way in ways:

      @pl.when(step < ring.size - 1)
      def _(way=way):
        wait_until_sent(keys, way, step)

      @pl.when(step < ring.size - 2)
      def _(way=way):
        pl.semaphore_signal(free.at[way], 1, **neighbour(-ring.hops[way]))

    return carry

  if ring.size > 1:
    # Until both neighbours are in this kernel, they must not be written to.
    here = pltpu.get_barrier_semaphore()
    for hop in (1, -1):
      pl.semaphore_signal(here, 1, **neighbour(hop))
    pl.semaphore_wait(here, 2)
    for way in ways:
      send(own, way, 0)
  ring.tiles.read_own(q, own, (out, lse), scratch, causal=ring.causal)
  if ring.size > 1:
    for way in ways:
      wait_until_sent(own, way, 0)
    jax.lax.fori_loop(1, ring.size, later_step, 0)

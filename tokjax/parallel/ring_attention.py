"""Exact attention over a sequence cut among devices: keys travel in a ring.

    attend = jax.shard_map(
      functools.partial(ring_attention, axis_name="seq", causal=True),
      mesh=mesh, in_specs=(spec,) * 3, out_specs=spec,  # P(None, None, "seq")
    )
    out = attend(queries, keys, values)  # in zigzag order, see `zigzag_order`

No device ever holds the keys of all, nor logits of more than a chunk of
queries. `tokjax.parallel.token_ring` lets the queries travel instead, and
`tokjax.parallel.ring_costs` says which of them sends less.
"""

import functools
import importlib
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.ops import attention
from tokjax.parallel import attention_blocks as blocks
from tokjax.parallel import attention_meetings as meetings
from tokjax.typing import Array, Float, Int

__all__ = ["ring_attention"]

# Rings of at most so many devices are written out step by step, so that XLA
# sees which transfer may run beside which block; larger ones are a loop.
_LONGEST_UNROLLED = 16


def ring_attention(
  queries: Float[Array, "B H n d"],
  keys: Float[Array, "B K n d"],
  values: Float[Array, "B K n e"],
  *,
  axis_name: str,
  causal: bool,
  layout: Literal["zigzag", "contiguous"] = "zigzag",
  rotate: Literal["kv", "both"] = "kv",
  segment_ids: Int[Array, "B n"] | None = None,
  query_chunk: int = 512,
  implementation: Literal["xla", "pallas_tpu"] | None = None,
) -> Float[Array, "B H n e"]:
  """Attention over the rows of all devices; for `jax.shard_map`.

  In P - 1 steps the keys and values of every device visit all others. Each
  device merges what its queries read by log-sum-exp in float32. The backward
  pass sends the keys round once more and makes the weights again; the gradients
  of keys and values travel with them, in float32, and end at home.

  A causal ring is as slow as its busiest device at every step. In the zigzag
  order every device computes the same; in the contiguous one the device of
  the last rows always has a full block to do and the others wait, so that
  nearly half of the time is lost. Prefer zigzag.

  With grouped queries, H >= 2 K, keys are what should travel. With unshared
  keys, H = K, they still should, both ways; one way only where links have but
  one direction to spare. `tokjax.parallel.token_ring` says when queries should,
  `tokjax.parallel.ring_costs` when no ring.

  Args:
    queries: this device's rows, of H heads.
    keys: of the same rows; K divides H, and H / K queries in a row share a key.
    values: of the same rows.
    axis_name: mesh axis over which rows are cut; of any size P.
    causal: whether a query reads only keys up to its own position.
    layout: which rows are here: two chunks of the order of
      `tokjax.parallel.zigzag.zigzag_order`, or a stretch of the sequence.
      Without `causal` any order will do.
    rotate: "kv", keys and values go to the next device; "both", half of each
      chunk of them goes the other way, which keeps both directions of a link
      busy and halves the time of a step that waits for them.
    segment_ids: the sequence that a row belongs to, where several are packed:
      queries read keys of their own. Rows below 0 are padding: they are not
      read, whatever they hold, and give zeros. Pad to a length that divides.
    query_chunk: queries of a block whose logits are in memory together, a
      choice of ours.
    implementation: of the forward pass. "xla" leaves it to the compiler which
      transfers run beside which block. "pallas_tpu" is one kernel that sends
      keys on while it reads them, see
      `tokjax.kernels.ring_attention.pallas_tpu`; it takes no segments and
      ignores `query_chunk`, which the backward pass, the same for both, heeds.
      None is "xla", everywhere: the kernel was never run on a chip.

  Returns:
    In the dtype of `values`. Gradients flow to queries, keys and values.

  Raises:
    ValueError: if sizes disagree, K does not divide H, or the chunks do not
      divide the rows: 2 for zigzag under `causal`, twice as many for "both".
    NotImplementedError: if the kernel was asked for and cannot take these.

  Example:
    >>> one = jax.sharding.AxisType.Auto,
    >>> mesh = jax.make_mesh((1,), ("seq",), one, devices=jax.devices()[:1])
    >>> attend = functools.partial(ring_attention, axis_name="seq", causal=True)
    >>> spec = jax.P(None, None, "seq")
    >>> x = jnp.array([[[[1.0], [3.0]]]])
    >>> jax.jit(jax.shard_map(
    ...   attend, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec
    ... ))(0 * x, x, x).tolist()
    [[[[1.0], [2.0]]]]

  Cost: with n = S / P, 4 B H n S d FLOPs a device, half of them if causal, and
    2.5 times as many backward. A step sends B K n (d + e) numbers on one link
    direction ("kv") or half of them on each ("both"); backward as many again
    and as many float32. Kept for the backward pass: queries, keys, values,
    result and lse of the own rows. Logits take 4 B H query_chunk n bytes.

  Source: Liu, Zaharia, Abbeel (2023), "Ring Attention with Blockwise
    Transformers"; the zigzag order and its halved blocks from
    zhuzilin/ring-flash-attention. Keys that travel both ways at once, ours.
  """
  checks.one_of(("zigzag", "contiguous"), layout=layout)
  checks.one_of(("kv", "both"), rotate=rotate)
  checks.one_of((None, "xla", "pallas_tpu"), implementation=implementation)
  checks.in_range(1, float("inf"), query_chunk=query_chunk)
  pattern = meetings.Pattern(causal, layout, query_chunk)
  num_parts = (2 if rotate == "both" else 1) * pattern.num_chunks
  checks.divisible(num_parts, rows_of_queries=queries.shape[2])
  asking, read = blocks.prepare(
    queries, keys, values, segment_ids, axis_name=axis_name
  )
  hops = (1, -1) if rotate == "both" else (1,)
  ring = _Ring(axis_name, hops, pattern, implementation == "pallas_tpu")
  if ring.in_kernel:
    reason = _kernel_module().unsupported(
      asking.rows, *read, causal=causal, layout=layout, rotate=rotate
    )
    if reason is not None:
      raise NotImplementedError(f"{implementation}: {reason}")
  out = _attend(ring, asking, read)
  return blocks.blank_padding(out, asking.segments)


class _Ring(NamedTuple):
  """Settings of a ring.

  Attributes:
    axis_name: of the devices.
    hops: the way of each part of the keys; 1 is to the next device.
    pattern: which keys are read.
    in_kernel: whether the forward pass is one kernel.
  """

  axis_name: str
  hops: tuple[int, ...]
  pattern: meetings.Pattern
  in_kernel: bool

  def send(self, parts):
    """Each part to the next device on its way."""
    size = jax.lax.axis_size(self.axis_name)
    return tuple(
      jax.lax.ppermute(
        part, self.axis_name, [(i, (i + hop) % size) for i in range(size)]
      )
      for hop, part in zip(self.hops, parts, strict=True)
    )

  def visits(self, parts, step):
    """The parts that are here after a step, with whether we come later."""
    rank = jax.lax.axis_index(self.axis_name)
    size = jax.lax.axis_size(self.axis_name)
    for hop, part in zip(self.hops, parts, strict=True):
      yield part, rank > (rank - hop * step) % size

  def cut(self, tree):
    """One part of the rows for each way, with rows of every chunk in each."""
    ways, chunks = len(self.hops), self.pattern.num_chunks

    def part(x, way):
      split = x.reshape(*x.shape[:2], chunks, ways, -1, *x.shape[3:])
      return split[:, :, :, way].reshape(*x.shape[:2], -1, *x.shape[3:])

    return tuple(
      jax.tree.map(lambda x, way=way: part(x, way), tree) for way in range(ways)
    )

  def glue(self, parts):
    """The inverse of `cut`."""
    chunks = self.pattern.num_chunks

    def whole(*xs):
      split = [x.reshape(*x.shape[:2], chunks, 1, -1, *x.shape[3:]) for x in xs]
      x = jnp.concatenate(split, axis=3)
      return x.reshape(*x.shape[:2], -1, *x.shape[5:])

    return jax.tree.map(whole, *parts)

  def steps(self, visit, state, parts):
    """`visit(state, parts, step)` for each of P - 1 steps.

    The parts of a step need only those of the step before, so that they are
    on their way while that one is computed.
    """
    size = jax.lax.axis_size(self.axis_name)
    if size == 1:
      return state

    def one(carry, step):
      state, parts = carry
      coming = self.send(parts)
      return (visit(state, parts, step), coming), None

    (state, parts), _ = jax.lax.scan(
      one,
      (state, self.send(parts)),
      jnp.arange(1, size - 1),
      unroll=size <= _LONGEST_UNROLLED,
    )
    return visit(state, parts, size - 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring, queries, keys):
  return _forward(ring, queries, keys)[0]


def _forward(ring, queries, keys):
  read = _read_in_kernel if ring.in_kernel else _read_in_steps
  state = read(ring, queries, keys)
  out = state.out.astype(keys.values.dtype)
  return out, (queries, keys, out, state.lse)


def _read_in_kernel(ring, queries, keys):
  return _kernel_module().ring_attention_forward(
    queries.rows,
    keys.keys,
    keys.values,
    axis_name=ring.axis_name,
    causal=ring.pattern.causal,
    layout=ring.pattern.layout,
    rotate="both" if len(ring.hops) > 1 else "kv",
  )


def _kernel_module():
  """Imported here: only its users import Pallas."""
  return importlib.import_module("tokjax.kernels.ring_attention.pallas_tpu")


def _read_in_steps(ring, queries, keys):
  def visit(state, parts, step):
    for part, later in ring.visits(parts, step):
      more = meetings.read(queries, part, later, ring.pattern)
      state = attention.merge(state, more)
    return state

  state = meetings.read_own(queries, keys, ring.pattern)
  return ring.steps(visit, state, ring.cut(keys))


def _backward(ring, kept, d_out):
  queries, keys, out, lse, d_out = blocks.made_again(*kept, d_out)
  asked = blocks.asked(queries, out, lse, d_out)

  def visit(state, parts, step):
    d_rows, totals = state
    gains = []
    for part, later in ring.visits(parts, step):
      more, gain = meetings.pull(asked, part, later, ring.pattern)
      d_rows = d_rows + more
      gains.append(gain)
    # The totals follow their keys, while the gains are computed.
    return d_rows, jax.tree.map(jnp.add, ring.send(totals), tuple(gains))

  d_rows, d_keys = meetings.pull_own(asked, keys, ring.pattern)
  state = d_rows, ring.cut(d_keys)
  d_rows, totals = ring.steps(visit, state, ring.cut(keys))
  if jax.lax.axis_size(ring.axis_name) > 1:
    totals = ring.send(totals)  # the last hop, home
  return blocks.cotangents(queries, keys, d_rows, ring.glue(totals))


_attend.defvjp(_forward, _backward)

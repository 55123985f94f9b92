"""TokenRing: exact attention where queries travel and results come home.

    attend = jax.shard_map(
      functools.partial(token_ring, axis_name="seq", causal=True),
      mesh=mesh, in_specs=(spec,) * 3, out_specs=spec,  # P(None, None, "seq")
    )
    out = attend(queries, keys, values)  # in zigzag order, see `zigzag_order`

Keys and values stay where they are. Queries go from device to device one way;
what they read at each, and its log-sum-exp, goes straight home the other way.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from tokjax import checks
from tokjax.ops import attention
from tokjax.parallel import attention_blocks as blocks
from tokjax.parallel import attention_meetings as meetings
from tokjax.typing import Array, Float, Int

__all__ = ["token_ring"]


def token_ring(
  queries: Float[Array, "B H n d"],
  keys: Float[Array, "B K n d"],
  values: Float[Array, "B K n e"],
  *,
  axis_name: str,
  causal: bool,
  segment_ids: Int[Array, "B n"] | None = None,
  query_chunk: int = 512,
  returns: DTypeLike | None = None,
) -> Float[Array, "B H n e"]:
  """Attention over the rows of all devices; for `jax.shard_map`.

  In each of P - 1 steps all queries move to the device before, read its keys,
  and the result is sent to the device they came from, step s over a distance
  of s, where float32 merging adds it. Under `causal` each meeting is exactly
  two blocks of chunk x chunk without a mask, on every device.

  Backward, queries travel again with the cotangent, log-sum-exp and delta of
  their result; gradients of keys and values stay, and a share of the gradient
  of the queries goes home at each step.

  When it is worth it, by bytes on the busier direction of a link, where every
  two devices have a link of their own (`tokjax.parallel.ring_costs` counts
  them, on other topologies too):

  - against `ring_attention` with rotate="kv": forward if H < 2 K, for unshared
    keys at about half of the time of a step; with grouped ones it is slower;
  - against rotate="both": forward at H = K a tie but for the last results,
    which nothing hides; with grouped keys slower;
  - backward it compares better, as the ring's gradients of keys are float32:
    with bfloat16 if H < 3 K, and 2 H < 3 K.

  On a switch, where all that a device sends leaves by one port, H = K is a tie
  with any ring, forward. On a ring or torus of links a result from a distance
  of s takes min(s, P - s) of them, and for P of 8 or so that alone is more
  than a ring of keys sends.

  Args:
    queries: this device's rows, of H heads, in the order of
      `tokjax.parallel.zigzag.zigzag_order` under `causal`, otherwise in any.
    keys: of the same rows; K divides H, and H / K queries in a row share a key.
    values: of the same rows.
    axis_name: mesh axis over which rows are cut; of any size P. Steps are
      written out, as each sends over another distance: programs grow with P.
    causal: whether a query reads only keys up to its own position.
    segment_ids: the sequence that a row belongs to, where several are packed:
      queries read keys of their own. Rows below 0 are padding: they are not
      read, whatever they hold, and give zeros. Pad to a length that divides.
    query_chunk: queries of a block whose logits are in memory together, a
      choice of ours.
    returns: dtype of what goes home, results and gradients; None for that of
      `values`, as published. Sums and log-sum-exp are float32 always.

  Returns:
    In the dtype of `values`. Gradients flow to queries, keys and values.

  Raises:
    ValueError: if sizes disagree, K does not divide H, or the rows are odd
      under `causal`.

  Example:
    >>> one = jax.sharding.AxisType.Auto,
    >>> mesh = jax.make_mesh((1,), ("seq",), one, devices=jax.devices()[:1])
    >>> attend = functools.partial(token_ring, axis_name="seq", causal=True)
    >>> spec = jax.P(None, None, "seq")
    >>> x = jnp.array([[[[1.0], [3.0]]]])
    >>> jax.jit(jax.shard_map(
    ...   attend, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec
    ... ))(0 * x, x, x).tolist()
    [[[[1.0], [2.0]]]]

  Cost: with n = S / P, 4 B H n S d FLOPs a device, half of them if causal, and
    2.5 times as many backward. A step sends B H n d numbers one way and
    B H n e and as many lse home; backward B H n (d + e) and two float32 for
    each of B H n one way, and B H n d home. Logits take 4 B H query_chunk n
    bytes.

  Source: Wang et al. (2024), "TokenRing", and ACA-Lab-SJTU/token-ring, which
    has no backward pass and fails for P = 1: both ours, with segments and
    padding. The reference sends queries whose first half is no longer needed
    too, as here: leaving it out relieves only links that are not the busiest.
  """
  checks.in_range(1, float("inf"), query_chunk=query_chunk)
  pattern = meetings.Pattern(causal, "zigzag", query_chunk)
  checks.divisible(pattern.num_chunks, rows_of_queries=queries.shape[2])
  asking, read = blocks.prepare(
    queries, keys, values, segment_ids, axis_name=axis_name
  )
  returns = jnp.dtype(values.dtype if returns is None else returns)
  out = _attend(_Route(axis_name, returns, pattern), asking, read)
  return blocks.blank_padding(out, asking.segments)


class _Route(NamedTuple):
  """Settings: the devices, what goes home in which dtype, what is read."""

  axis_name: str
  returns: jnp.dtype
  pattern: meetings.Pattern

  def arrivals(self, travellers):
    """For each step its number, what has come, and if from a later device.

    The rows of a step need only those of the step before: they are on their way
    while those are computed.
    """
    rank = jax.lax.axis_index(self.axis_name)
    size = jax.lax.axis_size(self.axis_name)
    for step in range(1, size):
      travellers = self._send(travellers, -1)  # now of device rank + step
      yield step, travellers, rank + step < size

  def home(self, x, step):
    """The result of a step, on the device that asked; float32."""
    return self._send(x, step).astype(jnp.float32)

  def _send(self, tree, distance):
    size = jax.lax.axis_size(self.axis_name)
    to = [(i, (i + distance) % size) for i in range(size)]
    return jax.lax.ppermute(tree, self.axis_name, to)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(route, queries, keys):
  return _forward(route, queries, keys)[0]


def _forward(route, queries, keys):
  state = meetings.read_own(queries, keys, route.pattern)
  for step, visitors, later in route.arrivals(queries):
    part = meetings.read(visitors, keys, later, route.pattern)
    out = route.home(part.out.astype(route.returns), step)
    part = attention.AttentionState(out, route.home(part.lse, step))
    state = attention.merge(state, part)
  out = state.out.astype(keys.values.dtype)
  return out, (queries, keys, out, state.lse)


def _backward(route, kept, d_out):
  queries, keys, out, lse, d_out = blocks.made_again(*kept, d_out)
  asked = blocks.asked(queries, out, lse, d_out)
  d_rows, d_keys = meetings.pull_own(asked, keys, route.pattern)
  for step, visitors, later in route.arrivals(asked):
    share, more = meetings.pull(visitors, keys, later, route.pattern)
    d_rows = d_rows + route.home(share.astype(route.returns), step)
    d_keys = jax.tree.map(jnp.add, d_keys, more)
  return blocks.cotangents(queries, keys, d_rows, d_keys)


_attend.defvjp(_forward, _backward)

"""Queries of one device meet the keys of another, forward and back.

    state = read(queries, keys, rank > home, pattern)
    d_rows, d_keys = pull(asking, keys, rank > home, pattern)

`tokjax.parallel.ring_attention` and `tokjax.parallel.token_ring` differ in what
travels; what a device computes when it arrives is the same, and is here.

In zigzag order (`tokjax.parallel.zigzag`) a device's rows are an early chunk 0
and a late chunk 1. Of two devices, the late queries of either read the early
keys of the other; if the queries' device is the later one, its early queries
read those too, otherwise its late queries read the late keys. So every meeting
is two blocks of chunk x chunk without a mask, whoever meets whom, and the
operands of the second are chosen by `where`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from tokjax.ops import attention
from tokjax.parallel import attention_blocks as blocks
from tokjax.parallel.attention_blocks import (
  Asked,
  KeyGradients,
  Keys,
  Queries,
)
from tokjax.typing import Array, Bool, Float

__all__ = ["Pattern", "pull", "pull_own", "read", "read_own"]


@dataclasses.dataclass(frozen=True)
class Pattern:
  """Which keys a query may read, and how a block is computed."""

  causal: bool  # not those after it
  layout: str  # "zigzag" or "contiguous": which rows a device holds
  query_chunk: int  # queries whose logits are in memory together

  @property
  def num_chunks(self) -> int:
    """Equal stretches of the sequence on a device, as far as it matters."""
    return 2 if self.causal and self.layout == "zigzag" else 1


def read_own(
  queries: Queries, keys: Keys, pattern: Pattern
) -> attention.AttentionState:
  """Queries read the keys of their own device.

  Cost: for a causal zigzag two triangles and one full block of chunk x chunk.
  """
  if not pattern.causal:
    return _read(queries, keys, pattern)
  if pattern.layout == "contiguous":
    return _read(queries, keys, pattern, triangle=True)
  (early, late), (first, second) = _halves(queries), _halves(keys)
  return _join(
    _read(early, first, pattern, triangle=True),
    attention.merge(
      _read(late, first, pattern),
      _read(late, second, pattern, triangle=True),
    ),
  )


def read(
  queries: Queries, keys: Keys, later: Bool[Array, ""], pattern: Pattern
) -> attention.AttentionState:
  """Queries of one device read keys of another.

  Args:
    queries: of a device.
    keys: of another; all of them, or as many of each of its chunks.
    later: whether the queries' device is the later of the two.
    pattern: what is allowed.

  Returns:
    A part of the attention of these queries, to be merged with others.

  Cost: for a causal zigzag two full blocks of chunk x chunk. For a causal
    contiguous layout a full block of all rows, or none.
  """
  if not pattern.causal:
    return _read(queries, keys, pattern)
  if pattern.layout == "contiguous":
    return jax.lax.cond(
      later,
      lambda: _read(queries, keys, pattern),
      lambda: _nothing(queries, keys),
    )
  (early, late), (first, second) = _halves(queries), _halves(keys)
  always = _read(late, first, pattern)
  other = _read(
    _where(later, early, late), _where(later, first, second), pattern
  )
  return _join(
    _where(later, other, _unread(other)),
    _where(later, always, attention.merge(always, other)),
  )


def pull_own(
  asking: Asked, keys: Keys, pattern: Pattern
) -> tuple[Float[Array, "B H n d"], KeyGradients]:
  """The cotangents, float32, of the two arguments of `read_own`."""
  if not pattern.causal:
    return _pull(asking, keys, pattern)
  if pattern.layout == "contiguous":
    return _pull(asking, keys, pattern, triangle=True)
  (early, late), (first, second) = _halves(asking), _halves(keys)
  d_early, d_first = _pull(early, first, pattern, triangle=True)
  d_late, more = _pull(late, first, pattern)
  d_late_too, d_second = _pull(late, second, pattern, triangle=True)
  return (
    _join(d_early, d_late + d_late_too),
    _join(_add(d_first, more), d_second),
  )


def pull(
  asking: Asked, keys: Keys, later: Bool[Array, ""], pattern: Pattern
) -> tuple[Float[Array, "B H n d"], KeyGradients]:
  """The cotangents, float32, of the first two arguments of `read`."""
  if not pattern.causal:
    return _pull(asking, keys, pattern)
  if pattern.layout == "contiguous":
    return jax.lax.cond(
      later,
      lambda: _pull(asking, keys, pattern),
      lambda: (_zeros(asking.rows), _no_gradients(keys)),
    )
  (early, late), (first, second) = _halves(asking), _halves(keys)
  d_late, d_first = _pull(late, first, pattern)
  d_query, d_key = _pull(
    _where(later, early, late), _where(later, first, second), pattern
  )
  zero, none = _zeros(d_query), _no_gradients(first)
  return (
    _join(_where(later, d_query, zero), d_late + _where(later, zero, d_query)),
    _join(
      _add(d_first, _where(later, d_key, none)),
      _where(later, none, d_key),
    ),
  )


def _read(queries, keys, pattern, *, triangle=False):
  return blocks.read_block(
    queries, keys, query_chunk=pattern.query_chunk, triangle=triangle
  )


def _pull(asking, keys, pattern, *, triangle=False):
  return blocks.pull_block(
    asking, keys, query_chunk=pattern.query_chunk, triangle=triangle
  )


def _nothing(queries, keys):
  """The state of queries that read nothing."""
  # Of both, so that it is sharded like them.
  out = _zeros(queries.rows[..., :1]) + _zeros(keys.values[:, :1, :1])
  return _unread(attention.AttentionState(out, out[..., 0]))


def _unread(state):
  return attention.AttentionState(
    _zeros(state.out), jnp.full_like(state.lse, -jnp.inf)
  )


def _no_gradients(keys):
  return KeyGradients(_zeros(keys.keys), _zeros(keys.values))


def _zeros(x):
  return jnp.zeros_like(x, dtype=jnp.float32)


def _halves(tree: Any):
  """The early and the late chunk."""
  half = jax.tree.leaves(tree)[0].shape[2] // 2
  return (
    jax.tree.map(lambda x: x[:, :, :half], tree),
    jax.tree.map(lambda x: x[:, :, half:], tree),
  )


def _join(early, late):
  return jax.tree.map(
    lambda *parts: jnp.concatenate(parts, axis=2), early, late
  )


def _where(condition, one, two):
  return jax.tree.map(lambda x, y: jnp.where(condition, x, y), one, two)


def _add(one, two):
  return jax.tree.map(jnp.add, one, two)

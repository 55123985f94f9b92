"""Causal attention of packed sequences, a head at a time.

    read = each_head(one_head, q, (k, v), segment_ids)

A plain loop over heads, in which XLA can skip what a head does not need.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tokjax import compat
from tokjax.kernels import sharding
from tokjax.typing import Array, Float, Int

__all__ = ["each_head", "recall"]


def each_head(
  head: Callable[..., Any],
  q: Float[Array, "B H N d"],
  shared: Sequence[Float[Array, "B K N _"]],
  segment_ids: Int[Array, "B N"] | None,
  *per_head: Any,
):
  """head(q, *shared, start, *per_head) for one head after the other.

  Args:
    head: of arrays without batch and heads, to a pytree of arrays. `start`,
      int32[N], is the first key that a row may read, N for padding.
    q: queries.
    shared: keys and the like; H / K heads in a row share one.
    segment_ids: a sequence is a run of equal ids; negative ones are padding.
      None: one sequence.
    *per_head: pytrees of arrays [B, H, ...].

  Returns:
    Pytree of arrays [B, H, ...].

  Raises:
    ValueError: if an axis of `q` other than the first two is sharded.

  Example:
    >>> q, k = jnp.ones((1, 2, 3, 1)), jnp.arange(3.0).reshape(1, 1, 3, 1)
    >>> def first_key(q, k, start):
    ...   return k[start, 0]
    >>> ids = jnp.array([[0, 0, 5]])
    >>> jax.jit(lambda q, k: each_head(first_key, q, (k,), ids))(q, k).tolist()
    [[[0.0, 0.0, 2.0], [0.0, 0.0, 2.0]]]

  On an Explicit mesh batch and heads may be sharded.
  """

  def key_head(arrays):
    q, shared, start, per_head = arrays
    return jax.lax.map(
      lambda one: head(one[0], *shared, start, *one[1]), (q, per_head)
    )

  def local(*arrays):
    leaves, tree = jax.tree.flatten(arrays)
    leaves = compat.varying_together(*leaves)
    q, shared, segment_ids, per_head = jax.tree.unflatten(tree, leaves)
    batch, heads = q.shape[:2]
    key_heads = batch * shared[0].shape[1]
    start = _starts(q, segment_ids)
    start = jnp.repeat(start, key_heads // batch, axis=0)

    def join(x):
      return x.reshape(key_heads, *x.shape[2:])

    def split(x):
      return x.reshape(key_heads, -1, *x.shape[2:])

    found = jax.lax.map(
      key_head,
      (
        split(q),
        jax.tree.map(join, shared),
        start,
        jax.tree.map(split, per_head),
      ),
    )
    return jax.tree.map(lambda x: x.reshape(batch, heads, *x.shape[2:]), found)

  arrays = q, tuple(shared), segment_ids, per_head
  batch, heads = sharding.first_two_axes("q", q)
  if batch is None and heads is None:
    return local(*arrays)
  both = jax.P(batch, heads)
  keys = both if shared[0].shape[1] > 1 else jax.P(batch)
  specs = both, keys, jax.P(batch), both
  return sharding.over_shards(local, arrays, specs, both)


def recall(
  lse: Float[Array, "B H N"],
  q: Float[Array, "B H N d"],
  k: Float[Array, "B K N d"],
  *,
  segment_ids: Int[Array, "B N"] | None = None,
) -> Float[Array, "B H"]:
  """Share of the mass of causal attention that was read, mean over rows.

  Args:
    lse: of what was read, see `AttentionState`.
    q: queries.
    k: keys.
    segment_ids: packed sequences and padding, as in `anchor_attention`.

  Returns:
    exp(lse - lse of all keys), without gradient; 0 where all is padding.

  Example:
    >>> x = jnp.zeros((1, 1, 4, 2))
    >>> first = jnp.zeros((1, 1, 4))  # every row reads one of its keys
    >>> jax.jit(recall)(first, x, x).round(4).item()  # (1 + 1/2 + ...) / 4
    0.52...

  Cost: 2 d N^2 FLOPs and 128 rows of logits a head.
  """

  def head(q, k, start, lse):
    position = jnp.arange(q.shape[0])
    valid = start <= position
    q, k = (jnp.where(valid[:, None], x, 0) for x in (q, k))

    def whole(arrays):
      query, row, begin = arrays
      logits = jnp.matmul(k, query, preferred_element_type=jnp.float32)
      among = (position >= begin) & (position <= row)
      logits = jnp.where(among, logits * q.shape[-1] ** -0.5, -jnp.inf)
      return jax.nn.logsumexp(logits)

    full = jax.lax.map(whole, (q, position, start), batch_size=128)
    share = jnp.exp(jnp.where(valid, lse - full, -jnp.inf))
    return jnp.sum(share) / jnp.maximum(jnp.sum(valid), 1)

  lse, q, k = jax.lax.stop_gradient((lse, q, k))
  return each_head(head, q, (k,), segment_ids, lse)


def _starts(q, segment_ids):
  """For each row the first key that it may read, N for padding: int32[B, N]."""
  start = jnp.zeros_like(q[:, 0, :, 0], dtype=jnp.int32)
  if segment_ids is None:
    return start
  position = jnp.arange(q.shape[2], dtype=jnp.int32)[None]
  changes = segment_ids[:, 1:] != segment_ids[:, :-1]
  changes = jnp.pad(changes, ((0, 0), (1, 0)))
  start = jax.lax.cummax(jnp.where(changes, position, start), axis=1)
  return jnp.where(segment_ids < 0, q.shape[2], start)

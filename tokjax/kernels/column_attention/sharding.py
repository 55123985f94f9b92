"""Runs column attention on the shards that each device already holds.

Examples and heads need nothing from each other, so a function of local shards
is the whole program; rows, keys and widths must be whole.
"""

from collections.abc import Callable

import jax

from tokjax.kernels import sharding

__all__ = ["over_shards"]


def over_shards(local: Callable, q, k, mask, row_weight, segment_ids, *per_row):
  """Calls `local` on shards of the batch and of the heads.

  Args:
    local: maps local shards of all arrays to [B, H, ...] arrays.
    q: [B, H, R, d]; its sharding over B and H is everybody's.
    k: [B, Hk, S, d]; a single key head stays whole.
    mask: [B, S] or None.
    row_weight: [B, R], [B, H, R] or None.
    segment_ids: [B, S] or None.
    *per_row: [B, H, R] or None.

  Returns:
    What `local` returns, for all shards.

  Raises:
    ValueError: if an axis other than the first two of `q` is sharded.
  """
  batch, heads = sharding.first_two_axes("q", q)
  if batch is None and heads is None:
    return local(q, k, mask, row_weight, segment_ids, *per_row)
  per_head = row_weight is not None and row_weight.ndim == 3
  specs = (
    jax.P(batch, heads),
    jax.P(batch, heads if k.shape[1] > 1 else None),
    jax.P(batch),
    jax.P(batch, heads) if per_head else jax.P(batch),
    jax.P(batch),
    *(jax.P(batch, heads) for _ in per_row),
  )
  return sharding.over_shards(
    local,
    (q, k, mask, row_weight, segment_ids, *per_row),
    specs,
    jax.P(batch, heads),
  )

"""Runs column attention on the shards that each device already holds.

Examples and heads need nothing from each other, so a function of local shards
is the whole program; rows, keys and widths must be whole.
"""

from collections.abc import Callable

import jax

__all__ = ["over_shards"]


def over_shards(local: Callable, q, k, mask, row_weight, segment_ids):
  """Calls `local` on shards of the batch and of the heads.

  Args:
    local: maps local shards of the five arrays to [B, H, ...] arrays.
    q: [B, H, R, d]; its sharding over B and H is everybody's.
    k: [B, Hk, S, d]; a single key head stays whole.
    mask: [B, S] or None.
    row_weight: [B, R], [B, H, R] or None.
    segment_ids: [B, S] or None.

  Returns:
    What `local` returns, for all shards.

  Raises:
    ValueError: if an axis other than the first two of `q` is sharded.
  """
  spec = tuple(jax.typeof(q).sharding.spec)
  batch, heads, *whole = (*spec, None, None, None, None)[:4]
  if any(axis is not None for axis in whole):
    raise ValueError(
      f"q must be sharded over its first two axes only, got {spec}"
    )
  if batch is None and heads is None:
    return local(q, k, mask, row_weight, segment_ids)
  per_head = row_weight is not None and row_weight.ndim == 3
  specs = (
    jax.P(batch, heads),
    jax.P(batch, heads if k.shape[1] > 1 else None),
    jax.P(batch),
    jax.P(batch, heads) if per_head else jax.P(batch),
    jax.P(batch),
  )
  arrays = tuple(
    x if x is None else jax.sharding.reshard(x, spec)
    for x, spec in zip(
      (q, k, mask, row_weight, segment_ids), specs, strict=True
    )
  )
  return jax.shard_map(
    local,
    mesh=jax.typeof(q).sharding.mesh,
    in_specs=specs,
    out_specs=jax.P(batch, heads),
  )(*arrays)

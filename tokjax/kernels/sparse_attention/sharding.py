"""Runs attention under a rule on the shards that each device already holds.

Examples and heads need nothing from each other, so a function of local shards
is the whole program; rows, keys and widths must be whole.
"""

from collections.abc import Callable

import jax

from tokjax.kernels import sharding

__all__ = ["over_shards"]


def over_shards(local: Callable, q, k, v, readers, read):
  """Calls `local` on shards of the batch and of the heads.

  Args:
    local: maps local shards of all arrays to [B, H, ...] arrays.
    q: [B, H, N, d]; its sharding over B and H is everybody's.
    k: [B, K, M, d]; a single key head stays whole.
    v: [B, K, M, e].
    readers: fields [N] or [B, N].
    read: fields [M] or [B, M].

  Returns:
    What `local` returns, for all shards.

  Raises:
    ValueError: if an axis other than the first two of `q` is sharded.
  """
  batch, heads = sharding.first_two_axes("q", q)
  if batch is None and heads is None:
    return local(q, k, v, readers, read)
  keys = jax.P(batch, heads if k.shape[1] > 1 else None)
  fields = [
    jax.tree.map(lambda x: jax.P(batch if x.ndim == 2 else None), given)
    for given in (readers, read)
  ]
  both = jax.P(batch, heads)
  specs = both, keys, keys, *fields
  return sharding.over_shards(local, (q, k, v, readers, read), specs, both)

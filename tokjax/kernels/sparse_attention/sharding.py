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
  spec = tuple(jax.typeof(q).sharding.spec)
  batch, heads, *whole = (*spec, None, None, None, None)[:4]
  if any(axis is not None for axis in whole):
    raise ValueError(
      f"q must be sharded over its first two axes only, got {spec}"
    )
  if batch is None and heads is None:
    return local(q, k, v, readers, read)
  keys = jax.P(batch, heads if k.shape[1] > 1 else None)
  fields = [
    jax.tree.map(lambda x: jax.P(batch if x.ndim == 2 else None), given)
    for given in (readers, read)
  ]
  leaves, tree = jax.tree.flatten((q, k, v, readers, read))
  specs = jax.tree.leaves((jax.P(batch, heads), keys, keys, *fields))
  return sharding.over_shards(
    lambda *leaves: local(*jax.tree.unflatten(tree, leaves)),
    leaves,
    specs,
    jax.P(batch, heads),
  )

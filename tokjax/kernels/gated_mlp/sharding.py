"""Runs the gated MLP on the tokens that each device already holds."""

from collections.abc import Callable

import jax

from tokjax.kernels import sharding

__all__ = ["over_shards"]


def over_shards(local: Callable, x, gate, w_up, w_down, *chosen):
  """Calls `local` on the tokens of each device, with all weights.

  Args:
    local: maps all arrays to one like `x`.
    x: [..., D]; its sharding is that of all tokens.
    gate: [..., F].
    w_up: [F, D].
    w_down: likewise.
    *chosen: arrays that are the same for all tokens.

  Returns:
    What `local` returns, for all tokens.

  Raises:
    ValueError: if the width of tokens or the weights are sharded.
  """
  whole = dict(w_up=w_up, w_down=w_down)
  whole = {name: _spec(w) for name, w in whole.items()}
  *batch, whole["the last axis of x"] = _spec(x)
  for name, spec in whole.items():
    if any(jax.tree.leaves(spec)):
      raise ValueError(
        f"{name} must be whole, got {spec}: inside jax.shard_map each device"
        " can take its own units, and a psum adds up the outputs"
      )
  arrays = (x, gate, w_up, w_down, *chosen)
  if not any(batch):
    return local(*arrays)
  tokens = jax.P(*batch)
  specs = (tokens, tokens) + (jax.P(),) * (2 + len(chosen))
  return sharding.over_shards(local, arrays, specs, tokens)


def _spec(x):
  spec = tuple(jax.typeof(x).sharding.spec)
  return (*spec, *(None,) * (x.ndim - len(spec)))

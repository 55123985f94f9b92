"""Nearest codes where tokens, codes or both are spread over devices."""

from collections.abc import Callable, Hashable
from typing import Literal

import jax

from tokjax.kernels import sharding
from tokjax.kernels.nearest_code import search
from tokjax.typing import Array, Bool, Float, Implementation, Int32

__all__ = ["over_shards", "sharded_nearest_code"]


def sharded_nearest_code(
  x: Float[Array, "*batch D"],
  codebook: Float[Array, "K D"],
  mask: Bool[Array, "*batch"] | None = None,
  *,
  axis_name: Hashable,
  metric: Literal["euclidean", "cosine"] = "euclidean",
  block_size: int | None = None,
  implementation: Implementation | None = None,
) -> Int32[Array, "*batch"]:
  """`nearest_code` over the codes of all devices; for `jax.shard_map`.

  Each device searches its own codes; only the best score and its index travel.

  Args:
    x: tokens, the same on all devices of the axis.
    codebook: this device's codes, equally many everywhere.
    mask: True where a token is real; None for all.
    axis_name: mesh axis, or several, over which the codes are spread.
    metric: as in `nearest_code`.
    block_size: likewise.
    implementation: likewise.

  Returns:
    The same on every device of the axis: positions in the whole codebook, ties
    to the lowest; -1 where `mask` is False.

  Raises:
    ValueError: as `nearest_code`.
    NotImplementedError: likewise.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> auto = (jax.sharding.AxisType.Auto,)
    >>> mesh = jax.make_mesh((1,), ("model",), axis_types=auto)
    >>> nearest = jax.jit(jax.shard_map(
    ...     lambda x, codes: sharded_nearest_code(x, codes, axis_name="model"),
    ...     mesh=mesh, in_specs=(jax.P(), jax.P("model")), out_specs=jax.P()))
    >>> nearest(jnp.array([[3.0], [9.0]]), jnp.array([[8.0], [4.0]])).tolist()
    [1, 0]

  Cost: as `nearest_code` for the local codes; 8 bytes a token from every
  device to every device.

  Source: ours.
  """
  settings = dict(
    metric=metric, block_size=block_size, implementation=implementation
  )
  search.check(x, codebook, mask, **settings)
  return _nearest(x, codebook, mask, axis_name, **settings)


_nearest = jax.jit(
  search.nearest,
  static_argnames=("axis_name", "metric", "block_size", "implementation"),
)


def over_shards(local: Callable, x, codebook, mask):
  """Calls `local` on the tokens, and where need be the codes, of each device.

  Args:
    local: maps tokens, codes, mask and the mesh axes over which the codes are
      spread, or None, to arrays with the leading axes of the tokens.
    x: [..., D].
    codebook: [K, D].
    mask: [...] or None.

  Returns:
    What `local` returns, for all tokens.

  Raises:
    ValueError: if the width of tokens or codes is sharded.
  """
  *batch, width = _spec(x)
  if width is not None:
    raise ValueError(f"x must not be sharded over its last axis, got {width!r}")
  taken = {name for axes in batch for name in _names(axes)}
  spread = sharding.first_axis("codebook", codebook)
  spread = tuple(name for name in _names(spread) if name not in taken)
  if not taken and not spread:
    return local(x, codebook, mask, None)
  tokens, codes = jax.P(*batch), jax.P(spread or None)
  out = tokens
  if spread:  # the array that is sharded names the mesh

    def codes_first(codebook, x, mask):
      return local(x, codebook, mask, spread)

    return sharding.over_shards(
      codes_first, (codebook, x, mask), (codes, tokens, tokens), out
    )

  def tokens_first(x, codebook, mask):
    return local(x, codebook, mask, None)

  return sharding.over_shards(
    tokens_first, (x, codebook, mask), (tokens, codes, tokens), out
  )


def _spec(x):
  spec = tuple(jax.typeof(x).sharding.spec)
  return (*spec, *(None,) * (x.ndim - len(spec)))


def _names(axes):
  if axes is None:
    return ()
  return axes if isinstance(axes, tuple) else (axes,)

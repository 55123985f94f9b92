"""Means and statistics of a batch that may lie on several devices."""

import jax
import jax.numpy as jnp

from tokjax.ops import code_usage
from tokjax.typing import Array, Bool, Float, Int

__all__ = ["masked_mean", "usage_stats"]


def masked_mean(
  x: Float[Array, "*batch"],
  mask: Bool[Array, "*batch"],
  axis_name: str | None = None,
) -> Float[Array, ""]:
  """Mean over what counts, of all devices; 0 if nothing does.

  Args:
    x: numbers.
    mask: True where a number counts.
    axis_name: mesh axis over which a `shard_map` cuts them.

  Example:
    >>> x, mask = jnp.array([1.0, 5.0, 3.0]), jnp.array([True, False, True])
    >>> jax.jit(masked_mean)(x, mask).item()
    2.0
  """
  sums = jnp.sum(jnp.where(mask, x, 0)), jnp.sum(mask)
  if axis_name is not None:
    sums = jax.lax.psum(sums, axis_name)
  return sums[0] / jnp.maximum(sums[1], 1)


def usage_stats(
  indices: Int[Array, "..."], num_codes: int, axis_name: str | None = None
) -> dict[str, Float[Array, ""]]:
  """Share of the codes in use and their perplexity, over all devices.

  Args:
    indices: of codes; -1 does not count.
    num_codes: K.
    axis_name: mesh axis over which a `shard_map` cuts the batch.

  Example:
    >>> found = usage_stats(jnp.array([0, 0, 3, -1]), num_codes=4)
    >>> {name: round(x.item(), 3) for name, x in found.items()}
    {'usage': 0.5, 'perplexity': 1.89}
  """
  counts = code_usage.code_histogram(indices, num_codes=num_codes)
  if axis_name is not None:
    counts = jax.lax.psum(counts, axis_name)
  return {
    "usage": code_usage.usage(counts),
    "perplexity": code_usage.perplexity(counts),
  }

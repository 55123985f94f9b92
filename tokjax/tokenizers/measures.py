"""Means and statistics of a batch that may lie on several devices."""

from typing import Literal

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.ops import code_usage
from tokjax.typing import Array, Bool, Float, Int

__all__ = ["masked_mean", "pixel_loss", "usage_stats"]


def masked_mean(
  x: Float[Array, "*batch"],
  mask: Bool[Array, "*batch"] | None = None,
  axis_name: str | None = None,
) -> Float[Array, ""]:
  """Mean over what counts, of all devices; 0 if nothing does.

  Args:
    x: numbers.
    mask: True where a number counts; None for all.
    axis_name: mesh axis over which a `shard_map` cuts them.

  Example:
    >>> x, mask = jnp.array([1.0, 5.0, 3.0]), jnp.array([True, False, True])
    >>> jax.jit(masked_mean)(x, mask).item()
    2.0
  """
  if mask is None:
    mean = jnp.mean(x)
    return mean if axis_name is None else jax.lax.pmean(mean, axis_name)
  sums = jnp.sum(jnp.where(mask, x, 0)), jnp.sum(mask)
  if axis_name is not None:
    sums = jax.lax.psum(sums, axis_name)
  return sums[0] / jnp.maximum(sums[1], 1)


def pixel_loss(
  images: Float[Array, "B height width C"],
  output: Float[Array, "B height width C"],
  kind: Literal["l1", "l2"],
  axis_name: str | None = None,
) -> Float[Array, ""]:
  """Mean absolute or mean square difference, float32, of all devices.

  Args:
    images: what should come back.
    output: what did.
    kind: "l1" or "l2", static.
    axis_name: mesh axis over which a `shard_map` cuts the batch.

  Raises:
    ValueError: for shapes that differ, or another kind.

  Example:
    >>> images, output = jnp.zeros((1, 1, 2, 1)), jnp.full((1, 1, 2, 1), 2.0)
    >>> [pixel_loss(images, output, kind).item() for kind in ("l1", "l2")]
    [2.0, 4.0]
  """
  checks.one_of(("l1", "l2"), pixel_loss=kind)
  if images.shape != output.shape:
    raise ValueError(
      f"output must have the shape of images, {images.shape}, got"
      f" {output.shape}"
    )
  error = images.astype(jnp.float32) - output.astype(jnp.float32)
  size = jnp.abs(error) if kind == "l1" else jnp.square(error)
  return masked_mean(size, axis_name=axis_name)


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

"""From scores or a keep mask to positions, under static shapes.

What is kept depends on the data, how many rows there are does not: the rows
that are left over are masked. Positions are ascending, ties go to the lower
one. Nothing here passes a gradient; gather the features with the positions.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.typing import Array, Bool, Float, Int32

__all__ = ["Kept", "keep_top_k", "pack"]


class Kept(NamedTuple):
  """Positions of the tokens that stay.

  Attributes:
    index: ascending positions; rows where `mask` is False hold the last one.
    mask: True where the row holds a position; those rows come first.
    overflow: how many candidates found no room.
  """

  index: Int32[Array, "*batch K"]
  mask: Bool[Array, "*batch K"]
  overflow: Int32[Array, "*batch"]


def keep_top_k(
  scores: Float[Array, "*batch N"],
  num_keep: int,
  mask: Bool[Array, "*batch N"] | None = None,
) -> Kept:
  """Positions of the highest scores, in ascending order.

  Args:
    scores: one per token; a valid NaN counts as the lowest of all.
    num_keep: how many rows, static, at most N.
    mask: True where a token may be kept; None for all.

  Returns:
    The positions. With fewer valid tokens than rows all of them are kept,
    whatever their scores; with more, `overflow` counts the rest.

  Raises:
    ValueError: if `num_keep` is not in 1..N, or sizes disagree.

  Example:
    >>> import jax.numpy as jnp
    >>> keep_top_k(jnp.array([0.1, 0.9, 0.4, 0.9]), 2).index.tolist()
    [1, 3]

  Cost: a selection and a sort of K rows, no N x N array.

  Source: ours, over `jax.lax.top_k`.
  """
  checks.in_range(1, scores.shape[-1], num_keep=num_keep)
  if mask is None:
    mask = jnp.ones_like(scores, dtype=bool)
  checks.same_size(scores=scores.shape[-1], mask=mask.shape[-1])
  return pack(mask, num_keep, scores)


def pack(
  keep: Bool[Array, "*batch N"],
  capacity: int,
  scores: Float[Array, "*batch N"] | None = None,
) -> Kept:
  """Positions where a mask is True, in a fixed number of rows.

  Args:
    keep: True where a token shall stay; how many differs from row to row.
    capacity: how many rows there are, static, at most N.
    scores: who goes first when there is no room for all: the lowest score, of
      equal ones the last. None: the last positions go.

  Returns:
    The positions, and how many had to go.

  Raises:
    ValueError: if `capacity` is not in 1..N, or sizes disagree.

  Example:
    >>> import jax.numpy as jnp
    >>> keep = jnp.array([True, False, True, True])
    >>> kept = pack(keep, 2, jnp.array([0.5, 0.0, 0.1, 0.3]))
    >>> kept.index.tolist(), int(kept.overflow)
    ([0, 3], 1)

  Cost: as `keep_top_k`; without scores one sort of N positions.

  Source: ours.
  """
  num_tokens = keep.shape[-1]
  checks.in_range(1, num_tokens, capacity=capacity)
  if scores is None:
    place = jax.lax.broadcasted_iota(jnp.int32, keep.shape, keep.ndim - 1)
    place = jnp.where(keep, place, num_tokens)
  else:
    checks.same_size(keep=num_tokens, scores=scores.shape[-1])
    scores = jax.lax.stop_gradient(scores).astype(jnp.float32)
    # Finite, so that -inf is left for what must not be kept; a zero of either
    # sign is the same score.
    low = jnp.finfo(jnp.float32).min
    scores = jnp.nan_to_num(scores, nan=low, posinf=jnp.inf, neginf=low)
    scores = jnp.where(scores == 0, 0, scores)
    scores = jnp.where(keep, scores, -jnp.inf)
    scores, place = jax.lax.top_k(scores, capacity)
    place = jnp.where(scores == -jnp.inf, num_tokens, place)
  place = jnp.sort(place, axis=-1)[..., :capacity].astype(jnp.int32)
  found = jnp.sum(keep, axis=-1, dtype=jnp.int32)
  return Kept(
    index=jnp.minimum(place, num_tokens - 1),
    mask=place < num_tokens,
    overflow=jnp.maximum(found - capacity, 0),
  )

"""Keeping as many of the best as a traced number says.

Shapes are static, counts need not be: the ranks of all entries are compared
with the count, and what is kept is a mask.
"""

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.typing import Array, Bool, Float, Int, Int32

__all__ = ["keep_best", "ranks"]


def ranks(
  scores: Float[Array, "*batch N"],
  mask: Bool[Array, "*batch N"] | None = None,
) -> Int32[Array, "*batch N"]:
  """How many entries come before each one, highest score first.

  Args:
    scores: no gradient flows.
    mask: True where an entry takes part; the others come last, whatever they
      hold.

  Returns:
    0 for the best; a permutation of 0..N-1. Ties go to the lower position.

  Raises:
    ValueError: if the axes disagree.

  Example:
    >>> import jax.numpy as jnp
    >>> ranks(jnp.array([0.1, 0.9, 0.9, 0.5])).tolist()
    [3, 0, 1, 2]

  Cost: one sort and one more to invert it.

  Source: ours.
  """
  lost = -jax.lax.stop_gradient(scores).astype(jnp.float32)
  if mask is not None:
    checks.same_size(scores=scores.shape[-1], mask=mask.shape[-1])
    lost = jnp.where(mask, lost, 0)
  # Made from the scores, all three are sharded alike.
  place = jnp.cumsum(jnp.ones_like(lost, dtype=jnp.int32), axis=-1) - 1
  outside = jnp.zeros_like(place)
  if mask is not None:
    outside += ~mask
  *_, order = jax.lax.sort((outside, lost, place), num_keys=2, is_stable=True)
  return jnp.argsort(order, axis=-1).astype(jnp.int32)


def keep_best(
  scores: Float[Array, "*batch N"],
  count: Int[Array, "*batch"],
  mask: Bool[Array, "*batch N"] | None = None,
) -> Bool[Array, "*batch N"]:
  """Marks the `count` entries with the highest scores.

  Args:
    scores: no gradient flows.
    count: how many to keep, traced; 0 or less keeps none.
    mask: True where an entry may be kept.

  Returns:
    True for min(count, number of valid entries) entries; ties go to the lower
    position.

  Raises:
    ValueError: if the axes disagree.

  Example:
    >>> import jax.numpy as jnp
    >>> scores = jnp.array([[0.1, 0.9, 0.9], [0.3, 0.2, 0.1]])
    >>> keep_best(scores, jnp.array([1, 2])).astype(int).tolist()
    [[0, 1, 0], [1, 1, 0]]

  Source: ours.
  """
  keep = ranks(scores, mask) < count[..., None]
  return keep if mask is None else keep & mask

"""Nearest codes in their shortest correct form: the definition of truth.

It holds every score at once, so it is for small inputs and for tests.
"""

import jax.numpy as jnp

from tokjax.typing import Array, Float, Int32

__all__ = ["nearest"]


def nearest(
  x: Float[Array, "n D"],
  codes: Float[Array, "K D"],
  offset: Float[Array, " K"],
) -> tuple[Int32[Array, " n"], Float[Array, " n"]]:
  """The code of each row with the largest <row, code> - offset.

  Args:
    x: rows, float32.
    codes: finite, float32.
    offset: float32; inf for a code that must not be chosen.

  Returns:
    The index, ties to the lowest, and the score.
  """
  scores = jnp.matmul(x, codes.T, precision="highest") - offset[None, :]
  return jnp.argmax(scores, axis=1).astype(jnp.int32), jnp.max(scores, axis=1)

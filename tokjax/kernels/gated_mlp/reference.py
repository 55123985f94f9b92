"""The gated MLP in its shortest correct form: the definition of truth.

It multiplies with all rows, whatever the gate says.
"""

import jax.numpy as jnp

from tokjax.typing import Array, Float

__all__ = ["gated_rows_forward"]


def gated_rows_forward(
  x: Float[Array, "*batch D"],
  gate: Float[Array, "*batch F"],
  w_up: Float[Array, "F D"],
  w_down: Float[Array, "F D"],
) -> Float[Array, "*batch D"]:
  """sum_f gate[f] <x, w_up[f]> w_down[f], dense.

  Products are summed in float32; the hidden values are rounded once, to the
  dtype of `x`. A gate that is zero gets no gradient.

  Args:
    x: tokens.
    gate: one factor per token and unit.
    w_up: one row per unit.
    w_down: likewise.

  Returns:
    In the dtype of `x`.
  """
  gate = jnp.where(gate != 0, gate, 0)  # stops the gradient of the others
  # The weight comes first: for one token XLA on CPU would copy it otherwise.
  hidden = gate * jnp.einsum(
    "fd,...d->...f", w_up, x, preferred_element_type=jnp.float32
  )
  return jnp.einsum(
    "...f,fd->...d",
    hidden.astype(x.dtype),
    w_down,
    preferred_element_type=jnp.float32,
  ).astype(x.dtype)

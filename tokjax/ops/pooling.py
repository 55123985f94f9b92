"""One vector from a set of token vectors."""

import jax.numpy as jnp

from tokjax import checks
from tokjax.typing import Array, Bool, Float

__all__ = ["mean_pool"]


def mean_pool(
  features: Float[Array, "B N D"], mask: Bool[Array, "B N"] | None = None
) -> Float[Array, "B D"]:
  """Mean of the valid tokens of each row; zero for a row without any.

  sum_n mask[n] features[n] / max(1, sum_n mask[n]), summed in float32. What
  sentence encoders do before normalising. Gradients flow to valid tokens only.

  Args:
    features: token features, any float dtype; padding may hold anything.
    mask: True where the token is real; None for all.

  Returns:
    The means, in the dtype of `features`.

  Raises:
    ValueError: if the axes disagree.

  Example:
    >>> x = jnp.array([[[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]]])
    >>> mean_pool(x, jnp.array([[True, True, False]]))
    Array([[2., 3.]], dtype=float32)
  """
  checks.has_rank(3, features=features)
  checks.has_rank(2, mask=mask)
  wide = features.astype(jnp.float32)
  if mask is None:
    return jnp.mean(wide, axis=1).astype(features.dtype)
  checks.same_size(features_batch=features.shape[0], mask_batch=mask.shape[0])
  checks.same_size(features_tokens=features.shape[1], mask_tokens=mask.shape[1])
  total = jnp.sum(jnp.where(mask[:, :, None], wide, 0), axis=1)  # [B, D]
  count = jnp.sum(mask, axis=1, dtype=jnp.float32)
  return (total / jnp.maximum(count, 1)[:, None]).astype(features.dtype)

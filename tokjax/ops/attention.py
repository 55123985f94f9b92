"""Attention under a mask: the plain form, for what fits in memory."""

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.typing import Array, Bool, Float

__all__ = ["attend"]


def attend(
  queries: Float[Array, "B H N d"],
  keys: Float[Array, "B H M d"],
  values: Float[Array, "B H M e"],
  mask: Bool[Array, "N M"] | Bool[Array, "#B N M"] | None = None,
) -> Float[Array, "B H N e"]:
  """softmax(q k^T / sqrt(d)) v over the keys that the mask allows.

  Args:
    queries: of H heads.
    keys: of H heads.
    values: one per key.
    mask: True where query n may read key m, for all examples or for each;
      None allows all. See `tokjax.ops.attention_masks`.

  Returns:
    The mixed values in the dtype of `values`; zeros for a query that may read
    nothing. Softmax and sums are float32.

  Raises:
    ValueError: if the mask has another shape.

  Example:
    >>> x = jnp.array([[[[1.0], [2.0], [3.0]]]])
    >>> attend(0 * x, x, x, jnp.tril(jnp.ones((3, 3), bool)))[0, 0, :, 0]
    Array([1. , 1.5, 2. ], dtype=float32)

  Cost: 4 B H N M d FLOPs; the logits take 4 B H N M bytes.

  Source: Vaswani et al. (2017), "Attention is all you need".
  """
  logits = jnp.matmul(
    queries, keys.swapaxes(-1, -2), preferred_element_type=jnp.float32
  )
  logits = logits * queries.shape[-1] ** -0.5
  if mask is not None:
    mask = _over_heads(mask, logits.shape)
    logits = jnp.where(mask, logits, -jnp.inf)
  largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
  largest = jnp.where(jnp.isfinite(largest), largest, 0)
  weights = jnp.exp(logits - largest)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  mixed = jnp.matmul(
    weights.astype(values.dtype), values, preferred_element_type=jnp.float32
  )
  return (mixed / jnp.where(total > 0, total, 1)).astype(values.dtype)


def _over_heads(mask, shape):
  """The mask as [1 or B, 1, N, M]."""
  checks.one_of((2, 3), rank_of_mask=mask.ndim)
  mask = mask[None, None] if mask.ndim == 2 else mask[:, None]
  batch, _, num_queries, num_keys = mask.shape
  checks.one_of((1, shape[0]), mask_batch=batch)
  checks.same_size(mask_queries=num_queries, queries=shape[2])
  checks.same_size(mask_keys=num_keys, keys=shape[3])
  return mask

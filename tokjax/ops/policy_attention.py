"""Attention whose keys have weights that a network chose and learns from."""

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.typing import Array, Float

__all__ = ["policy_attention"]


def policy_attention(
  queries: Float[Array, "B H N d"],
  keys: Float[Array, "B H M d"],
  values: Float[Array, "B H M e"],
  policy: Float[Array, "B N M"],
  *,
  epsilon: float = 1e-6,
) -> Float[Array, "B H N e"]:
  """Softmax of what remains when each key counts by its policy.

      a = exp(s - max s) policy
      weights = (a + epsilon / M) / (sum a + epsilon)

  The maximum is over all keys, also those that do not count. Gradients reach
  the policy, so that a hard choice with a straight-through gradient learns.

  Args:
    queries: of H heads.
    keys: of H heads.
    values: one per key.
    policy: how much query n may read key m, 0..1.
    epsilon: where nothing may be read the result is the plain mean of the
      values, and every forbidden key leaks about epsilon / M; 0 forbids
      strictly and gives zeros there.

  Returns:
    The mixed values in the dtype of `values`; weights are float32.

  Raises:
    ValueError: if the policy has another shape.

  Example:
    >>> scores = jnp.array([[[[1.0], [2.0], [3.0]]]])
    >>> one, eye = jnp.ones((1, 1, 1, 1)), jnp.eye(3)[None, None]
    >>> policy = jnp.array([[[1.0, 1.0, 0.0]]])
    >>> policy_attention(one, scores, eye, policy)[0, 0, 0].round(4).tolist()
    [0.2689..., 0.731..., 0.0]

  Cost: 4 B H N M d FLOPs; the weights take 4 B H N M bytes.

  Source: Rao et al. (2021), "DynamicViT"; epsilon as in LaVIT's code.
  """
  batch, _, num_queries, width = queries.shape
  shape = (batch, num_queries, keys.shape[2])
  if policy.shape != shape:
    raise ValueError(f"policy must have shape {shape}, got {policy.shape}")
  checks.in_range(0, 1, epsilon=epsilon)
  logits = jnp.matmul(
    queries, keys.swapaxes(-1, -2), preferred_element_type=jnp.float32
  )
  logits = logits * width**-0.5
  largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
  weights = jnp.exp(logits - largest) * policy.astype(jnp.float32)[:, None]
  total = jnp.sum(weights, axis=-1, keepdims=True) + epsilon
  weights = (weights + epsilon / shape[2]) / jnp.where(total > 0, total, 1)
  return jnp.matmul(
    weights, values.astype(jnp.float32), precision="highest"
  ).astype(values.dtype)

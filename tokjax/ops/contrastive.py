"""Contrast of two views: each vector must find its partner in the batch."""

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.ops import similarity
from tokjax.typing import Array, Bool, Float

__all__ = ["contrastive_loss"]


def contrastive_loss(
  x: Float[Array, "B E"],
  y: Float[Array, "B E"],
  mask: Bool[Array, " B"] | None = None,
  *,
  temperature: float | Float[Array, ""] = 0.07,
  label_smoothing: float = 0.0,
  axis_name: str | None = None,
) -> Float[Array, ""]:
  """Cross-entropy of row i of x finding row i of y, and the other way.

      logits[i, j] = cos(x_i, y_j) / temperature
      loss = mean_i of log sum_j exp(logits[i, j])
             - (1 - s) logits[i, i] - s mean_j logits[i, j]

  averaged with that of the transposed logits, s the label smoothing.

  Args:
    x: one view.
    y: the other; row i belongs to row i of x.
    mask: True where a row counts, as query and as candidate; None means all.
    temperature: positive; may be learned.
    label_smoothing: 0..1, the share of the target spread over all candidates.
    axis_name: mesh axis over which a `shard_map` cuts the batch; candidates
      and mean are those of all devices. Under jit alone they are anyway.

  Returns:
    float32, 0 where no row counts. Gradients reach both views, of all devices.

  Raises:
    ValueError: if sizes disagree or the smoothing is out of range.

  Example:
    >>> x = jnp.eye(2)
    >>> loss = jax.jit(contrastive_loss)(x, x, temperature=1.0)
    >>> print(f"{loss:.4f}")  # log(e + 1) - 1
    0.3133

  Cost: 4 B^2 E FLOPs over all devices; each holds its rows of two B x B
  matrices and all vectors.

  Source: Radford et al., 2021, "Learning Transferable Visual Models From
  Natural Language Supervision"; smoothing and candidates of all devices as in
  BLIP-2 (Li et al., 2023).
  """
  checks.same_size(x_rows=x.shape[0], y_rows=y.shape[0])
  checks.same_size(x_width=x.shape[-1], y_width=y.shape[-1])
  checks.in_range(0, 1, label_smoothing=label_smoothing)
  if mask is None:
    mask = jnp.ones_like(x[:, 0], bool)
  x, y = (
    similarity.safe_normalize(
      jnp.where(mask[:, None], z, 0).astype(jnp.float32)
    )
    for z in (x, y)
  )
  everyone = _of_all_devices(mask, axis_name)[None]  # [1, B]
  number = jnp.maximum(1, jnp.sum(everyone))
  own = jnp.sum(x * y, axis=-1) / temperature

  def one_way(x, y):
    logits = jnp.matmul(x, _of_all_devices(y, axis_name).T, precision="highest")
    logits = logits / temperature
    # Masked rows are zeros, whose logits add nothing to the mean.
    spread = jnp.sum(logits, axis=-1) / number
    everywhere = jnp.broadcast_to(everyone, logits.shape)
    total = jax.nn.logsumexp(logits, axis=-1, where=everywhere)
    return total - (1 - label_smoothing) * own - label_smoothing * spread

  loss = jnp.where(mask, (one_way(x, y) + one_way(y, x)) / 2, 0)
  sums = jnp.sum(loss), jnp.sum(mask)
  if axis_name is not None:
    sums = jax.lax.psum(sums, axis_name)
  return sums[0] / jnp.maximum(sums[1], 1)


def _of_all_devices(x, axis_name):
  """The rows of the whole batch, on every device."""
  if axis_name is not None:
    return jax.lax.all_gather(x, axis_name, tiled=True)
  parts = any(axis is not None for axis in jax.typeof(x).sharding.spec)
  return jax.sharding.reshard(x, jax.P()) if parts else x

"""Distances between all tokens of a sequence."""

import functools

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.ops import similarity
from tokjax.typing import Array, Bool, Float

__all__ = ["pairwise_distances"]


def pairwise_distances(
  x: Float[Array, "*batch N D"],
  mask: Bool[Array, "*batch N"] | None = None,
  *,
  metric: str = "euclidean",
) -> Float[Array, "*batch N N"]:
  """Distances between all tokens of a sequence.

  Euclidean distances come from one Gram matrix, taken relative to the first
  valid token, so that they lose digits by the spread of the tokens only and
  not by how far away from zero all of them are.

  Args:
    x: tokens, float32 or bfloat16; no gradient flows.
    mask: True where the token is real; the others count as zero vectors.
    metric: "euclidean", or "cosine" for 1 - cosine.

  Returns:
    float32, symmetric, 0 on the diagonal.

  Raises:
    ValueError: if the token axes disagree, or for another metric.

  Example:
    >>> import jax.numpy as jnp
    >>> pairwise_distances(jnp.array([[0.0, 0.0], [3.0, 4.0]])).tolist()
    [[0.0, 5.0], [5.0, 0.0]]

  Cost: 2 N^2 D FLOPs and N^2 floats.

  Source: common knowledge; the shift to a token is ours.
  """
  checks.one_of(("euclidean", "cosine"), metric=metric)
  if mask is None:
    mask = jnp.ones_like(x[..., 0], dtype=bool)
  checks.same_size(x_tokens=x.shape[-2], mask_tokens=mask.shape[-1])
  one = functools.partial(_pairwise_distances, metric=metric)
  for _ in range(x.ndim - 2):
    one = jax.vmap(one)
  return one(x, mask)


def _pairwise_distances(x, mask, *, metric):
  x = jax.lax.stop_gradient(x).astype(jnp.float32)
  x = jnp.where(mask[:, None], x, 0)  # NaN padding must not spread
  itself = jnp.eye(x.shape[0], dtype=bool)
  if metric == "cosine":
    unit = similarity.safe_normalize(x)
    gram = jnp.matmul(unit, unit.T, precision="highest")
    away = 1 - (gram + gram.T) / 2
    return jnp.where(itself, 0, jnp.maximum(away, 0))
  x = jnp.where(mask[:, None], x - x[jnp.argmax(mask)][None, :], 0)
  gram = jnp.matmul(x, x.T, precision="highest")
  square = jnp.sum(jnp.where(itself, gram, 0), axis=1)  # the diagonal
  squares = square[:, None] + square[None, :] - (gram + gram.T)
  return jnp.where(itself, 0, jnp.sqrt(jnp.maximum(squares, 0)))

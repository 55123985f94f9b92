"""Density-peak clustering of the tokens of a sequence.

A center is dense, and far from anything denser. No iterations: density from
the nearest neighbors, one distance to a denser token, the best products.
"""

import functools

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.ops import distances as pairs
from tokjax.ops import medoids
from tokjax.typing import Array, Bool, Float

__all__ = ["density_peaks"]


def density_peaks(
  x: Float[Array, "*batch N D"],
  mask: Bool[Array, "*batch N"] | None = None,
  *,
  num_clusters: int,
  num_neighbors: int | None = None,
) -> medoids.Centers:
  """Tokens that are peaks of density, and the nearest peak of every token.

  With distances d = |x_i - x_j| / sqrt(D), the density of a token is
  exp(-mean d^2) over its `num_neighbors` nearest, itself included; its height
  is the distance to the nearest denser token (for the densest: the largest
  distance of all); the K largest products are centers. Equal densities count
  as falling with the position. Products are compared as sums of logarithms,
  which far apart tokens cannot underflow.

  Args:
    x: tokens, float32 or bfloat16; no gradient flows.
    mask: True where the token is real; masked ones have no influence.
    num_clusters: K, static, at most N. With fewer valid tokens than that, all
      of them are centers and the other rows are masked.
    num_neighbors: tokens a density looks at, static; None for `num_clusters`,
      as in SparseVLM.

  Returns:
    Centers in ascending order, and the nearest center of each token (a center
    belongs to itself; ties: lower position). `merging.mean_plan` turns them
    into means.

  Raises:
    ValueError: if the token axes disagree or a setting is out of range.

  Example:
    >>> import functools
    >>> import jax, jax.numpy as jnp
    >>> x = jnp.array([[0.0], [0.1], [0.3], [5.0], [5.2], [5.3]])
    >>> find = functools.partial(density_peaks, num_clusters=2, num_neighbors=3)
    >>> found = jax.jit(find)(x)
    >>> found.index.tolist(), found.assignment.tolist()
    ([1, 4], [0, 0, 0, 1, 1, 1])

  Cost: 2 N^2 D FLOPs, N^2 floats.

  Source: Rodriguez and Laio (2014), "Clustering by fast search and find of
  density peaks"; Du, Ding and Jia (2016) for the neighbors; Zhang et al.
  (2025), "SparseVLM". The published code adds small random numbers to the
  densities instead of a rule for ties, and lists centers by their product.
  """
  checks.in_range(1, x.shape[-2], num_clusters=num_clusters)
  if num_neighbors is None:
    num_neighbors = num_clusters
  checks.in_range(1, x.shape[-2], num_neighbors=num_neighbors)
  if mask is None:
    mask = jnp.ones_like(x[..., 0], dtype=bool)
  distances = pairs.pairwise_distances(x, mask) / x.shape[-1] ** 0.5
  one = functools.partial(
    _density_peaks, num_clusters=num_clusters, num_neighbors=num_neighbors
  )
  for _ in range(mask.ndim - 1):
    one = jax.vmap(one)
  return one(distances, mask)


def _density_peaks(distances, mask, *, num_clusters, num_neighbors):
  num_tokens = mask.shape[0]
  place = jnp.arange(num_tokens)
  live = jnp.arange(num_clusters) < jnp.sum(mask, dtype=jnp.int32)

  away = jnp.where(mask[None, :], distances, jnp.inf)  # [N, N]
  near, _ = jax.lax.top_k(-away, num_neighbors)
  found = near > -jnp.inf
  total = jnp.sum(jnp.where(found, jnp.square(near), 0), axis=1)
  log_density = -total / jnp.maximum(jnp.sum(found, axis=1), 1)

  denser = log_density[None, :] > log_density[:, None]
  equal = log_density[None, :] == log_density[:, None]
  denser |= equal & (place[None, :] < place[:, None])
  height = jnp.min(jnp.where(denser, away, jnp.inf), axis=1)
  both = mask[:, None] & mask[None, :]
  farthest = jnp.max(jnp.where(both, distances, 0))
  height = jnp.where(height == jnp.inf, farthest, height)

  # Equal tokens have height 0, whose logarithm must not look like a mask.
  score = log_density + jnp.log(jnp.maximum(height, 1e-30))
  _, index = jax.lax.top_k(jnp.where(mask, score, -jnp.inf), num_clusters)
  index = jnp.sort(jnp.where(live, index, num_tokens)).astype(jnp.int32)
  index = jnp.minimum(index, num_tokens - 1)

  own = index[:, None] == place[None, :]
  to_center = jnp.where(own, -1.0, distances[index])  # [K, N]
  to_center = jnp.where(live[:, None], to_center, jnp.inf)
  nearest = jnp.argmin(to_center, axis=0).astype(jnp.int32)
  return medoids.Centers(index, live, jnp.where(mask, nearest, num_clusters))

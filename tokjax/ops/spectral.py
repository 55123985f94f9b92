"""Spectral clustering of the tokens of a sequence.

Tokens are the nodes of a graph whose edges are similarities; the eigenvectors
of its Laplacian with the smallest eigenvalues are nearly constant on groups
that hardly touch, whatever the shape of the groups. The rows of those vectors
are then clustered by `medoids`, and the medoids name tokens.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tokjax import checks
from tokjax.ops import distances as pairs
from tokjax.ops import medoids, similarity
from tokjax.typing import Array, Bool, Float

__all__ = [
  "affinity_graph",
  "spatio_temporal_window",
  "spectral_embedding",
  "spectral_medoids",
]


def spatio_temporal_window(
  grid: tuple[int, int, int], *, spatial: int = 9, temporal: int = 7
) -> np.ndarray:
  """Pairs of patches that are close in the picture and in time.

  Args:
    grid: frames, rows and columns; tokens are in that order, columns fastest.
    spatial: side of the square window around a patch, odd. 9, or 19 for finer
      patches, in the published code.
    temporal: frames in the window, odd. 7 in the published code.

  Returns:
    NumPy bool [N, N], symmetric, True on the diagonal.

  Raises:
    ValueError: if a size is not positive, or a window not odd.

  Example:
    >>> spatio_temporal_window((1, 1, 3), spatial=3).astype(int).tolist()
    [[1, 1, 0], [1, 1, 1], [0, 1, 1]]

  Source: Zhao et al. (2022), "CenterCLIP"; that the windows are centered is
  our reading.
  """
  frames, rows, columns = grid
  checks.in_range(
    1, float("inf"), frames=frames, rows=rows, columns=columns,
    spatial=spatial, temporal=temporal,
  )  # fmt: skip
  checks.divisible(
    2, spatial_minus_1=spatial - 1, temporal_minus_1=temporal - 1
  )
  place = np.indices(grid).reshape(3, -1)  # [3, N]
  apart = np.abs(place[:, :, None] - place[:, None, :])
  half = np.array([temporal // 2, spatial // 2, spatial // 2])
  return (apart <= half[:, None, None]).all(axis=0)


def affinity_graph(
  x: Float[Array, "*batch N D"],
  mask: Bool[Array, "*batch N"] | None = None,
  *,
  sigma: float = 2.0,
  num_neighbors: int | None = None,
  window: np.ndarray | None = None,
) -> Float[Array, "*batch N N"]:
  """Edge weights exp(-|x_i - x_j|^2 / (2 sigma^2)), all or the strongest.

  Args:
    x: tokens, float32 or bfloat16; no gradient flows.
    mask: True where the token is real; the others have no edge.
    sigma: width of the heat kernel; 2 in the published code.
    num_neighbors: keeps an edge that is among the strongest so many of either
      end, where a token's edge to itself counts as its first (ties: lower
      position); None keeps all ("heat kernel" graph).
    window: bool [N, N], pairs that may have an edge, such as
      `spatio_temporal_window`; applied before neighbors are counted.

  Returns:
    float32 weights in 0..1, symmetric, 1 on the diagonal of valid tokens.

  Raises:
    ValueError: if sizes disagree or a setting is out of range.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> graph = jax.jit(affinity_graph, static_argnames="num_neighbors")
    >>> edges = graph(jnp.array([[0.0], [2.0], [9.0]]), num_neighbors=2)
    >>> [[round(w, 3) for w in row] for row in edges.tolist()]
    [[1.0, 0.607, 0.0], [0.607, 1.0, 0.002], [0.0, 0.002, 1.0]]

  Cost: 2 N^2 D FLOPs, and a sort of each row for neighbors; N^2 floats.

  Source: Zhao et al. (2022), "CenterCLIP", whose runs use 5 neighbors per
  frame of a segment.
  """
  num_tokens = x.shape[-2]
  if num_neighbors is not None:
    checks.in_range(1, num_tokens, num_neighbors=num_neighbors)
  if window is not None:
    checks.same_size(x_tokens=num_tokens, window_rows=window.shape[0])
    checks.same_size(x_tokens=num_tokens, window_columns=window.shape[1])
  if mask is None:
    mask = jnp.ones_like(x[..., 0], dtype=bool)
  one = functools.partial(
    _affinity_graph, sigma=sigma, num_neighbors=num_neighbors, window=window
  )
  distances = pairs.pairwise_distances(x, mask)
  return _mapped(one, mask.ndim - 1)(distances, mask)


def spectral_embedding(
  affinity: Float[Array, "*batch N N"],
  mask: Bool[Array, "*batch N"] | None = None,
  *,
  num_components: int,
) -> Float[Array, "*batch N K"]:
  """Rows of the first eigenvectors of the normalised Laplacian, length one.

  L_sym = I - D^-1/2 W D^-1/2 with the degrees D = sum_j W_ij. Each vector is
  turned to the side where its squares weigh more (the rule of Bro et al.: the
  projections of L_sym on an eigenvector are the vector, times its eigenvalue).

  Args:
    affinity: W, symmetric, at least 0; no gradient flows.
    mask: True where the token is real.
    num_components: K, static: eigenvectors of the smallest eigenvalues.

  Returns:
    float32 rows of length one; zero for masked tokens. Distances between rows
    do not depend on signs, nor on the basis of a space of equal eigenvalues.

  Raises:
    ValueError: if the token axes disagree or K is out of range.

  Example:
    >>> import jax, numpy as np
    >>> pairs = np.kron(np.eye(2), np.ones((2, 2)))  # 0-1 and 2-3
    >>> embed = jax.jit(spectral_embedding, static_argnames="num_components")
    >>> rows = np.asarray(embed(pairs, num_components=2))
    >>> [round(float(abs(rows[0] @ rows[j])), 3) for j in (1, 2)]
    [1.0, 0.0]

  Cost: an eigendecomposition, about 9 N^3 FLOPs, slow on accelerators.

  Source: Ng, Jordan and Weiss (2001), "On spectral clustering"; Zhao et al.
  (2022), "CenterCLIP", which takes the last singular vectors instead, the
  same spaces; signs by Bro, Acar and Kolda (2008).
  """
  checks.in_range(1, affinity.shape[-1], num_components=num_components)
  if mask is None:
    mask = jnp.ones_like(affinity[..., 0], dtype=bool)
  checks.same_size(
    affinity_tokens=affinity.shape[-2], mask_tokens=mask.shape[-1]
  )
  one = functools.partial(_spectral_embedding, num_components=num_components)
  return _mapped(one, mask.ndim - 1)(affinity, mask)


def spectral_medoids(
  x: Float[Array, "*batch N D"],
  mask: Bool[Array, "*batch N"] | None = None,
  *,
  num_clusters: int,
  sigma: float = 2.0,
  num_neighbors: int | None = None,
  window: np.ndarray | None = None,
  num_iterations: int = 100,
) -> medoids.Centers:
  """Tokens that are medoids of spectral clusters.

  `affinity_graph`, `spectral_embedding` with one vector per cluster, then
  k-medoids of its rows. All rows being equally long, the first seed is the
  first valid token.

  Args:
    x: tokens, float32 or bfloat16; no gradient flows.
    mask: True where the token is real; masked ones have no influence.
    num_clusters: K, static, at most N. With fewer valid tokens than that, all
      of them are medoids.
    sigma: width of the heat kernel.
    num_neighbors: edges per token, or None for all.
    window: bool [N, N], pairs that may have an edge.
    num_iterations: most updates of the medoids, static.

  Returns:
    Medoids in ascending order, and the row each token belongs to.

  Raises:
    ValueError: if sizes disagree or a setting is out of range.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> x = jnp.array([[0.0], [0.5], [9.0], [9.5], [9.7]])
    >>> cluster = jax.jit(spectral_medoids, static_argnames="num_clusters")
    >>> cluster(x, num_clusters=2).assignment.tolist()
    [0, 0, 1, 1, 1]

  Cost: about 9 N^3 FLOPs for the eigenvectors; the rest as `kmedoids`.

  Source: Zhao et al. (2022), "CenterCLIP". The published code starts from the
  longest row, which rounding errors decide.
  """
  checks.in_range(1, x.shape[-2], num_clusters=num_clusters)
  affinity = affinity_graph(
    x, mask, sigma=sigma, num_neighbors=num_neighbors, window=window
  )
  rows = spectral_embedding(affinity, mask, num_components=num_clusters)
  return medoids.kmedoids_of_distances(
    pairs.pairwise_distances(rows, mask),
    jnp.ones_like(rows[..., 0]),
    mask,
    num_clusters=num_clusters,
    num_iterations=num_iterations,
  )


def _affinity_graph(distances, mask, *, sigma, num_neighbors, window):
  both = mask[:, None] & mask[None, :]
  if window is not None:
    both &= jnp.asarray(window)
  weight = jnp.where(both, jnp.exp(-jnp.square(distances / sigma) / 2), 0)
  if num_neighbors is None:
    return weight
  # Distances, unlike weights, do not underflow to ties; a token is first.
  away = jnp.where(both, distances, jnp.inf)
  itself = jnp.eye(mask.shape[0], dtype=bool)
  order = jnp.argsort(jnp.where(itself, -1, away), axis=1, stable=True)
  rank = jnp.argsort(order, axis=1)
  near = rank < num_neighbors
  return jnp.where(near | near.T, weight, 0)


def _spectral_embedding(affinity, mask, *, num_components):
  affinity = jax.lax.stop_gradient(affinity).astype(jnp.float32)
  affinity = jnp.where(mask[:, None] & mask[None, :], affinity, 0)
  degree = jnp.sum(affinity, axis=1)
  scale = jnp.where(degree > 0, jax.lax.rsqrt(jnp.maximum(degree, 1e-30)), 0)
  laplacian = -scale[:, None] * affinity * scale[None, :]
  # Eigenvalues lie in 0..2; masked tokens get 3 and so come last.
  diagonal = jnp.where(mask, 1.0, 3.0)
  itself = jnp.eye(mask.shape[0], dtype=bool)
  laplacian += jnp.where(itself, diagonal[:, None], 0)
  _, vectors = jnp.linalg.eigh(laplacian)  # ascending
  vectors = vectors[:, :num_components]
  side = jnp.sum(jnp.sign(vectors) * jnp.square(vectors), axis=0)
  vectors = jnp.where(side < 0, -1.0, 1.0)[None, :] * vectors
  return similarity.safe_normalize(jnp.where(mask[:, None], vectors, 0))


def _mapped(function, num_axes):
  """Maps a function of one example over the leading axes."""
  for _ in range(num_axes):
    function = jax.vmap(function)
  return function

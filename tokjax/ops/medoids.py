"""k-medoids of the tokens of a sequence, deterministic from seed to answer.

A medoid is a token: the member of a cluster whose distances to the others sum
to least. Seeds are those of Katsavounidis, Kuo and Zhang (1994), the longest
vector and then, again and again, the one farthest from all seeds before it,
so that no key is needed and two runs agree. Medoids come in ascending order,
which keeps them in the order of space and time.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.ops import distances as pairs
from tokjax.typing import Array, Bool, Float, Int32

__all__ = [
  "Centers",
  "kkz_seeds",
  "kmedoids",
  "kmedoids_of_distances",
]


class Centers(NamedTuple):
  """Tokens that stand for clusters, and who belongs to whom.

  Attributes:
    index: position of each center, ascending; rows where `mask` is False hold
      the last position.
    mask: True where there is a center; they come first.
    assignment: row of the center of each token; K (one too many) for masked
      tokens, as in the slots of `plans.Merge`.
  """

  index: Int32[Array, "*batch K"]
  mask: Bool[Array, "*batch K"]
  assignment: Int32[Array, "*batch N"]


def kkz_seeds(
  distances: Float[Array, "*batch N N"],
  norms: Float[Array, "*batch N"],
  mask: Bool[Array, "*batch N"] | None = None,
  *,
  num_clusters: int,
) -> Int32[Array, "*batch K"]:
  """Seeds: the longest token, then the one farthest from all seeds so far.

  Args:
    distances: of all pairs, at least 0.
    norms: length of each token; only their order counts.
    mask: True where the token may be a seed.
    num_clusters: K, static, at most N.

  Returns:
    Positions in the order they were chosen, each once; ties to the lower one.
    The last ones mean nothing where there are fewer valid tokens.

  Raises:
    ValueError: if the token axes disagree or K is out of range.

  Example:
    >>> import jax, numpy as np
    >>> x = np.array([0.0, 1.0, 2.0, 10.0, 11.0, 13.0])
    >>> seeds = jax.jit(kkz_seeds, static_argnames="num_clusters")
    >>> seeds(abs(x[:, None] - x), abs(x), num_clusters=2).tolist()
    [5, 0]

  Cost: K N comparisons.

  Source: Katsavounidis, Kuo and Zhang (1994), "A new initialization technique
  for generalized Lloyd iteration".
  """
  mask = _full_mask(distances, mask)
  checks.same_size(
    distances_tokens=distances.shape[-2], norms_tokens=norms.shape[-1]
  )
  checks.in_range(1, distances.shape[-1], num_clusters=num_clusters)
  one = functools.partial(_kkz_seeds, num_clusters=num_clusters)
  return _mapped(one, mask.ndim - 1)(distances, norms, mask)


def kmedoids(
  x: Float[Array, "*batch N D"],
  mask: Bool[Array, "*batch N"] | None = None,
  *,
  num_clusters: int,
  metric: str = "euclidean",
  num_iterations: int = 100,
) -> Centers:
  """Medoids of the tokens of each sequence.

  From the seeds of `kkz_seeds`, tokens go to their nearest medoid and each
  cluster takes the member with the smallest sum of distances as its medoid,
  until no medoid moves. A medoid always belongs to itself, so that equal
  tokens cannot leave a cluster empty. Ties go to the lower position.

  Args:
    x: tokens, float32 or bfloat16; no gradient flows.
    mask: True where the token is real; masked ones have no influence.
    num_clusters: K, static, at most N. With fewer valid tokens than that, all
      of them are medoids and the other rows are masked.
    metric: "euclidean" or "cosine", see `ops.distances`.
    num_iterations: most updates, static; every sequence stops at its own fixed
      point. 100 in the published code.

  Returns:
    Medoids in ascending order, and the medoid nearest to each token.

  Raises:
    ValueError: if the token axes disagree or a setting is out of range.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> x = jnp.array([[0.0], [1.0], [2.0], [10.0], [11.0], [13.0]])
    >>> cluster = jax.jit(kmedoids, static_argnames="num_clusters")
    >>> found = cluster(x, num_clusters=2)
    >>> found.index.tolist(), found.assignment.tolist()
    ([1, 4], [0, 0, 0, 1, 1, 1])

  Cost: 2 N^2 D FLOPs once and 2 N^2 K per iteration; N^2 + 2 N K floats. All
  sequences of a batch wait for the slowest.

  Source: Zhao et al. (2022), "CenterCLIP", k-medoids++. The published code
  stops when the medoids of all sequences together move less than 1e-6 on
  average; here each stops when its medoids are the ones before.
  """
  mask = _full_mask(x, mask)
  distances = pairs.pairwise_distances(x, mask, metric=metric)
  wide = jax.lax.stop_gradient(x).astype(jnp.float32)
  norms = jnp.linalg.norm(jnp.where(mask[..., None], wide, 0), axis=-1)
  return kmedoids_of_distances(
    distances,
    norms,
    mask,
    num_clusters=num_clusters,
    num_iterations=num_iterations,
  )


def kmedoids_of_distances(
  distances: Float[Array, "*batch N N"],
  norms: Float[Array, "*batch N"],
  mask: Bool[Array, "*batch N"] | None = None,
  *,
  num_clusters: int,
  num_iterations: int = 100,
) -> Centers:
  """Medoids where the distances are known; see `kmedoids`.

  Args:
    distances: of all pairs, symmetric, at least 0.
    norms: the longest token is the first seed; equal norms start from the
      first valid token.
    mask: True where the token is real; masked ones have no influence.
    num_clusters: K, static, at most N.
    num_iterations: most updates, static.

  Returns:
    Medoids in ascending order, and the medoid nearest to each token.

  Raises:
    ValueError: if the token axes disagree or a setting is out of range.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> far = jnp.array([[0.0, 1.0, 5.0], [1.0, 0.0, 4.0], [5.0, 4.0, 0.0]])
    >>> find = jax.jit(kmedoids_of_distances, static_argnames="num_clusters")
    >>> find(far, jnp.ones(3), num_clusters=2).index.tolist()
    [0, 2]

  Source: Zhao et al. (2022), "CenterCLIP".
  """
  mask = _full_mask(distances, mask)
  checks.same_size(
    distances_tokens=distances.shape[-2], norms_tokens=norms.shape[-1]
  )
  checks.in_range(1, distances.shape[-1], num_clusters=num_clusters)
  checks.in_range(0, 1 << 30, num_iterations=num_iterations)
  one = functools.partial(
    _kmedoids, num_clusters=num_clusters, num_iterations=num_iterations
  )
  return _mapped(one, mask.ndim - 1)(distances, norms, mask)


def _kkz_seeds(distances, norms, mask, *, num_clusters):
  distances = _own_first(distances)
  first = jnp.argmax(jnp.where(mask, norms.astype(jnp.float32), -jnp.inf))
  # A token that was picked is -1 away; masked ones lie below even that.
  closest = jnp.where(mask, distances[first], -jnp.inf)

  def step(closest, _):
    pick = jnp.argmax(closest)
    return jnp.minimum(closest, distances[pick]), pick

  _, picks = jax.lax.scan(step, closest, length=num_clusters - 1)
  return jnp.concatenate([first[None], picks]).astype(jnp.int32)


def _kmedoids(distances, norms, mask, *, num_clusters, num_iterations):
  distances = jax.lax.stop_gradient(distances).astype(jnp.float32)
  norms = jax.lax.stop_gradient(norms)
  num_tokens = mask.shape[0]
  distances = _own_first(distances)
  live = jnp.arange(num_clusters) < jnp.sum(mask, dtype=jnp.int32)

  def assign(medoids):  # [K] -> [N]
    away = jnp.where(live[:, None], distances[medoids], jnp.inf)  # [K, N]
    nearest = jnp.argmin(away, axis=0).astype(jnp.int32)
    return jnp.where(mask, nearest, num_clusters)

  def update(medoids):  # [K] -> [K]
    member = assign(medoids)[:, None] == jnp.arange(num_clusters)[None, :]
    # Summed distance of every token to the members of every cluster.
    cost = jnp.matmul(
      distances, member.astype(jnp.float32), precision="highest"
    )  # [N, K]
    best = jnp.argmin(jnp.where(member, cost, jnp.inf), axis=0)
    return jnp.where(live, best, medoids).astype(jnp.int32)

  def unsettled(state):
    step, _, moved = state
    return moved & (step < num_iterations)

  def iterate(state):
    step, medoids, _ = state
    new = update(medoids)
    return step + 1, new, jnp.any(new != medoids)

  seeds = _kkz_seeds(distances, norms, mask, num_clusters=num_clusters)
  start = (jnp.zeros_like(seeds[0]), seeds, jnp.ones_like(mask[0]))
  _, medoids, _ = jax.lax.while_loop(unsettled, iterate, start)
  medoids = jnp.sort(jnp.where(live, medoids, num_tokens))
  medoids = jnp.minimum(medoids, num_tokens - 1)
  return Centers(medoids, live, assign(medoids))


def _own_first(distances):
  """Puts -1 on the diagonal: nothing is as near to a token as it is itself."""
  return jnp.where(jnp.eye(distances.shape[0], dtype=bool), -1.0, distances)


def _full_mask(x, mask):
  """The mask, or all True; checks its size against axis -2 of `x`."""
  if mask is None:
    return jnp.ones_like(x[..., 0], dtype=bool)
  checks.same_size(x_tokens=x.shape[-2], mask_tokens=mask.shape[-1])
  return mask


def _mapped(function, num_axes):
  """Maps a function of one example over the leading axes."""
  for _ in range(num_axes):
    function = jax.vmap(function)
  return function

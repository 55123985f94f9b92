"""The k largest of many: in blocks, from parts, and across devices.

All are exact. Ties go to the lower index. A value of -inf means "nothing
there" and always comes with index -1. NaN counts as the largest value, as in
`jax.lax.top_k`, so that it shows instead of hiding; masked entries have no
influence whatever they hold.
"""

import functools
from collections.abc import Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.typing import Array, Bool, Float, Int32

__all__ = [
  "TopK",
  "gather_top_k",
  "merge_top_k",
  "sharded_top_k",
  "streaming_top_k",
  "top_k",
]


class TopK(NamedTuple):
  """The k largest values and where they were.

  Attributes:
    values: descending; -inf where there were fewer than k.
    index: position of each value, int32; -1 where the value is -inf.
  """

  values: Float[Array, "*batch K"]
  index: Int32[Array, "*batch K"]


def top_k(
  scores: Float[Array, "*batch n"],
  k: int,
  mask: Bool[Array, "*batch n"] | None = None,
) -> TopK:
  """The k largest entries of the last axis.

  Args:
    scores: values to choose from.
    k: how many, static, at most n.
    mask: True where an entry may be chosen; None for all.

  Returns:
    Values in the dtype of `scores`, and their positions.

  Raises:
    ValueError: if `k` is larger than the axis.

  Example:
    >>> import jax.numpy as jnp
    >>> top_k(jnp.array([0.1, 0.9, 0.9, 0.5]), 3).index.tolist()
    [1, 2, 3]

  Source: ours, over `jax.lax.top_k`.
  """
  checks.in_range(1, scores.shape[-1], k=k)
  if mask is not None:
    scores = jnp.where(mask, scores, -jnp.inf)
  return _nothing_is_minus_one(*jax.lax.top_k(scores, k))


def merge_top_k(a: TopK, b: TopK, k: int) -> TopK:
  """The k largest of two selections from disjoint parts.

  Args:
    a: the part whose indices are all below those of `b`, for the tie rule.
    b: the other part; same leading axes.
    k: how many, static, at most the entries of both.

  Returns:
    Values and the indices they came with.

  Raises:
    ValueError: if `k` is larger than both together.

  Example:
    >>> import jax.numpy as jnp
    >>> a = TopK(jnp.array([5.0, 1.0]), jnp.array([2, 0], jnp.int32))
    >>> b = TopK(jnp.array([5.0, 4.0]), jnp.array([7, 9], jnp.int32))
    >>> merge_top_k(a, b, 3).index.tolist()
    [2, 7, 9]

  Source: ours.
  """
  values = jnp.concatenate([a.values, b.values], axis=-1)
  index = jnp.concatenate([a.index, b.index], axis=-1)
  return _pick(values, index, k)


def streaming_top_k(
  queries: Float[Array, "Nq D"],
  corpus: Float[Array, "Nd D"],
  k: int,
  *,
  block_size: int = 16_384,
  mask: Bool[Array, " Nd"] | None = None,
) -> TopK:
  """The k corpus vectors with the largest inner product, for each query.

  Scores a block of the corpus at a time and keeps the best k so far, so that
  the [Nq, Nd] scores never exist at once. Exact.

  Args:
    queries: one vector per query, float32 or bfloat16.
    corpus: one vector per document, same dtype; may be larger than the scores
      could be.
    k: how many, static, at most Nd.
    block_size: documents scored at once, static.
    mask: True where a document may be found; None for all.

  Returns:
    float32 inner products, descending, and document numbers.

  Raises:
    ValueError: if sizes disagree, or `k` is larger than the corpus.

  Example:
    >>> import jax.numpy as jnp
    >>> corpus = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]])
    >>> found = streaming_top_k(corpus[2:], corpus, 2, block_size=2)
    >>> found.index.tolist()
    [[2, 0]]

  Cost: 2 * Nq * Nd * D FLOPs; holds Nq * (block_size + k) scores. For a corpus
  sharded over devices call it inside `jax.shard_map`, then `gather_top_k`.

  Source: ours.
  """
  checks.has_rank(2, queries=queries, corpus=corpus)
  checks.has_rank(1, mask=mask)
  checks.same_size(queries_dim=queries.shape[1], corpus_dim=corpus.shape[1])
  checks.in_range(1, corpus.shape[0], k=k)
  checks.in_range(1, 1 << 31, block_size=block_size)
  if mask is not None:
    checks.same_size(corpus=corpus.shape[0], mask=mask.shape[0])
  return _streaming_top_k(queries, corpus, mask, k=k, block_size=block_size)


@functools.partial(jax.jit, static_argnames=("k", "block_size"))
def _streaming_top_k(queries, corpus, mask, *, k, block_size):
  size = corpus.shape[0]
  block = min(block_size, size)

  def step(i, best):
    # The last block is moved back to fit; what it repeats is masked out.
    start = jnp.minimum(i * block, size - block)
    part = jax.lax.dynamic_slice_in_dim(corpus, start, block)  # [b, D]
    scores = jnp.matmul(  # [Nq, b]
      queries,
      part.T,
      precision="highest" if queries.dtype == jnp.float32 else None,
      preferred_element_type=jnp.float32,
    )
    position = start + jnp.arange(block, dtype=jnp.int32)
    allowed = position >= i * block
    if mask is not None:
      allowed &= jax.lax.dynamic_slice_in_dim(mask, start, block)
    found = top_k(
      scores, min(k, block), jnp.broadcast_to(allowed[None, :], scores.shape)
    )
    index = jnp.where(found.index < 0, -1, found.index + start)
    return merge_top_k(best, TopK(found.values, index), k)

  # Made from an inner product, the carry varies and is sharded as scores are.
  like = jnp.matmul(
    queries, corpus[:1].T, preferred_element_type=jnp.float32
  )  # [Nq, 1]
  nothing = jnp.full_like(like, -jnp.inf)
  values = jnp.repeat(nothing, k, axis=1)
  best = TopK(values, jnp.full_like(values, -1, dtype=jnp.int32))
  return jax.lax.fori_loop(0, -(-size // block), step, best)


def sharded_top_k(
  scores: Float[Array, "*batch n"], k: int, *, axis_name: Hashable
) -> TopK:
  """The k largest over all devices of a mesh axis; for `jax.shard_map`.

  Each device chooses among its own scores, and only those choices travel.

  Args:
    scores: this device's part of the last axis, equally long everywhere.
    k: how many, static, at most n times the number of devices.
    axis_name: mesh axis over which the last axis is spread.

  Returns:
    The same on every device: values, and positions in the whole axis.

  Raises:
    ValueError: if `k` is larger than the whole axis.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> auto = (jax.sharding.AxisType.Auto,)
    >>> mesh = jax.make_mesh((1,), ("data",), axis_types=auto)
    >>> search = jax.shard_map(
    ...     lambda scores: sharded_top_k(scores, 2, axis_name="data"),
    ...     mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P())
    >>> search(jnp.array([0.1, 0.7, 0.3])).index.tolist()
    [1, 2]

  Cost: k values and indices from every device to every device.

  Source: ours.
  """
  size = scores.shape[-1]
  local = top_k(scores, min(k, size))
  return gather_top_k(local, k, shard_size=size, axis_name=axis_name)


def gather_top_k(
  local: TopK, k: int, *, shard_size: int, axis_name: Hashable
) -> TopK:
  """Merges each device's selection into one; for `jax.shard_map`.

  Args:
    local: what this device chose among its own `shard_size` entries, such as
      the result of `streaming_top_k`.
    k: how many, static, at most what all devices chose together.
    shard_size: entries per device; device p owns those from
      `p * shard_size` on.
    axis_name: mesh axis over which the entries are spread.

  Returns:
    The same on every device: values, and positions in the whole axis.

  Raises:
    ValueError: if `k` is larger than what all devices chose.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> auto = (jax.sharding.AxisType.Auto,)
    >>> mesh = jax.make_mesh((1,), ("data",), axis_types=auto)
    >>> def search(queries, corpus):
    ...   found = streaming_top_k(queries, corpus, 1)
    ...   return gather_top_k(found, 1, shard_size=2, axis_name="data")
    >>> eye = jnp.eye(2)
    >>> search = jax.shard_map(search, mesh=mesh,
    ...     in_specs=(jax.P(), jax.P("data")), out_specs=jax.P())
    >>> search(eye[1:], eye).index.tolist()
    [[1]]

  Source: ours.
  """
  shift = jax.lax.axis_index(axis_name) * shard_size
  index = jnp.where(local.index < 0, -1, local.index + shift)

  def gather(x):  # [*batch, k] of each device, to [*batch, devices * k]
    return jax.lax.all_gather(
      x, axis_name, axis=x.ndim - 1, tiled=True, to="invarying"
    )

  # In the order of the devices, so that ties go to the lower index.
  return _pick(gather(local.values), gather(index), k)


def _pick(values, index, k):
  checks.in_range(1, values.shape[-1], k=k)
  values, place = jax.lax.top_k(values, k)
  index = jnp.take_along_axis(index, place, axis=-1)
  return _nothing_is_minus_one(values, index)


def _nothing_is_minus_one(values, index):
  return TopK(values, jnp.where(values == -jnp.inf, -1, index))

"""One block of attention: some queries, some keys, forward and back.

    state = read_block(queries, keys, query_chunk=512)
    asking = asked(queries, out, lse, d_out)  # out, lse: of all keys
    d_rows, d_keys = pull_block(asking, keys, query_chunk=512)

Also what attention over many devices does before and after its blocks. Every
array has its rows on axis 2, so that the tuples here can be cut alike.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.compat import varying_together
from tokjax.ops import attention
from tokjax.typing import Array, Float, Int

__all__ = [
  "Asked",
  "KeyGradients",
  "Keys",
  "Queries",
  "asked",
  "blank_padding",
  "cotangents",
  "made_again",
  "prepare",
  "pull_block",
  "read_block",
]


class Queries(NamedTuple):
  """Rows that ask; `segments` below 0 are padding."""

  rows: Float[Array, "B H n d"]
  segments: Int[Array, "B 1 n"] | None


class Keys(NamedTuple):
  """Rows that are read."""

  keys: Float[Array, "B K m d"]
  values: Float[Array, "B K m e"]
  segments: Int[Array, "B 1 m"] | None


class Asked(NamedTuple):
  """Queries with what the backward pass knows of them.

  Attributes:
    rows: as they asked.
    segments: as they asked.
    d_out: cotangent of their result.
    lse: of all the keys that they read.
    delta: sum of d_out * out.
  """

  rows: Float[Array, "B H n d"]
  segments: Int[Array, "B 1 n"] | None
  d_out: Float[Array, "B H n e"]
  lse: Float[Array, "B H n"]
  delta: Float[Array, "B H n"]


class KeyGradients(NamedTuple):
  """float32 cotangents of `Keys`."""

  keys: Float[Array, "B K m d"]
  values: Float[Array, "B K m e"]


def prepare(
  queries: Float[Array, "B H n d"],
  keys: Float[Array, "B K n d"],
  values: Float[Array, "B K n e"],
  segment_ids: Int[Array, "B n"] | None,
  *,
  axis_name: str,
) -> tuple[Queries, Keys]:
  """Checks a device's shards; padding becomes zero, whatever it held.

  Args:
    queries: of H heads.
    keys: of the same rows; K divides H.
    values: of the same rows.
    segment_ids: the sequence that a row belongs to; below 0 for padding.
    axis_name: mesh axis over which rows are cut.

  Returns:
    Arrays that vary over the same mesh axes, that one among them.

  Raises:
    ValueError: if sizes disagree or K does not divide H.

  Example:
    >>> x = jnp.ones((1, 1, 2, 1))
    >>> segment_ids = jnp.array([[0, -1]])
    >>> def f(x):
    ...   return prepare(x, x, x, segment_ids, axis_name="seq")[1].values
    >>> jax.vmap(f, axis_name="seq")(x[None]).tolist()
    [[[[[1.0], [0.0]]]]]
  """
  checks.has_rank(4, queries=queries, keys=keys, values=values)
  checks.divisible(keys.shape[1], heads_of_queries=queries.shape[1])
  checks.same_size(heads_of_keys=keys.shape[1], of_values=values.shape[1])
  checks.same_size(
    rows_of_queries=queries.shape[2],
    of_keys=keys.shape[2],
    of_values=values.shape[2],
  )
  if segment_ids is not None:
    checks.has_rank(2, segment_ids=segment_ids)
    checks.same_size(
      rows_of_queries=queries.shape[2], of_segment_ids=segment_ids.shape[1]
    )
    segment_ids = segment_ids[:, None]  # [B, 1, n]
  *arrays, segments, _ = varying_together(
    queries, keys, values, segment_ids, jax.lax.axis_index(axis_name)
  )
  queries, keys, values = (blank_padding(x, segments) for x in arrays)
  return Queries(queries, segments), Keys(keys, values, segments)


def blank_padding(
  x: Float[Array, "B H n d"], segments: Int[Array, "B 1 n"] | None
) -> Float[Array, "B H n d"]:
  """The rows, zero where the segment is below 0; so is their gradient.

  Example:
    >>> blank_padding(jnp.ones((1, 1, 2, 1)), jnp.array([[[3, -1]]])).tolist()
    [[[[1.0], [0.0]]]]
  """
  if segments is None:
    return x
  return jnp.where(segments[..., None] >= 0, x, 0)


def asked(
  queries: Queries,
  out: Float[Array, "B H n e"],
  lse: Float[Array, "B H n"],
  d_out: Float[Array, "B H n e"],
) -> Asked:
  """Queries and the cotangent of their result, ready for `pull`.

  Example:
    >>> x = jnp.ones((1, 1, 1, 2))
    >>> asked(Queries(x, None), x, x[..., 0], 3 * x).delta.item()
    6.0
  """
  delta = jnp.einsum(
    "bhne,bhne->bhn", d_out, out, preferred_element_type=jnp.float32
  )
  return Asked(queries.rows, queries.segments, d_out, lse, delta)


def made_again(*kept: Any) -> tuple[Any, ...]:
  """The same arrays, from which the compiler must compute anew.

  Otherwise it would find that the backward pass does what the forward pass did
  and keep the rows of all devices, and the weights, in between.

  Example:
    >>> made_again(jnp.ones(()), None)
    (Array(1., dtype=float32), None)
  """
  return jax.lax.optimization_barrier(kept)


def cotangents(
  queries: Queries,
  keys: Keys,
  d_rows: Float[Array, "B H n d"],
  d_keys: KeyGradients,
) -> tuple[Queries, Keys]:
  """The sums of what `pull` gave, in the dtypes of what they belong to.

  Example:
    >>> x = jnp.ones((1, 1, 1, 2), jnp.bfloat16)
    >>> total = x.astype(jnp.float32)
    >>> sums = KeyGradients(total, total)
    >>> queries, keys = Queries(x, None), Keys(x, x, None)
    >>> cotangents(queries, keys, total, sums)[0].rows.dtype
    dtype(bfloat16)
  """
  return (
    Queries(d_rows.astype(queries.rows.dtype), None),
    Keys(
      d_keys.keys.astype(keys.keys.dtype),
      d_keys.values.astype(keys.values.dtype),
      None,
    ),
  )


def read_block(
  queries: Queries, keys: Keys, *, query_chunk: int, triangle: bool = False
) -> attention.AttentionState:
  """Queries read keys of their segments.

  Args:
    queries: of a device, or some of them.
    keys: of a device, or some of them.
    query_chunk: queries whose logits are in memory together.
    triangle: whether query i reads no more than keys 0..i of these.

  Returns:
    A part of the attention of these queries, to be merged with others.

  Example:
    >>> x = jnp.ones((1, 1, 2, 1))
    >>> state = read_block(Queries(x, None), Keys(x, x, None), query_chunk=2)
    >>> state.out.tolist()
    [[[[1.0], [1.0]]]]

  Cost: 2 products of all queries with all keys, also for a triangle.
  """
  num_rows = queries.rows.shape[2]

  def some(start, part):
    mask = _mask(part, keys, start, triangle)
    return attention.attend_with_lse(part.rows, keys.keys, keys.values, mask)

  if num_rows <= query_chunk:
    return some(0, queries)
  chunks = _chunks(queries, query_chunk)
  states = jax.lax.map(lambda chunk: some(*chunk), chunks)
  return attention.join_rows(states, num_rows)


def pull_block(
  asking: Asked, keys: Keys, *, query_chunk: int, triangle: bool = False
) -> tuple[Float[Array, "B H n d"], KeyGradients]:
  """The transpose of `read_block`; weights are made again, from lse.

  Args:
    asking: queries that read these keys, and perhaps others.
    keys: as they were read.
    query_chunk: queries whose weights are in memory together.
    triangle: as they were read.

  Returns:
    What this block adds to the cotangents of queries and keys, float32.

  Example:
    >>> x = jnp.ones((1, 1, 2, 1))
    >>> queries, keys = Queries(x, None), Keys(x, x, None)
    >>> state = read_block(queries, keys, query_chunk=2)
    >>> asking = asked(queries, state.out, state.lse, x)
    >>> pull_block(asking, keys, query_chunk=2)[1].values.tolist()
    [[[[1.0], [1.0]]]]

  Cost: 5 products of all queries with all keys, also for a triangle.
  """

  def some(start, part):
    d_rows, *d_keys = attention.attend_cotangents(
      part.rows,
      keys.keys,
      keys.values,
      _mask(part, keys, start, triangle),
      lse=part.lse,
      delta=part.delta,
      d_out=part.d_out,
    )
    return d_rows, KeyGradients(*d_keys)

  num_rows = asking.rows.shape[2]
  if num_rows <= query_chunk:
    return some(0, asking)

  def step(total, chunk):
    d_rows, d_keys = some(*chunk)
    return _add(total, d_keys), d_rows

  # Rows that fill up the last chunk are zero, cotangents too: they add nothing.
  chunks = _chunks(asking, query_chunk)
  d_keys, d_rows = jax.lax.scan(step, _no_gradients(keys), chunks)
  return attention.join_rows(d_rows, num_rows), d_keys


def _mask(queries, keys, start, triangle):
  """[n, m], [B, n, m] or None; the first query is row `start` of its block."""
  num_rows, num_keys = queries.rows.shape[2], keys.keys.shape[2]
  mask = None
  if triangle:
    mask = (start + jnp.arange(num_rows))[:, None] >= jnp.arange(num_keys)[None]
  if queries.segments is None:
    return mask
  ours, theirs = queries.segments[:, 0], keys.segments[:, 0]
  same = (ours[:, :, None] == theirs[:, None]) & (ours >= 0)[:, :, None]
  return same if mask is None else same & mask[None]


def _chunks(tree, size):
  """Where chunks of rows start, and the chunks; both on a new first axis."""
  chunks = attention.cut_rows(tree, size)
  return jnp.arange(len(jax.tree.leaves(chunks)[0])) * size, chunks


def _no_gradients(keys):
  return KeyGradients(_zeros(keys.keys), _zeros(keys.values))


def _zeros(x):
  return jnp.zeros_like(x, dtype=jnp.float32)


def _add(one, two):
  return jax.tree.map(jnp.add, one, two)

"""Runs a MaxSim function on the shards that each device already holds.

Scores of different queries and documents need nothing from each other, so a
function of local shards is the whole program; the only choice is what to do
when queries and documents are spread over the same mesh axis.
"""

from collections.abc import Callable

import jax

from tokjax.kernels import sharding

__all__ = ["over_query_shards", "over_row_shards", "over_shards"]


def over_shards(local: Callable, queries, documents, query_mask, document_mask):
  """Calls `local` so that results are sharded over queries and documents.

  Args:
    local: maps local shards of the four arrays to arrays [Nq, Nd, ...].
    queries: [Nq, Q, D]; gathered where it shares a mesh axis with documents.
    documents: [Nd, N, D].
    query_mask: [Nq, Q] or None.
    document_mask: [Nd, N] or None.

  Returns:
    What `local` returns, for all shards.

  Raises:
    ValueError: if an axis other than the first is sharded.
  """
  rows, columns = (
    sharding.first_axis("queries", queries),
    sharding.first_axis("documents", documents),
  )
  if set(_names(rows)) & set(_names(columns)):
    rows = None
  return _mapped(
    local,
    (queries, documents, query_mask, document_mask),
    (jax.P(rows), jax.P(columns), jax.P(rows), jax.P(columns)),
    jax.P(rows, columns),
  )


def over_row_shards(local: Callable, *arrays):
  """Calls `local` on arrays that share their first axis and its sharding.

  Args:
    local: maps local shards to arrays with the same first axis.
    *arrays: arrays or None; the first one's sharding is everybody's.

  Returns:
    What `local` returns, for all shards.

  Raises:
    ValueError: if an axis other than the first is sharded.
  """
  rows = sharding.first_axis("queries", arrays[0])
  sharding.first_axis("documents", arrays[1])
  return _mapped(local, arrays, (jax.P(rows),) * len(arrays), jax.P(rows))


def over_query_shards(local: Callable, of_queries: tuple, whole: tuple):
  """Calls `local` on shards of the queries and on arrays that are whole.

  Args:
    local: maps local shards of `of_queries`, then `whole`, to arrays [Nq, ...].
    of_queries: queries, and arrays or None with the same first axis.
    whole: arrays that every device needs all of.

  Returns:
    What `local` returns, for all shards.

  Raises:
    ValueError: if one of `whole` is sharded, or the queries are sharded over
      another axis than the first.
  """
  rows = sharding.first_axis("queries", of_queries[0])
  for x in whole:
    spec = tuple(jax.typeof(x).sharding.spec)
    if any(axis is not None for axis in spec):
      raise ValueError(f"tokens and their ids must be whole, got {spec}")
  specs = (jax.P(rows),) * len(of_queries) + (jax.P(),) * len(whole)
  return _mapped(local, (*of_queries, *whole), specs, jax.P(rows))


def _mapped(local, arrays, in_specs, out_specs):
  if all(axis is None for spec in in_specs for axis in spec):
    return local(*arrays)
  return sharding.over_shards(local, arrays, in_specs, out_specs)


def _names(axis):
  if axis is None:
    return ()
  return axis if isinstance(axis, tuple) else (axis,)

"""Rows of a table by index or by lot, and sums of rows by index.

On a mesh of Explicit axes a gather or scatter must say how its result is laid
out; `take_rows` and `sum_rows` do: as the index lies, and whole.
"""

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.typing import Array, Bool, Float, Int, Key, UInt8

__all__ = ["draw_rows", "sum_rows", "take_rows"]


def take_rows(
  table: Float[Array, "K D"] | UInt8[Array, "K D"],
  index: Int[Array, "*shape"],
) -> Float[Array, "*shape D"] | UInt8[Array, "*shape D"]:
  """table[index], with zeros where the index is negative.

  Args:
    table: whole on every device.
    index: of rows; above K - 1 counts as K - 1.

  Returns:
    Rows, laid out as the index. The gradient of a row goes to the table.

  Example:
    >>> table = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    >>> jax.jit(take_rows)(table, jnp.array([1, -1])).tolist()
    [[3.0, 4.0], [0.0, 0.0]]
  """
  spec = _spec(index)
  if _sharded(spec):
    layout = jax.P(*spec, None)
    rows = table.at[index].get(mode="clip", out_sharding=layout)
  else:
    rows = jnp.take(table, index, axis=0, mode="clip")
  return jnp.where((index >= 0)[..., None], rows, jnp.zeros((), table.dtype))


def sum_rows(
  rows: Float[Array, "*shape D"], index: Int[Array, "*shape"], *, num_rows: int
) -> Float[Array, "K D"]:
  """For each number k the sum of the rows whose index is k.

  Args:
    rows: vectors.
    index: where each is added; others than 0 to K - 1 are dropped.
    num_rows: K.

  Returns:
    Sums over all devices, whole on every device. Inside `shard_map` they are
    those of the local rows.

  Example:
    >>> rows, index = jnp.array([[1.0], [2.0], [4.0]]), jnp.array([0, -1, 0])
    >>> jax.jit(sum_rows, static_argnames="num_rows")(
    ...   rows, index, num_rows=2).tolist()
    [[5.0], [0.0]]
  """
  checks.in_range(1, 1 << 30, num_rows=num_rows)

  def add(rows, index):
    # Negative numbers would count from the end.
    index = jnp.where(index >= 0, index, num_rows)
    return jax.ops.segment_sum(
      rows.reshape(-1, rows.shape[-1]), index.reshape(-1), num_rows
    )

  if _sharded(_spec(rows)) or _sharded(_spec(index)):
    add = jax.sharding.auto_axes(add, out_sharding=jax.P())
  return add(rows, index)


def draw_rows(
  key: Key[Array, ""],
  rows: Float[Array, "n D"],
  mask: Bool[Array, " n"],
  *,
  number: int,
) -> Float[Array, "K D"]:
  """Random rows among those that count, none twice while there are others.

  Args:
    key: of the draw.
    rows: to draw from, whole on every device.
    mask: True where a row counts.
    number: K, how many to draw.

  Returns:
    The rows drawn; fewer valid ones repeat in their order, and without any it
    is one that does not count.

  Example:
    >>> rows, mask = jnp.array([[1.0], [2.0]]), jnp.array([False, True])
    >>> draw = jax.jit(draw_rows, static_argnames="number")
    >>> draw(jax.random.key(0), rows, mask, number=2).tolist()
    [[2.0], [2.0]]
  """
  draw = jax.random.uniform(key, mask.shape)
  order = jnp.argsort(jnp.where(mask, draw, jnp.inf))  # valid rows first
  slots = jnp.arange(number) % jnp.maximum(1, jnp.sum(mask))
  return rows[order[slots]]


def _spec(x):
  return tuple(jax.typeof(x).sharding.spec)


def _sharded(spec):
  return any(axis is not None for axis in spec)

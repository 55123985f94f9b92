"""Codes of an image as token ids of a language model, and back.

    ids = to_language(indices, num_codes=8192, offset=32000, begin=1, end=2)

The new ids stand behind the text vocabulary. What has several codes, such as
a slot of residual levels, is written out vector by vector or level by level.
"""

from typing import Literal, get_args

import jax.numpy as jnp

from tokjax import checks
from tokjax.typing import Array, Int

__all__ = ["from_language", "to_language"]

Order = Literal["vectors", "levels"]


def to_language(
  indices: Int[Array, "B S M"],
  *,
  num_codes: int,
  offset: int,
  order: Order = "vectors",
  shared: bool = True,
  begin: int | None = None,
  end: int | None = None,
) -> Int[Array, "B L"]:
  """Ids in the order in which a language model reads them.

  Args:
    indices: codes of S vectors with M levels each, in 0..num_codes - 1.
    num_codes: of one level.
    offset: id of code 0, the size of the text vocabulary.
    order: "vectors": all levels of the first vector, then of the next;
      "levels": the first level of all vectors, then the next.
    shared: the levels use the same ids; False gives level l the ids from
      `offset + l num_codes` on.
    begin: id put before, None for none.
    end: id put behind, None for none.

  Returns:
    int32, of length S M and one for each id put around.

  Raises:
    ValueError: for an unknown order or another rank.

  Example:
    >>> codes = jnp.array([[[1, 2], [3, 0]]])
    >>> to_language(codes, num_codes=4, offset=10, shared=False,
    ...             begin=8, end=9).tolist()
    [[8, 11, 16, 13, 14, 9]]
  """
  _check(order, indices, 3)
  _, vectors, levels = indices.shape
  ids = indices.astype(jnp.int32) + offset
  ids = ids + _of_levels(levels, num_codes, shared)[None, None]
  if order == "levels":
    ids = ids.swapaxes(1, 2)
  ids = ids.reshape(-1, vectors * levels)
  if begin is not None:
    ids = jnp.pad(ids, [(0, 0), (1, 0)], constant_values=begin)
  if end is not None:
    ids = jnp.pad(ids, [(0, 0), (0, 1)], constant_values=end)
  return ids


def from_language(
  ids: Int[Array, "B L"],
  *,
  num_codes: int,
  offset: int,
  num_levels: int = 1,
  order: Order = "vectors",
  shared: bool = True,
) -> Int[Array, "B S M"]:
  """The codes that `to_language` wrote, without what was put around.

  Args:
    ids: S M ids, nothing around them.
    num_codes: of one level.
    offset: id of code 0.
    num_levels: M.
    order: as there.
    shared: as there.

  Returns:
    int32; -1 where an id is no code of its level, as a language model may
    write one.

  Raises:
    ValueError: for an unknown order, or if the levels do not divide the ids.

  Example:
    >>> ids = jnp.array([[11, 16, 13, 3]])
    >>> from_language(ids, num_codes=4, offset=10, num_levels=2,
    ...               shared=False).tolist()
    [[[1, 2], [3, -1]]]
  """
  _check(order, ids, 2)
  checks.divisible(num_levels, ids=ids.shape[1])
  vectors = ids.shape[1] // num_levels
  if order == "levels":
    indices = ids.reshape(-1, num_levels, vectors).swapaxes(1, 2)
  else:
    indices = ids.reshape(-1, vectors, num_levels)
  indices = indices.astype(jnp.int32) - offset
  indices = indices - _of_levels(num_levels, num_codes, shared)[None, None]
  return jnp.where((indices >= 0) & (indices < num_codes), indices, -1)


def _of_levels(num_levels, num_codes, shared):
  levels = jnp.arange(num_levels, dtype=jnp.int32)
  return levels * (0 if shared else num_codes)


def _check(order, ids, rank):
  checks.one_of(get_args(Order), order=order)
  checks.has_rank(rank, ids=ids)

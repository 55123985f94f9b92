"""Groups of rows that read keys of their own.

    found = each_group(one, None, 256, (q, row), index)
    # in one: read_between(q, k[index], v[index], first, last, index)

Plain XLA takes one group after the other, so that no more than the keys of one
are gathered at a time; kernels take some together, to have work for a whole
chip.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tokjax.kernels import hopper
from tokjax.kernels.sparse_attention import RuleAttention, rule_attention
from tokjax.ops import mask_rules
from tokjax.typing import Array, Float, Implementation, Int

__all__ = ["each_group", "read_between"]

# Groups that a kernel is given together: of 16 blocks of 128 rows each, they
# are as many blocks as a large GPU has processors.
_AT_ONCE = 8


def each_group(
  function: Callable[..., Any],
  implementation: Implementation | None,
  group: int,
  rows: Sequence[Array],
  *per_group: Array,
):
  """function(implementation, arrays) of groups of rows.

  Args:
    function: of an implementation and arrays [c, group, ...] and [c, ...], c
      groups, to a pytree of arrays [c, group, ...].
    implementation: of the attention in it, see `rule_attention`. None chooses
      when the program is lowered.
    group: rows of one.
    rows: arrays of all rows, G * group of them.
    *per_group: arrays with G entries.

  Returns:
    Pytree of arrays of all rows.

  Example:
    >>> def add(implementation, arrays):
    ...   x, offset = arrays
    ...   return x + offset[:, None]
    >>> x, offset = jnp.arange(4), jnp.array([10, 20])
    >>> jax.jit(lambda x: each_group(add, "xla", 2, (x,), offset))(x).tolist()
    [10, 11, 22, 23]
  """
  rows = (x.reshape(-1, group, *x.shape[1:]) for x in rows)
  arrays = *rows, *per_group
  num_groups = arrays[0].shape[0]

  def run(implementation, at_once, *arrays):
    def cut(x):
      missing = [(0, -num_groups % at_once)] + [(0, 0)] * (x.ndim - 1)
      x = jnp.pad(x, missing, mode="edge")
      return x.reshape(-1, at_once, *x.shape[1:])

    found = jax.lax.map(
      functools.partial(function, implementation), tuple(map(cut, arrays))
    )
    return jax.tree.map(
      lambda x: x.reshape(-1, *x.shape[3:])[: num_groups * group], found
    )

  alone = functools.partial(run, "xla", 1)
  together = functools.partial(run, implementation, _AT_ONCE)
  if implementation is not None:
    kernel = implementation.startswith("pallas")
    return (together if kernel else alone)(*arrays)
  branches = {"default": alone, "tpu": together}
  if hopper.on_hopper():
    branches["cuda"] = together
  return jax.lax.platform_dependent(*arrays, **branches)


def read_between(
  q: Float[Array, "c n d"],
  k: Float[Array, "c m d"],
  v: Float[Array, "c m e"],
  first: Int[Array, "c n"],
  last: Int[Array, "c n"],
  position: Int[Array, "c m"],
  *,
  largest_tile: int = 512,
  implementation: Implementation | None = None,
) -> RuleAttention:
  """Attention of rows to the keys whose positions lie between two limits.

  Args:
    q: rows of c groups.
    k: keys of each group, in any order.
    v: values.
    first: the first position that a row reads.
    last: the last one; nothing is read where it comes before the first.
    position: of the keys.
    largest_tile: rows and keys of a tile of "xla", at most.
    implementation: see `rule_attention`.

  Returns:
    float32 arrays [c, n, ...].

  Example:
    >>> x = jnp.arange(3.0).reshape(1, 3, 1)
    >>> place = jnp.arange(3)[None]
    >>> found = read_between(0 * x, x, x, 0 * place, place, place)
    >>> found.out.ravel().tolist()
    [0.0, 0.5, 1.0]

  Cost: see `rule_attention`; blocks of keys that no row of a block reads are
  left out.
  """
  readers = mask_rules.tokens(q.shape[1], level=first, position=last)
  read = mask_rules.tokens(k.shape[1], position=position)
  found = rule_attention(
    *(x[:, None] for x in (q, k, v)),
    _between,
    readers,
    read,
    block_size=min(largest_tile, q.shape[1]),
    implementation=implementation,
  )
  return jax.tree.map(lambda x: x[:, 0], found)


def _between(reader, read):
  """The keys from `level` of a row to its `position`."""
  return (read.position >= reader.level) & (read.position <= reader.position)

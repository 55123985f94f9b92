"""Contracts of attention over many devices, with a mapped axis for them.

The harness cuts examples over real devices; those of the ring are the mapped
axis 1, which `ppermute` takes for an axis of a mesh. Gradients are not asked
for here: jax traces a custom backward pass where a mapped axis has no name any
more. Under `shard_map` it has; see tests/parallel.
"""

import functools

import jax
import numpy as np

from tests.contracts.harness import Case, all_checks
from tokjax.parallel.ring_attention import ring_attention
from tokjax.parallel.token_ring import token_ring


def over_axis_1(ring, **settings):
  ring = functools.partial(ring, axis_name="seq", causal=True, **settings)

  def function(queries, keys, values, segment_ids):
    def local(queries, keys, values, segment_ids):
      return ring(queries, keys, values, segment_ids=segment_ids)

    return jax.vmap(local, in_axes=1, out_axes=1, axis_name="seq")(
      queries, keys, values, segment_ids
    )

  return function


def inputs(seed):
  rng = np.random.default_rng(seed)

  def normal(heads):  # [B, P, heads, n, d]
    return rng.normal(size=(8, 2, heads, 4, 4)).astype(np.float32)

  ids = np.zeros((8, 2, 4), np.int32)
  ids[:, 0, 2:] = -1  # the end of the sequence, in zigzag order
  return normal(2), normal(1), normal(1), ids


CASES = [
  Case(
    name,
    function,
    inputs,
    batched=(0, 1, 2, 3),
  )
  for name, function in {
    "ring_attention": over_axis_1(ring_attention, rotate="both"),
    "token_ring": over_axis_1(token_ring),
  }.items()
]


@all_checks(CASES)
def test_contract(check, case):
  check(case)

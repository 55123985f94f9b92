"""What a device computes for another, and its transpose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.parallel import attention_blocks as blocks
from tokjax.parallel import attention_meetings as meetings


def example(num_rows=12, num_keys=12):
  rng = np.random.default_rng(0)

  def normal(heads, rows, width):
    return rng.normal(size=(2, heads, rows, width)).astype(np.float32)

  queries = blocks.Queries(normal(4, num_rows, 4), None)
  keys = blocks.Keys(normal(2, num_keys, 4), normal(2, num_keys, 6), None)
  return queries, keys, jnp.asarray(normal(4, num_rows, 6))


@pytest.mark.parametrize(
  ("causal", "layout", "num_keys"),
  [(True, "zigzag", 8), (True, "contiguous", 12), (False, "zigzag", 12)],
)
def test_pull_is_the_transpose_of_read(causal, layout, num_keys):
  """Also for some of the keys, and for chunks that do not divide the rows."""
  queries, keys, d_out = example(num_keys=num_keys)
  pattern = meetings.Pattern(causal, layout, query_chunk=4)

  def check(read, pull):
    state, back = jax.vjp(read, queries, keys)
    zero = jnp.zeros_like(state.lse)
    want = back(type(state)(d_out, zero))
    asked = blocks.asked(queries, state.out, state.lse, d_out)
    d_rows, d_keys = pull(asked, keys)
    got = blocks.cotangents(queries, keys, d_rows, d_keys)
    return got, want

  @jax.jit
  def other(later):
    return check(
      lambda q, k: meetings.read(q, k, later, pattern),
      lambda a, k: meetings.pull(a, k, later, pattern),
    )

  @jax.jit
  def own():
    return check(
      lambda q, k: meetings.read_own(q, k, pattern),
      lambda a, k: meetings.pull_own(a, k, pattern),
    )

  pairs = [other(True), other(False)]
  pairs += [own()] if num_keys == 12 else []
  for got, want in pairs:
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
      np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)

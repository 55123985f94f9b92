"""Groups of rows against loops over them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.ops import attention
from tokjax.sparse import row_groups

NUM_GROUPS, GROUP, NUM_KEYS = 3, 4, 6


def inputs():
  normal = np.random.default_rng(0).normal
  sizes = GROUP, NUM_KEYS, NUM_KEYS
  return [
    jnp.asarray(normal(size=(NUM_GROUPS, size, 8)), jnp.float32)
    for size in sizes
  ]


def test_rows_read_the_keys_between_two_limits():
  q, k, v = inputs()
  random = np.random.default_rng(1)
  position = jnp.asarray(random.permuted(
    np.tile(np.arange(NUM_KEYS), (NUM_GROUPS, 1)), axis=1
  ))  # fmt: skip
  first = jnp.asarray(random.integers(0, 3, (NUM_GROUPS, GROUP)))
  last = jnp.asarray(random.integers(0, NUM_KEYS, (NUM_GROUPS, GROUP)))
  first = first.at[0, 0].set(NUM_KEYS)  # reads nothing
  found = jax.jit(functools.partial(row_groups.read_between, largest_tile=2))(
    q, k, v, first, last, position
  )
  mask = position[:, None] >= first[..., None]
  mask &= position[:, None] <= last[..., None]
  want = attention.attend_with_lse(*(x[:, None] for x in (q, k, v)), mask)
  np.testing.assert_allclose(found.out, want.out[:, 0], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(found.lse, want.lse[:, 0], rtol=1e-5, atol=1e-6)
  assert found.lse[0, 0] == -jnp.inf


# Three groups fill no eight: the kernels' way pads and cuts.
@pytest.mark.parametrize(
  ("implementation", "ways"),
  [
    ("xla", {("xla", 1)}),
    ("pallas_tpu", {("pallas_tpu", 8)}),
    (None, {("xla", 1), (None, 8)}),  # those of a CPU and of a TPU
  ],
)
def test_groups_are_put_together_again(implementation, ways):
  traced = set()

  def one(chosen, arrays):
    x, y, offset = arrays
    traced.add((chosen, len(x)))
    return {"sum": x + y[..., None] + offset[:, None, None], "same": y}

  q, _, _ = inputs()
  x, y = q.reshape(-1, 8), jnp.arange(NUM_GROUPS * GROUP, dtype=jnp.float32)
  offset = 100.0 * jnp.arange(NUM_GROUPS)
  found = jax.jit(
    lambda *rows: row_groups.each_group(
      one, implementation, GROUP, rows, offset
    )
  )(x, y)
  assert traced == ways
  want = x + y[:, None] + jnp.repeat(offset, GROUP)[:, None]
  np.testing.assert_array_equal(found["sum"], want)
  np.testing.assert_array_equal(found["same"], y)

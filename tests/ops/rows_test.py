"""Rows by index and sums by index, whole and over devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from tests.compiled import run
from tokjax.ops import rows


def inputs(seed=0):
  random = np.random.default_rng(seed)
  table = random.normal(size=(7, 3)).astype(np.float32)
  index = random.integers(-2, 9, (8, 5)).astype(np.int32)
  return table, index, random.normal(size=(8, 5, 3)).astype(np.float32)


def test_equal_loops():
  table, index, x = inputs()
  taken, sums = np.zeros((8, 5, 3)), np.zeros((7, 3))
  for where in np.ndindex(index.shape):
    if index[where] >= 0:
      taken[where] = table[min(index[where], 6)]
    if 0 <= index[where] < 7:
      sums[index[where]] += x[where]
  np.testing.assert_array_equal(run(rows.take_rows, table, index), taken)
  got = run(rows.sum_rows, x, index, num_rows=7)
  np.testing.assert_allclose(got, sums, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_over_eight_devices_with_gradients(kind):
  table, index, x = inputs()

  def both(table, index, x):
    taken = rows.take_rows(table, index)
    return taken, rows.sum_rows(x * taken, index, num_rows=7)

  def loss(table, index, x):
    return sum(jnp.sum(y**2) for y in both(table, index, x))

  functions = both, jax.grad(loss, argnums=(0, 2))
  want = [jax.jit(f)(table, index, x) for f in functions]
  mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
  with jax.set_mesh(mesh):
    index, x = jax.device_put(
      (index, x), jax.NamedSharding(mesh, jax.P("data"))
    )
    got = [jax.jit(f)(table, index, x) for f in functions]
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, got, want)
  assert got[0][0].sharding.spec[0] == "data"


def test_other_shapes_and_types():
  table, index, _ = inputs()
  whole = (np.arange(21).reshape(7, 3) / 4).astype(np.float32)
  got = run(rows.take_rows, jnp.asarray(whole, jnp.bfloat16), index[0, 0])
  assert got.shape == (3,) and got.dtype == jnp.bfloat16
  with pytest.raises(ValueError, match="num_rows must lie in"):
    rows.sum_rows(jnp.ones((2, 3)), jnp.zeros(2, jnp.int32), num_rows=0)


def test_draws_all_that_count_before_any_twice():
  table, _, _ = inputs()
  mask = np.array([1, 0, 1, 1, 0, 1, 0], bool)
  got = run(rows.draw_rows, jax.random.key(0), table, mask, number=6)
  want = {tuple(row) for row in table[mask].tolist()}
  assert {tuple(row) for row in got[:4].tolist()} == want
  np.testing.assert_array_equal(got[4:], got[:2])
  other = run(rows.draw_rows, jax.random.key(1), table, mask, number=6)
  assert not np.array_equal(got, other)

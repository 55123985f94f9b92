"""Functions of local shards on an Explicit mesh of eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.kernels import sharding


@pytest.fixture
def mesh():
  mesh = jax.make_mesh((4, 2), ("data", "model"))
  with jax.set_mesh(mesh):
    yield mesh


def test_first_axis(mesh):
  x = jnp.ones((8, 6, 2))
  for first in (None, "data", ("data", "model")):
    placed = jax.device_put(x, jax.P(first))
    assert sharding.first_axis("x", placed) == first
  assert sharding.first_axis("x", None) is None
  assert sharding.first_axis("x", jnp.float32(0)) is None
  placed = jax.device_put(x, jax.P("data", "model"))
  with pytest.raises(ValueError, match="x must be sharded over its first axis"):
    sharding.first_axis("x", placed)


def test_first_two_axes(mesh):
  x = jnp.ones((8, 6, 2))
  for spec in ((), ("data",), (None, "model"), ("data", "model")):
    placed = jax.device_put(x, jax.P(*spec))
    want = (*spec, None, None)[:2]
    assert sharding.first_two_axes("q", placed) == want
  placed = jax.device_put(x, jax.P(None, None, "model"))
  with pytest.raises(ValueError, match="q must be .* its first two axes only"):
    sharding.first_two_axes("q", placed)


def test_local_shards_are_those_that_the_specs_name(mesh):
  x = jax.device_put(jnp.arange(16.0).reshape(8, 2), jax.P(None, "model"))
  whole = jax.device_put(jnp.arange(8.0), jax.P("data"))
  seen = []

  def local(x, absent, whole):
    assert absent is None
    seen.append((x.shape, whole.shape))
    return x + jnp.sum(whole), {"rows": x[:, 0]}

  specs = (jax.P("data"), jax.P("data"), jax.P())
  total, rest = jax.jit(
    lambda x, whole: sharding.over_shards(
      local, (x, None, whole), specs, jax.P("data")
    )
  )(x, whole)
  assert set(seen) == {((2, 2), (8,))}
  np.testing.assert_array_equal(total, np.arange(16.0).reshape(8, 2) + 28)
  np.testing.assert_array_equal(rest["rows"], np.arange(0, 16, 2))
  assert total.sharding.spec[0] == "data"

"""Means of a batch, also one that lies on several devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from tests.compiled import compiled
from tokjax.tokenizers import measures

means = compiled(measures)


def over_devices(function, *arrays):
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  mapped = jax.shard_map(
    functools.partial(function, axis_name="data"),
    mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P(),
  )  # fmt: skip
  return jax.jit(mapped)(*arrays)


def test_masked_mean_is_that_of_what_counts_on_all_devices():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(8, 3)).astype(np.float32)
  mask = rng.random((8, 3)) < 0.3
  assert means.masked_mean(x).item() == pytest.approx(x.mean(), rel=1e-5)
  want = x[mask].mean()
  assert means.masked_mean(x, mask).item() == pytest.approx(want, rel=1e-5)
  assert means.masked_mean(x, mask & False).item() == 0
  got = over_devices(measures.masked_mean, x, mask)
  assert got.item() == pytest.approx(want, rel=1e-5)
  got = over_devices(lambda x, axis_name: measures.masked_mean(
    x, axis_name=axis_name), x)  # fmt: skip
  assert got.item() == pytest.approx(x.mean(), rel=1e-5)


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_pixel_loss_is_in_float32(kind):
  rng = np.random.default_rng(0)
  images, output = (
    jnp.asarray(rng.uniform(-1, 1, (8, 4, 4, 3)), jnp.bfloat16)
    for _ in range(2)
  )
  error = np.abs(np.float64(images) - np.float64(output))
  want = (error if kind == "l1" else error**2).mean()
  found = means.pixel_loss(images, output, kind)
  assert found.dtype == jnp.float32
  assert found.item() == pytest.approx(want, rel=1e-5)
  judged = functools.partial(measures.pixel_loss, kind=kind)
  assert over_devices(judged, images, output).item() == pytest.approx(want)
  with pytest.raises(ValueError, match="output must have the shape of images"):
    measures.pixel_loss(images, output[:1], kind)
  with pytest.raises(ValueError, match="pixel_loss must be one of"):
    measures.pixel_loss(images, output, "l3")

"""Contrast of two views against a loop, on one device and on eight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import compiled, run
from tokjax.ops import contrastive as module

contrastive = compiled(module)


def views(batch=8, width=4):
  random = np.random.default_rng(0)
  return random.normal(size=(2, batch, width)).astype(np.float32)


def loop(x, y, keep, temperature, smoothing):
  x, y = (z[keep].astype(np.float64) for z in (x, y))
  x, y = (z / np.linalg.norm(z, axis=-1, keepdims=True) for z in (x, y))
  total, n = 0, len(x)
  for logits in (x @ y.T / temperature, y @ x.T / temperature):
    for i in range(n):
      target = np.full(n, smoothing / n)
      target[i] += 1 - smoothing
      log_p = logits[i] - np.log(np.exp(logits[i]).sum())
      total -= target @ log_p / (2 * n)
  return total


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equals_a_loop(smoothing):
  x, y = views()
  keep = np.array([1, 1, 0, 1, 1, 1, 0, 1], bool)
  x[~keep] = np.nan
  got = contrastive.contrastive_loss(
    x, y, keep, temperature=0.2, label_smoothing=smoothing
  )
  want = loop(x, y, keep, 0.2, smoothing)
  assert float(got) == pytest.approx(want, rel=1e-5)


def test_no_row_counts():
  x, y = views()
  loss = functools.partial(module.contrastive_loss, mask=jnp.zeros(8, bool))
  value, gradient = run(jax.value_and_grad(loss), x, y)
  assert value == 0 and not np.any(gradient)


def test_over_eight_devices_equals_one():
  """Value and gradients: of both views and of the temperature."""
  x, y = views(16)
  keep = np.random.default_rng(1).random(16) < 0.7
  settings = {"label_smoothing": 0.1}

  def loss(x, y, keep, t, **more):
    return module.contrastive_loss(
      x, y, keep, temperature=t, **settings, **more
    )

  want = jax.jit(jax.value_and_grad(loss, (0, 1, 3)))(x, y, keep, 0.3)
  mesh = jax.make_mesh((8,), ("data",))
  rows = jax.P("data")
  local = jax.shard_map(
    functools.partial(loss, axis_name="data"),
    mesh=mesh,
    in_specs=(rows, rows, rows, jax.P()),
    out_specs=jax.P(),
  )
  got = jax.jit(jax.value_and_grad(local, (0, 1, 3)))(
    *jax.device_put((x, y, keep), jax.NamedSharding(mesh, rows)), 0.3
  )
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
    jax.device_get(got),
    jax.device_get(want),
  )


@pytest.mark.unchecked
def test_errors():
  x = jnp.ones((2, 3))
  with pytest.raises(ValueError, match="x_rows=2, y_rows=3"):
    module.contrastive_loss(x, jnp.ones((3, 3)))
  with pytest.raises(ValueError, match="x_width=3, y_width=2"):
    module.contrastive_loss(x, jnp.ones((2, 2)))
  with pytest.raises(ValueError, match="label_smoothing must lie in"):
    module.contrastive_loss(x, x, label_smoothing=2.0)

"""Depthwise convolution against loops, and the two ways to compute it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import run
from tokjax.ops import depthwise


def arrays(rows, columns):
  random = np.random.default_rng(0)
  x = random.normal(size=(2, 4, 5, 3)).astype(np.float32)
  return x, random.normal(size=(rows, columns, 1, 3)).astype(np.float32)


@pytest.mark.parametrize("sides", [(3, 3), (5, 1)])
def test_equals_loops(sides):
  x, kernel = arrays(*sides)
  want = np.zeros(x.shape)
  for at in np.ndindex(x.shape):
    b, y, z, c = at
    for i, j in np.ndindex(sides):
      row, column = y + i - sides[0] // 2, z + j - sides[1] // 2
      if 0 <= row < 4 and 0 <= column < 5:
        want[at] += float(x[b, row, column, c]) * kernel[i, j, 0, c]
  got = run(depthwise.depthwise_conv, x, kernel)
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_is_the_convolution_of_xla_elsewhere():
  """With its gradients; this machine has a CPU only."""
  x, kernel = arrays(3, 5)

  def both(function, x, kernel):
    found, back = jax.vjp(function, x, kernel)
    return found, *back(jnp.sin(found))

  for got, want in zip(
    run(both, depthwise.depthwise_conv, x, kernel),
    run(both, depthwise._convolved, x, kernel),
    strict=True,
  ):
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.unchecked
def test_errors_name_the_argument():
  x, kernel = arrays(3, 3)
  with pytest.raises(ValueError, match="kernel_rows_minus_1 must be a mult"):
    depthwise.depthwise_conv(x, kernel[:2])
  with pytest.raises(ValueError, match="kernel_channels=3, channels=2"):
    depthwise.depthwise_conv(x[..., :2], kernel)

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.ops.similarity import safe_normalize


def test_length_is_one_and_direction_stays():
  x = np.random.default_rng(0).standard_normal((4, 7), dtype=np.float32)
  want = x / np.linalg.norm(x, axis=-1, keepdims=True)
  got = safe_normalize(jnp.asarray(x))
  np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e25, 1e37])
def test_tiny_and_huge_vectors(scale):
  x = jnp.array([3.0, 4.0]) * (scale / 4)
  want = [0.6, 0.8] if scale > 1e-12 else [0.0, 0.0]
  np.testing.assert_allclose(safe_normalize(x), want, rtol=1e-6)


def test_gradient_at_zero_is_zero_and_elsewhere_the_projection():
  x = jnp.array([[0.0, 0.0], [3.0, 4.0]])
  g = jnp.array([[1.0, 2.0], [1.0, 2.0]])
  gradient = jax.vjp(safe_normalize, x)[1](g)[0]
  np.testing.assert_array_equal(gradient[0], 0)
  unit = np.array([0.6, 0.8])
  want = (np.array([1, 2]) - unit * (unit @ [1, 2])) / 5
  np.testing.assert_allclose(gradient[1], want, rtol=1e-5)


def test_bfloat16_comes_back_as_bfloat16():
  assert safe_normalize(jnp.ones(3, jnp.bfloat16)).dtype == jnp.bfloat16

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import compiled
from tokjax.ops import pooling

pooling = compiled(pooling)


def test_worked_example():
  x = jnp.array([[[1.0, 2.0], [3.0, 6.0], [50.0, 50.0]]])
  got = pooling.mean_pool(x, jnp.array([[True, True, False]]))
  np.testing.assert_array_equal(got, [[2.0, 4.0]])


def test_no_mask_is_the_mean():
  x = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
  np.testing.assert_allclose(
    pooling.mean_pool(jnp.asarray(x)), x.mean(1), rtol=1e-5
  )


def test_padding_has_no_influence_and_no_gradient():
  x = jnp.array([[[1.0], [jnp.nan]], [[jnp.nan], [jnp.nan]]])
  mask = jnp.array([[True, False], [False, False]])
  np.testing.assert_array_equal(pooling.mean_pool(x, mask), [[1.0], [0.0]])
  gradient = jax.grad(lambda x: jnp.sum(pooling.mean_pool(x, mask)))(x)
  np.testing.assert_array_equal(gradient[..., 0], [[1.0, 0.0], [0.0, 0.0]])


def test_bfloat16_sums_in_float32():
  # 256 + 1 is not a bfloat16: a sum in that dtype would stay at 256.
  x = jnp.ones((1, 512, 1), jnp.bfloat16)
  got = pooling.mean_pool(x)
  assert got.dtype == jnp.bfloat16 and float(got[0, 0]) == 1.0


@pytest.mark.unchecked
def test_error_names_both_sizes():
  with pytest.raises(ValueError, match="features_tokens=3, mask_tokens=4"):
    pooling.mean_pool(jnp.zeros((1, 3, 2)), jnp.ones((1, 4), bool))

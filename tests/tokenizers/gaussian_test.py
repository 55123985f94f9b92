"""Gaussian latents: halves, draws, divergence and its two conventions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import run
from tokjax.tokenizers import gaussian
from tokjax.tokenizers.gaussian import Gaussian


def latents(shape=(2, 3, 4), seed=0):
  random = np.random.default_rng(seed)
  return Gaussian(
    random.normal(size=shape).astype(np.float32),
    random.normal(size=shape).astype(np.float32),
  )


def test_halves_of_features_within_bounds():
  x = np.array([[1.0, 2, -99, 99], [3, 4, 5, 6]], np.float32)
  found = run(gaussian.from_features, jnp.asarray(x, jnp.bfloat16))
  assert found.mean.dtype == found.log_variance.dtype == jnp.float32
  np.testing.assert_array_equal(found.mean, x[:, :2])
  np.testing.assert_array_equal(found.log_variance, [[-30, 20], [5, 6]])


def test_draws_have_the_mean_and_the_deviation():
  latent = Gaussian(jnp.full((20_000, 2), 3.0), jnp.full((20_000, 2), 1.4))
  drawn = run(gaussian.sample, jax.random.key(0), latent)
  np.testing.assert_allclose(drawn.mean(0), 3, atol=0.05)
  np.testing.assert_allclose(drawn.std(0), np.exp(0.7), rtol=0.02)


def test_gradients_of_a_draw_reach_mean_and_variance():
  latent, key = latents(), jax.random.key(1)
  drawn = run(gaussian.sample, key, latent)
  total = lambda latent: jnp.sum(gaussian.sample(key, latent))  # noqa: E731
  got = jax.jit(jax.grad(total))(latent)
  np.testing.assert_array_equal(got.mean, np.ones_like(latent.mean))
  # d (exp(v / 2) e) / dv is half of what the noise added.
  want = (drawn - latent.mean) / 2
  np.testing.assert_allclose(got.log_variance, want, atol=1e-5)


def test_divergence_is_the_integral():
  """Against the mean of log p - log q over a fine grid, in float64."""
  latent = Gaussian(jnp.array([[0.7]]), jnp.array([[-0.4]]))
  deviation = np.exp(-0.2)
  x = np.linspace(-12, 12, 200_001)
  p = np.exp(-(((x - 0.7) / deviation) ** 2) / 2) / deviation
  p /= p.sum()
  log_p = -(((x - 0.7) / deviation) ** 2) / 2 - np.log(deviation)
  want = (p * (log_p + x**2 / 2)).sum()
  got = run(gaussian.kl_divergence, latent)
  assert float(got) == pytest.approx(want, rel=1e-4)


def test_two_conventions_differ_by_the_size_of_an_example():
  one = Gaussian(jnp.ones((2, 3, 4)), jnp.zeros((2, 3, 4)))
  assert run(gaussian.kl_divergence, one) == 0.5
  latent = latents()
  mean = run(gaussian.kl_divergence, latent)
  total = run(gaussian.kl_divergence, latent, per="example")
  assert float(total) == pytest.approx(12 * float(mean), rel=1e-5)
  nothing = Gaussian(jnp.zeros((2, 3, 4)), jnp.zeros((2, 3, 4)))
  assert run(gaussian.kl_divergence, nothing) == 0


@pytest.mark.parametrize("per", ["element", "example"])
def test_masked_tokens_change_nothing_and_pass_no_gradient(per):
  mean, log_variance = latents((3, 4, 2))
  mask = np.array([[1, 1, 0, 0], [1, 0, 1, 1], [0, 0, 0, 0]], bool)
  function = functools.partial(gaussian.kl_divergence, per=per)
  both = jax.jit(jax.value_and_grad(function))
  want, _ = both(Gaussian(mean, log_variance), mask)
  mean[~mask], log_variance[~mask] = np.nan, 200
  got, gradient = both(Gaussian(mean, log_variance), mask)
  assert float(got) == float(want)
  for x in gradient:
    assert np.all(np.isfinite(x)) and not np.any(x[~mask])
  terms = (mean**2 + np.exp(log_variance) - 1 - log_variance)[mask] / 2
  number = mask.sum() * 2 if per == "element" else 2
  assert float(got) == pytest.approx(terms.sum() / number, rel=1e-5)


@pytest.mark.unchecked
def test_errors():
  with pytest.raises(ValueError, match="width_of_x must be a multiple of 2"):
    gaussian.from_features(jnp.ones((2, 3)))
  with pytest.raises(ValueError, match="per must be one of"):
    gaussian.kl_divergence(latents(), per="token")

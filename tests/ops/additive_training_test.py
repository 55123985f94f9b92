"""Books by least squares, composite books, and both in turns with codes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import compiled
from tokjax.ops import additive_codes, additive_training, quantize

training, codes_of = compiled(additive_training), compiled(additive_codes)
quantize = compiled(quantize)

M, K, D, N = 3, 4, 6, 80


def points(seed=0):
  random = np.random.default_rng(seed)
  x = random.normal(size=(N, D)) @ random.normal(size=(D, D))
  return (x / np.sqrt(np.mean(np.sum(x**2, 1)))).astype(np.float32)


def codes(seed=1):
  return np.random.default_rng(seed).integers(0, K, (N, M)).astype(np.int32)


def books(seed=2):
  random = np.random.default_rng(seed)
  return random.normal(size=(M, K, D)).astype(np.float32)


def marks(codes):
  """B, [N, M K]."""
  hot = np.eye(K)[codes] * (codes >= 0)[..., None]
  return hot.reshape(len(codes), -1)


def distortion(books, x, codes):
  left = x - marks(codes) @ np.asarray(books, float).reshape(-1, D)
  return np.sum(left**2, 1).mean()


def test_from_zeros_it_is_ridge_regression():
  x, k = points(), codes()
  k[3, 1] = -1
  got = training.aq_update(np.zeros((M, K, D), np.float32), x, k)
  b = marks(k)
  ridge = 1e-4 * np.trace(b.T @ b) / (M * K)
  want = np.linalg.solve(b.T @ b + ridge * np.eye(M * K), b.T @ x.astype(float))
  np.testing.assert_allclose(
    marks(k) @ np.asarray(got, float).reshape(-1, D), b @ want, atol=1e-3
  )
  np.testing.assert_allclose(got.reshape(-1, D), want, atol=1e-2)


def test_the_solution_has_no_gradient_and_unused_codes_stay():
  x, k, old = points(), codes(), books()
  k[k[:, 0] == 2, 0] = 1
  new = training.aq_update(old, x, k)
  new = training.aq_update(new, x, k)  # what the ridge held back
  left = x - marks(k) @ np.asarray(new, float).reshape(-1, D)
  slope = marks(k).T @ left / N
  assert np.abs(slope).max() < 1e-5 * np.abs(x).max()
  np.testing.assert_array_equal(new[0, 2], old[0, 2])
  best = np.linalg.lstsq(marks(k), x.astype(float), rcond=None)[0]
  best = np.sum((x - marks(k) @ best) ** 2, 1).mean()
  np.testing.assert_allclose(distortion(new, x, k), best, rtol=1e-5)
  assert best < distortion(old, x, k)


def test_rows_without_codes_have_no_influence():
  x, k, old = points(), codes(), books()
  want = training.aq_update(old, x[:60], k[:60])
  x[60:], k[60:] = np.nan, -1
  got = training.aq_update(old, x, k)
  np.testing.assert_allclose(got, want, atol=1e-5)
  want = training.cq_update(old, x[:60], k[:60], cross_weight=0.1)
  got = training.cq_update(old, x, k, cross_weight=0.1)
  np.testing.assert_allclose(got, want, atol=1e-3)


def objective(e, x, k, weight):
  spread = codes_of.aq_cross_term(e, k).spread
  return distortion(e, x, k) + weight * float(spread) ** 2


def test_composite_books_without_a_weight_are_least_squares():
  x, k = points(), codes()
  want = training.aq_update(books(), x, k)
  got = training.cq_update(books(), x, k, cross_weight=0.0, num_steps=1)
  # Books are only determined up to what moves from one to another.
  want = codes_of.aq_decode(want, k)
  np.testing.assert_allclose(codes_of.aq_decode(got, k), want, atol=1e-3)


def test_composite_books_hold_the_cross_term():
  x, k = points(), codes()
  e = training.aq_update(books(), x, k)
  values, spreads = [objective(e, x, k, 10.0)], []
  for steps in (1, 4, 16):
    new = training.cq_update(e, x, k, cross_weight=10.0, num_steps=steps)
    values.append(objective(new, x, k, 10.0))
    spreads.append(float(codes_of.aq_cross_term(new, k).spread))
  assert np.all(np.diff(values) < 0)
  assert spreads[-1] < 0.5 * float(codes_of.aq_cross_term(e, k).spread)


def start():
  x, key = points(), jax.random.key(0)
  book = quantize.pq_train(key, x, group_size=D // M, num_centroids=K)
  k = np.asarray(quantize.pq_encode(book, x)).astype(np.int32)
  return x, np.asarray(codes_of.aq_from_pq(book)), k


@functools.cache
def fitted(cross_weight=None):
  x, e, k = start()
  return x, training.aq_fit(
    jax.random.key(1), x, e, k, num_iterations=6, num_rounds=2,
    cross_weight=cross_weight,
  )  # fmt: skip


def test_fitting_never_gets_worse_than_the_product_codes_it_starts_from():
  _, e, k = start()
  x, fit = fitted()
  assert fit.distortion.shape == (7,)
  np.testing.assert_allclose(fit.distortion[0], distortion(e, x, k), rtol=1e-5)
  assert np.all(np.diff(fit.distortion) <= 1e-5 * fit.distortion[0])
  assert fit.distortion[-1] < 0.9 * fit.distortion[0]
  got = distortion(fit.codebooks, x, np.asarray(fit.codes))
  np.testing.assert_allclose(fit.distortion[-1], got, rtol=1e-4)


def test_composite_fitting_trades_error_for_a_constant_cross_term():
  _, free = fitted()
  x, fit = fitted(cross_weight=10.0)
  value = fit.distortion + 10 * fit.cross_spread**2
  assert np.all(np.diff(value) <= 1e-5 * value[0])
  assert value[-1] < 0.95 * value[0]
  assert fit.cross_spread[0] < 1e-5  # of product codes
  assert fit.cross_spread[-1] < 0.2 * free.cross_spread[-1]
  assert free.distortion[-1] < fit.distortion[-1] < fit.distortion[0]
  np.testing.assert_allclose(
    fit.cross_spread[-1],
    codes_of.aq_cross_term(fit.codebooks, fit.codes).spread,
    rtol=1e-3,
  )
  mean = codes_of.aq_cross_term(fit.codebooks, fit.codes).mean
  queries = x[:20]
  short = codes_of.aq_squared_norms(fit.codebooks, fit.codes, mean)
  exact = codes_of.aq_squared_norms(fit.codebooks, fit.codes)
  search = functools.partial(codes_of.aq_distances, fit.codebooks, fit.codes)
  wrong = search(short, queries) - search(exact, queries)
  np.testing.assert_allclose(np.std(wrong), fit.cross_spread[-1], rtol=1e-2)


@pytest.mark.unchecked
def test_errors():
  x, e, k = start()
  with pytest.raises(ValueError, match="points_width=5, codebooks_width=6"):
    training.aq_update(e, x[:, :5], k)
  with pytest.raises(ValueError, match="points=80, codes=79"):
    training.aq_fit(jax.random.key(0), x, e, k[:79])
  with pytest.raises(ValueError, match="pairs_of_codes must lie in"):
    jax.eval_shape(
      additive_training.aq_update,
      jnp.zeros((1, 50_000, 1)), jnp.zeros((2, 1)), jnp.zeros((2, 1), int),
    )  # fmt: skip

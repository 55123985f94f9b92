import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import compiled, run
from tokjax.ops import estimators as plain

estimators = compiled(plain)

D = 4


def pairs(seed=0, count=60):
  """x, q and cotangents; then rows where x or q is special."""
  rng = np.random.default_rng(seed)
  x, q, g = rng.normal(size=(3, count, D))
  special = np.array([1.0, -2.0, 0.5, 3.0])
  x[:6], q[:6] = special, special
  q[0] *= -2  # opposite
  q[1] *= -1 + 1e-6 * np.arange(D)  # nearly opposite
  x[2] = 0
  q[3] = 0
  x[4] *= 1e-8
  x[5] *= 1e9
  return [a.astype(np.float32) for a in (x, q, g)]


def pulled(function, *args):
  """Value, and the cotangents that reach the first two arguments."""

  def both(x, q, g, *rest):
    value, pull = jax.vjp(lambda x, q: function(x, q, *rest), x, q)
    return value, *pull(g)

  return [np.asarray(a) for a in run(both, *args)]


def length(x):
  return np.linalg.norm(x, axis=-1, keepdims=True)


def unit(x):
  return x / np.where(length(x) > 0, length(x), 1)


def test_straight_through_is_q_and_the_identity():
  x, q, g = pairs()
  value, to_x, to_q = pulled(plain.straight_through, x, q, g)
  np.testing.assert_array_equal(value, q)
  np.testing.assert_array_equal(to_x, g)
  np.testing.assert_array_equal(to_q, np.zeros_like(q))


def test_rotation_worked_example():
  x = np.array([[3, 4], [3, 4]], np.float32)
  q = np.array([[2, 0], [2, 0]], np.float32)
  value, to_x, _ = pulled(plain.rotate_to, x, q, np.eye(2, dtype=np.float32))
  np.testing.assert_array_equal(value, q)
  np.testing.assert_allclose(
    to_x, [[0.24, 0.32], [-0.32, 0.24]], rtol=0, atol=1e-7
  )


def test_rotation_is_s_times_r_transposed_and_keeps_angles():
  x, q, g = pairs()
  value, to_x, to_q = pulled(plain.rotate_to, x, q, g)
  np.testing.assert_array_equal(value, q)
  np.testing.assert_array_equal(to_q, np.zeros_like(q))
  for i in range(6, len(x)):
    u, v = (unit(a[i].astype(np.float64)) for a in (x, q))
    w = unit(u + v)
    turn = np.eye(D) - 2 * np.outer(w, w) + 2 * np.outer(v, u)
    np.testing.assert_allclose(turn @ turn.T, np.eye(D), atol=1e-12)
    scale = np.linalg.norm(q[i]) / np.linalg.norm(x[i])
    np.testing.assert_allclose(
      to_x[i], scale * turn.T @ g[i], atol=1e-5 * scale
    )
  others = slice(6, None)
  np.testing.assert_allclose(
    np.sum(unit(to_x) * unit(x), axis=-1)[others],
    np.sum(unit(g) * unit(q), axis=-1)[others],
    atol=1e-5,
  )


def test_rotation_of_opposite_zero_and_far_vectors():
  x, q, g = pairs()
  value, to_x, _ = pulled(plain.rotate_to, x, q, g)
  np.testing.assert_array_equal(value, q)
  u = unit(x)
  mirrored = g - 2 * np.sum(g * u, axis=-1, keepdims=True) * u
  np.testing.assert_allclose(to_x[0], 2 * mirrored[0], rtol=1e-5)
  rows = [1, 4, 5]  # any rotation keeps lengths
  want = length(g[rows]) * length(q[rows]) / length(x[rows])
  np.testing.assert_allclose(length(to_x[rows]), want, rtol=1e-5)
  np.testing.assert_array_equal(to_x[2], g[2])
  np.testing.assert_array_equal(to_x[3], np.zeros(D))


def test_directional_keeps_the_distance_and_has_closed_gradients():
  x, q, g = pairs()
  q[6] = x[6]
  x[5] = x[6]  # far vectors have no digits left for the distance

  def moved(x, q, key):
    return plain.directional(key, x, q)

  z, to_x, to_q = pulled(moved, x, q, g, jax.random.key(1))
  distance = length(q - x)
  np.testing.assert_allclose(length(z - x), distance, rtol=1e-5, atol=1e-6)
  safe = np.where(distance > 0, distance, 1)
  along = np.sum(g * (z - x) / safe, axis=-1, keepdims=True) * (q - x) / safe
  np.testing.assert_allclose(to_q, along, atol=1e-5)
  np.testing.assert_allclose(to_x, g - along, atol=1e-5)
  np.testing.assert_array_equal(z[6], x[6])
  assert np.abs(z - q).max() > 1e-3


def test_directional_noise_has_the_variance_asked_for():
  x = np.zeros((4000, 2), np.float32)
  q = np.broadcast_to(np.float32([1000, 0]), x.shape)
  z = estimators.directional(jax.random.key(0), x, q, variance=4.0)
  np.testing.assert_allclose(np.std(z[:, 1]), 2, rtol=0.05)
  z = estimators.directional(jax.random.key(0), x, q, variance=0.0)
  np.testing.assert_allclose(z, q, rtol=1e-6)


def choices(seed=0, count=30, num_codes=5):
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(count, num_codes)).astype(np.float32)
  logits[0, 3] = -np.inf
  book = rng.normal(size=(num_codes, 3)).astype(np.float32)
  return logits, book, rng.normal(size=(count, 3)).astype(np.float32)


def check_soft_gradient(got, index, soft, slope, book, g):
  """Hard forward, softmax backward; the book learns in its picked rows."""
  codes, to_logits, to_book = got
  np.testing.assert_array_equal(codes, book[index])
  p = np.exp(soft - soft.max(axis=-1, keepdims=True))
  p /= p.sum(axis=-1, keepdims=True)
  worth = g @ book.T
  mean = np.sum(p * worth, axis=-1, keepdims=True)
  np.testing.assert_allclose(to_logits, slope * p * (worth - mean), atol=2e-5)
  want = np.zeros_like(book)
  np.add.at(want, index, g)
  np.testing.assert_allclose(to_book, want, atol=1e-5)


def test_index_backpropagation_is_hard_forward_and_soft_backward():
  logits, book, g = choices()
  got = pulled(
    lambda logits, book: plain.index_backpropagation(logits, book).codes,
    logits,
    book,
    g,
  )
  index = logits.argmax(axis=-1)
  check_soft_gradient(got, index, logits, 1, book, g)
  coded = estimators.index_backpropagation(logits, book)
  np.testing.assert_array_equal(coded.index, index)
  assert coded.index.dtype == jnp.int32


def test_index_backpropagation_reaches_every_code():
  _, book, g = choices()

  def total(book, x):
    codes = plain.index_backpropagation(x @ book.T, book).codes
    return jnp.sum(codes * codes)

  gradient = run(jax.grad(total), book, g[:1])
  assert np.all(np.abs(gradient).max(axis=-1) > 0)


def test_gumbel_codes_are_hard_forward_and_soft_backward():
  logits, book, g = choices()
  key = jax.random.key(3)
  noisy = logits + np.asarray(run(jax.random.gumbel, key, logits.shape))

  def drawn(logits, book, key):
    return plain.gumbel_codes(key, logits, book, temperature=0.5).codes

  got = pulled(drawn, logits, book, g, key)
  check_soft_gradient(got, noisy.argmax(axis=-1), noisy / 0.5, 2, book, g)


def test_gumbel_codes_are_drawn_from_the_softmax():
  p = np.array([0.5, 0.2, 0.3, 0.0])
  with np.errstate(divide="ignore"):
    logits = np.broadcast_to(np.log(p), (20_000, 4)).astype(np.float32)
  key, book = jax.random.key(0), np.eye(4, dtype=np.float32)
  coded = estimators.gumbel_codes(key, logits, book)
  np.testing.assert_allclose(np.mean(coded.codes, axis=0), p, atol=0.015)
  np.testing.assert_array_equal(np.argmax(coded.codes, -1), coded.index)


def test_bfloat16_gives_codes_in_bfloat16():
  x, q, _ = (a.astype(jnp.bfloat16) for a in pairs())

  def all_three(x, q):
    key = jax.random.key(0)
    moved = plain.directional(key, x, q)
    return plain.straight_through(x, q), plain.rotate_to(x, q), moved

  straight, turned, moved = run(all_three, x, q)
  np.testing.assert_array_equal(straight, q)
  np.testing.assert_array_equal(turned, q)
  assert moved.dtype == jnp.bfloat16


@pytest.mark.unchecked
@pytest.mark.parametrize("name", ["straight_through", "rotate_to"])
def test_shapes_are_checked(name):
  x = jnp.zeros((2, 3))
  with pytest.raises(ValueError, match=r"q must have the shape of x, \(2, 3"):
    jax.eval_shape(getattr(plain, name), x, x[:1])


@pytest.mark.unchecked
def test_choices_are_checked():
  key, x = jax.random.key(0), jnp.zeros((2, 3))
  with pytest.raises(ValueError, match="q must have the shape of x"):
    jax.eval_shape(plain.directional, key, x, x[0])
  with pytest.raises(ValueError, match="codebook must have one row for each"):
    jax.eval_shape(plain.index_backpropagation, x, x)
  with pytest.raises(ValueError, match="codebook must have one row for each"):
    jax.eval_shape(plain.gumbel_codes, key, x, x[0])

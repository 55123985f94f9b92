import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from tests.compiled import compiled
from tokjax.ops import sketching

sketching = compiled(sketching)


def vectors(seed=0, shape=(5, 12)):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def test_hyperplanes_fit_bfloat16():
  planes = sketching.init_hyperplanes(jax.random.key(0), (200, 50))
  np.testing.assert_array_equal(planes.astype(jnp.bfloat16), planes)
  assert (
    abs(float(planes.mean())) < 0.05 and abs(float(planes.std()) - 1) < 0.05
  )


def test_simhash_is_strict():
  bits = sketching.simhash_bits(jnp.array([[0.0, 1.0, -1.0]]), jnp.eye(3))
  np.testing.assert_array_equal(bits, [[False, True, False]])


def test_simhash_bits_differ_by_the_angle():
  planes = sketching.init_hyperplanes(jax.random.key(0), (2, 20000))
  angle = 0.7
  x = jnp.array([[1.0, 0.0], [np.cos(angle), np.sin(angle)]])
  bits = sketching.simhash_bits(x, planes)
  differ = float(jnp.mean(bits[0] != bits[1]))
  deviation = (angle / np.pi * (1 - angle / np.pi) / 20000) ** 0.5
  assert abs(differ - angle / np.pi) < 4 * deviation


def test_index_counts_in_binary():
  numbers = np.arange(32)
  bits = jnp.asarray(numbers[:, None] >> np.arange(5) & 1, bool)
  np.testing.assert_array_equal(sketching.bits_to_index(bits), numbers)
  none = sketching.bits_to_index(jnp.zeros((3, 0), bool))
  np.testing.assert_array_equal(none, [0, 0, 0])


@pytest.mark.parametrize("num_bits", [0, 1, 3, 5])
@pytest.mark.parametrize("num_tokens", [1, 6, 40])
def test_nearest_by_hamming_equals_a_search(num_bits, num_tokens):
  rng = np.random.default_rng(num_bits)
  cells = rng.integers(0, 2**num_bits, num_tokens)
  first = np.full(2**num_bits, num_tokens)
  for token in reversed(range(num_tokens)):
    first[cells[token]] = token
  got = sketching.nearest_by_hamming(jnp.asarray(first), num_tokens=num_tokens)
  for cell in range(2**num_bits):
    if first[cell] < num_tokens:
      assert int(got[cell]) == first[cell]
      continue
    distance = [bin(cell ^ other).count("1") for other in cells]
    assert int(got[cell]) == distance.index(min(distance))


def test_nearest_by_hamming_of_nothing():
  got = sketching.nearest_by_hamming(jnp.full((4, 8), 9), num_tokens=9)
  np.testing.assert_array_equal(got, np.full((4, 8), 9))


def test_sign_projection_equals_its_formula():
  x, signs = vectors(), sketching.init_signs(jax.random.key(0), (12, 3))
  want = np.asarray(x) @ np.asarray(signs) / np.sqrt(3)
  np.testing.assert_allclose(
    sketching.sign_projection(x, signs), want, atol=1e-5
  )


def test_sign_projection_is_unbiased():
  x, y = vectors(shape=(2, 12))
  signs = sketching.init_signs(jax.random.key(0), (12, 60000))
  # Every column is an estimate of its own; the mean over columns is <Px, Py>.
  px, py = sketching.sign_projection(jnp.stack([x, y]), signs)
  deviation = (
    float(jnp.linalg.norm(x) * jnp.linalg.norm(y)) * (2 / 60000) ** 0.5
  )
  assert abs(float(px @ py - x @ y)) < 4 * deviation


def test_count_sketch_worked_example():
  sketch = sketching.CountSketch(
    jnp.array([0, 1, 0, 1]), jnp.array([1, -1, -1, 1])
  )
  got = sketching.count_sketch(jnp.arange(1.0, 5.0), sketch, num_outputs=2)
  np.testing.assert_array_equal(got, [-2, 2])


@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12)])
def test_count_sketch_equals_its_matrix(shape):
  x = vectors(shape=shape)
  sketch = sketching.init_count_sketch(jax.random.key(0), (12,), num_outputs=5)
  matrix = sketching.sketch_matrix(sketch, num_outputs=5)
  assert np.abs(matrix).sum() == 12
  got = sketching.count_sketch(x, sketch, num_outputs=5)
  np.testing.assert_allclose(got, np.asarray(x) @ np.asarray(matrix), atol=1e-5)


def test_count_sketch_is_unbiased():
  xy = vectors(shape=(2, 12))
  draws = 20000
  sketches = sketching.init_count_sketch(
    jax.random.key(0), (draws, 12), num_outputs=4
  )

  def product(sketch):
    short = sketching.count_sketch(xy, sketch, num_outputs=4)
    return short[0] @ short[1]

  products = np.asarray(jax.lax.map(product, sketches, batch_size=1000))
  error = abs(products.mean() - float(xy[0] @ xy[1]))
  assert error < 4 * products.std() / draws**0.5


def test_gradients():
  x = vectors()
  signs = sketching.init_signs(jax.random.key(0), (12, 3))
  sketch = sketching.init_count_sketch(jax.random.key(0), (12,), num_outputs=5)
  for function in (
    lambda x: sketching.sign_projection(x, signs),
    lambda x: sketching.count_sketch(x, sketch, num_outputs=5),
  ):
    check_grads(jax.jit(function), (x,), order=1, modes=["rev"], rtol=1e-2)


@pytest.mark.unchecked
def test_errors():
  x = vectors()
  sketch = sketching.init_count_sketch(jax.random.key(0), (11,), num_outputs=5)
  with pytest.raises(ValueError, match="x_width=12, hyperplanes=11"):
    sketching.simhash_bits(x, jnp.ones((11, 2)))
  with pytest.raises(ValueError, match="x_width=12, signs=11"):
    sketching.sign_projection(x, jnp.ones((11, 2)))
  with pytest.raises(ValueError, match="x_width=12, index=11, sign=11"):
    sketching.count_sketch(x, sketch, num_outputs=5)
  with pytest.raises(ValueError, match="num_outputs must lie in 1"):
    sketching.init_count_sketch(jax.random.key(0), (3,), num_outputs=0)
  with pytest.raises(ValueError, match="num_cells must be one of 4, got 6"):
    sketching.nearest_by_hamming(jnp.zeros(6, jnp.int32), num_tokens=2)

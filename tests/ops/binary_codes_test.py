import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import compiled, run
from tokjax.ops import binary_codes as plain
from tokjax.ops import bit_indices

binary_codes = compiled(plain)

ORDERS = ["msb", "lsb"]


def features(num_bits, count=200, seed=0):
  x = np.random.default_rng(seed).normal(size=(count, num_bits))
  return x.astype(np.float32)


def value_and_pull(function, x, g):
  def both(x, g):
    coded, pull, index = jax.vjp(function, x, has_aux=True)
    return coded, pull(g)[0], index

  return run(both, x, g)


def corners(num_bits):
  return np.array(list(itertools.product([0, 1], repeat=num_bits))) * 2 - 1


def test_worked_example_in_both_orders():
  x = np.array([[0.3, 0.8, -1.2]], np.float32)
  for order, index in (("msb", 6), ("lsb", 3)):
    coded = binary_codes.lfq_quantize(x, bit_order=order)
    assert coded.index.tolist() == [index]
    np.testing.assert_array_equal(coded.codes, [[1, 1, -1]])
  zero = binary_codes.lfq_quantize(np.zeros((1, 3), np.float32), scale=0.5)
  np.testing.assert_array_equal(zero.codes, [[-0.5, -0.5, -0.5]])
  assert zero.index.tolist() == [0]


@pytest.mark.parametrize("order", ORDERS)
def test_every_code_is_its_own_code(order):
  index = np.arange(2**10, dtype=np.int32)
  codes = binary_codes.lfq_decode(index, num_bits=10, scale=2, bit_order=order)
  signs = corners(10) if order == "msb" else corners(10)[:, ::-1]
  np.testing.assert_array_equal(codes, 2 * signs)
  again = binary_codes.lfq_quantize(codes, scale=2, bit_order=order)
  np.testing.assert_array_equal(again.index, index)
  np.testing.assert_array_equal(again.codes, codes)
  sphere = binary_codes.bsq_decode(index, num_bits=10, bit_order=order)
  np.testing.assert_allclose(sphere, signs / np.sqrt(10), rtol=1e-6)
  again = binary_codes.bsq_quantize(sphere, bit_order=order)
  np.testing.assert_array_equal(again.index, index)
  np.testing.assert_array_equal(again.codes, sphere)


@pytest.mark.parametrize("num_bits", [31, 36, 70])
@pytest.mark.parametrize("order", ORDERS)
def test_wide_codes_round_trip(num_bits, order):
  x = features(num_bits)
  coded = binary_codes.bsq_quantize(x, bit_order=order)
  words = (200,) if num_bits == 31 else (200, -(-num_bits // 32))
  assert coded.index.shape == words
  np.testing.assert_array_equal(np.asarray(coded.codes) > 0, x > 0)
  settings = {"num_bits": num_bits, "bit_order": order}
  back = binary_codes.bsq_decode(coded.index, **settings)
  np.testing.assert_array_equal(back, coded.codes)
  bits = run(bit_indices.index_to_bits, coded.index, **settings)
  np.testing.assert_array_equal(bits, x > 0)


def test_scaling_the_features_leaves_the_index():
  x = features(12)
  want = binary_codes.lfq_quantize(x).index
  for scale in (1e-9, 1e9):
    scaled = (scale * x).astype(np.float32)
    np.testing.assert_array_equal(binary_codes.lfq_quantize(scaled).index, want)
    got = binary_codes.bsq_quantize(scaled)
    np.testing.assert_array_equal(got.index, want)
    np.testing.assert_allclose(np.linalg.norm(got.codes, axis=1), 1, rtol=1e-6)


def test_lfq_is_straight_through_past_its_clamp():
  x, g = features(5), features(5, seed=1)
  codes, to_x, _ = value_and_pull(plain.lfq_quantize, x, g)
  np.testing.assert_array_equal(codes, np.where(x > 0, 1, -1))
  np.testing.assert_array_equal(to_x, g)
  clamped, to_x, index = value_and_pull(
    lambda x: plain.lfq_quantize(x, scale=0.5, soft_clamp=2.0), x, g
  )
  np.testing.assert_array_equal(clamped, codes / 2)
  np.testing.assert_allclose(to_x, g * (1 - np.tanh(x / 2) ** 2), atol=1e-6)
  np.testing.assert_array_equal(index, binary_codes.lfq_quantize(x).index)


def test_bsq_gradient_passes_the_normalisation():
  x, g = features(5), features(5, seed=1)
  x[0] = 0
  codes, to_x, _ = value_and_pull(plain.bsq_quantize, x, g)
  length = np.linalg.norm(x, axis=1, keepdims=True)
  u = x / np.where(length > 0, length, 1)
  want = (g - np.sum(u * g, axis=1, keepdims=True) * u) / np.where(
    length > 0, length, np.inf
  )
  np.testing.assert_allclose(to_x, want, atol=1e-5)
  np.testing.assert_allclose(codes, np.where(x > 0, 1, -1) / np.sqrt(5))


def test_bsq_distances():
  d = 18
  x = features(d, 2000)
  coded = binary_codes.bsq_quantize(x)
  u = x / np.linalg.norm(x, axis=1, keepdims=True)
  square = np.sum((u - coded.codes) ** 2, axis=1)
  want = 2 - 2 * np.abs(u).sum(axis=1) / np.sqrt(d)
  np.testing.assert_allclose(square, want, atol=1e-5)
  assert np.sqrt(square).mean() < np.sqrt(2 - 2 / np.sqrt(d))
  flipped = np.array(coded.codes)
  flipped[:, 3] *= -1
  more = np.sum((u - flipped) ** 2, axis=1) - square
  np.testing.assert_allclose(more, 4 * np.abs(u[:, 3]) / np.sqrt(d), atol=1e-5)
  small = np.array([[0.3, -0.8, 1.2]], np.float32)
  unit = small / np.linalg.norm(small)
  distance = np.linalg.norm(unit - binary_codes.bsq_quantize(small).codes)
  np.testing.assert_allclose(distance, 0.44398, atol=5e-6)


def test_bfloat16_gives_the_same_indices():
  x = features(18).astype(jnp.bfloat16)
  for name in ("lfq", "bsq"):
    quantize = getattr(binary_codes, f"{name}_quantize")
    low, high = quantize(x), quantize(x.astype(np.float32))
    np.testing.assert_array_equal(low.index, high.index)
    np.testing.assert_array_equal(low.codes, high.codes.astype(jnp.bfloat16))
    back = getattr(binary_codes, f"{name}_decode")(low.index, num_bits=18)
    np.testing.assert_array_equal(back.astype(jnp.bfloat16), low.codes)


def test_padding_decodes_to_zeros():
  index = np.array([5, -1], np.int32)
  for decode in (binary_codes.lfq_decode, binary_codes.bsq_decode):
    codes = decode(index, num_bits=3)
    np.testing.assert_array_equal(np.any(codes, axis=-1), [True, False])


@pytest.mark.unchecked
def test_errors_name_the_argument():
  x, index = jnp.zeros((2, 3)), jnp.zeros((2, 2), jnp.int32)
  with pytest.raises(ValueError, match="bit_order must be one of 'msb', 'lsb'"):
    jax.eval_shape(lambda x: plain.lfq_quantize(x, bit_order="left"), x)
  with pytest.raises(ValueError, match="bit_order must be one of 'msb', 'lsb'"):
    jax.eval_shape(lambda x: plain.bsq_quantize(x, bit_order="left"), x)
  with pytest.raises(TypeError, match="index must be uint32, got int32"):
    plain.lfq_decode(index, num_bits=36)
  with pytest.raises(ValueError, match="index_words=2, num_words=3"):
    plain.bsq_decode(index.astype(jnp.uint32), num_bits=65)

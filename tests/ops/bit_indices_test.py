import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import compiled
from tokjax.ops import bit_indices as plain
from tokjax.ops import quantize

bit_indices = compiled(plain)


@pytest.mark.parametrize("order", ["msb", "lsb"])
@pytest.mark.parametrize("num_bits", [1, 18, 31, 32, 70])
def test_bits_write_numbers_and_words(num_bits, order):
  rng = np.random.default_rng(num_bits)
  bits = rng.random((3, 4, num_bits)) < 0.5
  bits[0, 0], bits[0, 1] = True, False
  index = bit_indices.bits_to_index(bits, bit_order=order)
  length = num_bits if num_bits <= 31 else 32
  for place in np.ndindex(3, 4):
    row = bits[place]
    got = np.atleast_1d(np.asarray(index)[place])
    for word in range(len(got)):
      part = row[word * length : (word + 1) * length]
      part = np.pad(part, (0, length - len(part)))
      digits = part[::-1] if order == "lsb" else part
      assert int(got[word]) == int("".join(str(int(b)) for b in digits), 2)
  back = bit_indices.index_to_bits(index, num_bits=num_bits, bit_order=order)
  np.testing.assert_array_equal(back, bits)
  assert index.dtype == (jnp.int32 if num_bits <= 31 else jnp.uint32)


def test_words_are_the_packed_bytes_read_from_the_highest():
  bits = np.random.default_rng(0).random((5, 64)) < 0.5
  packed = jax.jit(lambda b: quantize.pack_bits(b, num_bits=1))(
    jnp.asarray(bits, jnp.uint8)
  )
  words = np.asarray(packed).view(">u4").astype(np.uint32)
  np.testing.assert_array_equal(bit_indices.bits_to_index(bits), words)


@pytest.mark.parametrize("bits", [(9, 9), (6, 12), (1, 2, 15), (18,)])
def test_sub_tokens_round_trip(bits):
  index = np.random.default_rng(0).integers(-1, 2**18, (3, 50))
  index = index.astype(np.int32)
  index[0, :3] = -1, 0, 2**18 - 1
  tokens = bit_indices.split_index(index, bits)
  assert tokens.shape == (3, 50, len(bits)) and tokens.dtype == jnp.int32
  valid = index >= 0
  np.testing.assert_array_equal(np.asarray(tokens)[~valid], -1)
  joined = np.zeros_like(index)
  for i in range(len(bits)):
    assert np.all(np.asarray(tokens)[..., i][valid] < 2 ** bits[i])
    joined = joined * 2 ** bits[i] + np.asarray(tokens)[..., i]
  np.testing.assert_array_equal(joined[valid], index[valid])
  np.testing.assert_array_equal(bit_indices.join_index(tokens, bits), index)


@pytest.mark.unchecked
def test_errors_name_the_argument():
  index = jnp.zeros((3, 2), jnp.int32)
  with pytest.raises(ValueError, match="bit_order must be one of"):
    plain.bits_to_index(index > 0, bit_order="first")
  with pytest.raises(ValueError, match="bit_order must be one of"):
    plain.index_to_bits(index, num_bits=3, bit_order="first")
  with pytest.raises(TypeError, match="index must be uint32, got int32"):
    plain.index_to_bits(index, num_bits=40)
  with pytest.raises(ValueError, match="index_words=2, num_words=3"):
    plain.index_to_bits(index.astype(jnp.uint32), num_bits=65)
  with pytest.raises(ValueError, match="num_bits must lie in 1"):
    plain.index_to_bits(index, num_bits=0)
  for bits in ((), (0, 3), (16, 16)):
    with pytest.raises(ValueError, match="bits must be positive and 31 at"):
      plain.split_index(index, bits)
  with pytest.raises(ValueError, match="tokens_width=2, bits=3"):
    plain.join_index(index, (1, 2, 3))

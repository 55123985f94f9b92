"""Token codecs: what is stored, what comes back, and how close it is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.retrieval import codecs

# Mean cosine of decoded with original rows must exceed these (unit vectors
# round 32 centres, width 32): float types and int8 by their rounding, the
# others a little below what is measured. residual4 reaches 0.9925: the
# outermost of its 16 buckets cut the tails of the residuals.
CLOSENESS = {
  "float32": 1 - 1e-6,
  "bfloat16": 0.99999,
  "float16": 1 - 1e-6,
  "int8": 0.9999,
  "residual4": 0.99,
  "residual2": 0.95,
  "residual1": 0.85,
  "pq8": 0.7,
}


def unit_rows(seed=0, size=512, dim=32):
  random = np.random.default_rng(seed)
  centres = random.standard_normal((32, dim))
  rows = centres[random.integers(0, 32, size)]
  rows = rows + 0.5 * random.standard_normal((size, dim))
  rows /= np.linalg.norm(rows, axis=1, keepdims=True)
  return rows.astype(np.float32)


@jax.jit
def encode(codec, rows):
  return codec.encode(rows)


@jax.jit
def decode(codec, payload):
  return codec.decode(payload)


@functools.cache
def trained(name):
  return codecs.train(name, jax.random.key(0), unit_rows(), num_centroids=32)


@pytest.mark.parametrize("name", codecs.NAMES)
def test_decoded_rows_are_close(name):
  rows, codec = unit_rows(seed=0), trained(name)
  decoded = np.asarray(decode(codec, encode(codec, rows)))
  assert decoded.dtype == np.float32
  lengths = np.linalg.norm(decoded, axis=1)
  cosine = np.sum(decoded * rows, axis=1) / lengths
  assert cosine.mean() > CLOSENESS[name]


def test_more_bits_are_closer():
  rows, errors = unit_rows(), []
  for name in ("residual1", "residual2", "residual4", "int8"):
    codec = trained(name)
    decoded = np.asarray(decode(codec, encode(codec, rows)))
    errors.append(np.mean((decoded - rows) ** 2))
  assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("name", codecs.NAMES)
def test_bytes_per_token_are_those_of_the_payload(name):
  codec, rows = trained(name), unit_rows()
  payload = encode(codec, rows)
  stored = sum(np.asarray(x).nbytes for x in payload.values())
  assert stored == codec.bytes_per_token * len(rows)


@pytest.mark.parametrize("name", codecs.NAMES)
def test_any_rows_decode_alone(name):
  codec, rows = trained(name), unit_rows()
  payload = jax.device_get(encode(codec, rows))
  some = np.array([5, 3, 500])
  part = decode(codec, {key: x[some] for key, x in payload.items()})
  want = np.asarray(decode(codec, payload))[some]
  np.testing.assert_allclose(part, want, atol=1e-6)


@pytest.mark.parametrize("name", ["bfloat16", "residual2", "pq8"])
@pytest.mark.parametrize("block_size", [100, 512, 9999])
def test_corpus_in_blocks_equals_all_at_once(name, block_size):
  codec, rows = trained(name), unit_rows()
  want = encode(codec, rows)
  got = codecs.encode_corpus(codec, rows, block_size=block_size)
  assert got.keys() == want.keys()
  for key, array in got.items():
    assert array.dtype == want[key].dtype
    np.testing.assert_array_equal(array, want[key])


def test_bfloat16_is_rounded_to_nearest_even():
  codec = codecs.FloatCodec(dim=4, dtype="bfloat16")
  rows = np.float32([[1.0, 1.00390625, 1.01171875, -3.14159]])
  # The grid near 1 is 2^-7: 1 + 2^-8 is a tie that goes to the even 1, and
  # 1 + 3 * 2^-8 one that goes to 1 + 2^-6.
  want = [1.0, 1.0, 1.015625, -3.140625]
  assert decode(codec, encode(codec, rows)).tolist() == [want]


@pytest.mark.parametrize("num_bits", [1, 2, 4])
def test_residual_equals_a_loop(num_bits):
  codec, rows = trained(f"residual{num_bits}"), unit_rows()[:16]
  centroids = np.asarray(codec.centroids)
  cutoffs, weights = np.asarray(codec.cutoffs), np.asarray(codec.weights)
  got = np.asarray(decode(codec, encode(codec, rows)))
  for row, decoded in zip(rows, got, strict=True):
    centroid = centroids[np.argmax(centroids @ row)]
    bucket = np.searchsorted(cutoffs, row - centroid, side="left")
    want = centroid + weights[bucket]
    np.testing.assert_allclose(decoded, want / np.linalg.norm(want), atol=1e-6)


def test_residual_worked_example():
  """Two bits, one centroid: residuals .05 and -.3 fall in buckets 2 and 0."""
  codec = codecs.ResidualCodec(
    centroids=jnp.array([[0.5, 0.5, 0.5, 0.5]]),
    cutoffs=jnp.array([-0.04, 0.025, 0.14]),
    weights=jnp.array([-0.125, -0.0075, 0.07625, 0.225]),
    dim=4,
    num_bits=2,
  )
  payload = encode(codec, np.float32([[0.55, 0.2, 0.5, 0.9]]))
  assert payload["packed"].tolist() == [[0b10_00_01_11]]
  row = np.array([0.57625, 0.375, 0.4925, 0.725])
  np.testing.assert_allclose(
    np.asarray(decode(codec, payload))[0], row / np.linalg.norm(row), rtol=1e-6
  )


@pytest.mark.parametrize("name", codecs.NAMES)
def test_settings_and_arrays_rebuild_the_codec(name):
  codec, rows = trained(name), unit_rows()
  again = codecs.from_arrays(*codecs.to_arrays(codec))
  np.testing.assert_array_equal(
    decode(again, encode(again, rows)), decode(codec, encode(codec, rows))
  )


def test_number_of_centroids_follows_the_corpus():
  # 16 sqrt(T) = 16,000 for a million tokens.
  assert codecs.num_residual_centroids(10**6) == 8192
  assert codecs.num_residual_centroids(1) == 16


@pytest.mark.unchecked
def test_errors_name_the_argument():
  rows = unit_rows(dim=12)
  with pytest.raises(ValueError, match="name must be one of 'float32'"):
    codecs.train("int4", None, rows)
  with pytest.raises(ValueError, match="key must be given"):
    codecs.train("residual2", None, rows)
  with pytest.raises(ValueError, match="sample_width must be a multiple of 8"):
    codecs.train("residual1", jax.random.key(0), rows)
  with pytest.raises(ValueError, match="tokens_width=12, codec_dim=32"):
    jax.eval_shape(codecs.Int8Codec(32).encode, rows)

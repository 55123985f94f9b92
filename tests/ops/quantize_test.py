import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import compiled
from tokjax.ops import quantize

quantize = compiled(quantize)

SAMPLE = jnp.array([-0.3, -0.1, -0.02, 0.0, 0.05, 0.12, 0.2, 0.4])


@pytest.mark.parametrize("num_bits", [1, 2, 4, 8])
def test_bits_round_trip_and_match_numpy(num_bits):
  rng = np.random.default_rng(0)
  values = rng.integers(0, 2**num_bits, (3, 5, 16)).astype(np.uint8)
  packed = quantize.pack_bits(jnp.asarray(values), num_bits=num_bits)
  assert packed.shape == (3, 5, 2 * num_bits) and packed.dtype == jnp.uint8
  bits = np.unpackbits(values[..., None], axis=-1)[..., 8 - num_bits :]
  want = np.packbits(bits.reshape(3, 5, -1), axis=-1)
  np.testing.assert_array_equal(packed, want)
  got = quantize.unpack_bits(packed, num_bits=num_bits)
  np.testing.assert_array_equal(got, values)


def test_bucket_tables_worked_example():
  cutoffs = quantize.bucket_cutoffs(SAMPLE, num_bits=2)
  weights = quantize.bucket_weights(SAMPLE, num_bits=2)
  np.testing.assert_allclose(cutoffs, [-0.04, 0.025, 0.14], atol=1e-6)
  want = [-0.125, -0.0075, 0.07625, 0.225]
  np.testing.assert_allclose(weights, want, atol=1e-6)
  codes = quantize.bucketize(SAMPLE, cutoffs)
  np.testing.assert_array_equal(codes, [0, 0, 1, 1, 2, 2, 3, 3])


@pytest.mark.parametrize("num_bits", [1, 2, 4, 8])
def test_buckets_equal_numpy(num_bits):
  sample = np.random.default_rng(0).normal(size=(40, 10)).astype(np.float32)
  cutoffs = quantize.bucket_cutoffs(jnp.asarray(sample), num_bits=num_bits)
  want = np.quantile(sample, np.arange(1, 2**num_bits) / 2**num_bits)
  np.testing.assert_allclose(cutoffs, want, atol=1e-5)
  # Values on a cutoff fall below it, as NumPy's side="left" has it.
  values = np.concatenate([sample.ravel(), np.asarray(cutoffs)])
  got = quantize.bucketize(jnp.asarray(values), cutoffs)
  np.testing.assert_array_equal(got, np.searchsorted(cutoffs, values))


def test_int8_rows_are_within_half_a_step():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 33)), jnp.float32)
  x = x.at[2].set(0)
  rows = quantize.quantize_rows(x)
  back = quantize.dequantize_rows(rows)
  assert rows.values.dtype == jnp.int8
  assert np.all(np.abs(back - x) <= np.asarray(rows.scale)[:, None] * 0.501)
  np.testing.assert_array_equal(back[2], np.zeros(33))
  np.testing.assert_array_equal(np.abs(rows.values).max(axis=1)[:2], 127)


def coded(num_points=70, dim=12, group_size=3, num_centroids=16):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(num_points, dim)), jnp.float32)
  book = quantize.pq_train(
    jax.random.key(0), x, group_size=group_size, num_centroids=num_centroids
  )
  return x, book, quantize.pq_encode(book, x)


def test_pq_codes_are_the_nearest_centroids():
  x, book, codes = coded()
  assert codes.dtype == jnp.uint8 and codes.shape == (70, 4)
  for i in range(70):
    for g in range(4):
      part = np.asarray(x[i, 3 * g : 3 * g + 3])
      distance = np.square(part - np.asarray(book[g])).sum(axis=1)
      assert int(codes[i, g]) == distance.argmin()


def test_pq_decode_equals_a_loop():
  _, book, codes = coded()
  got = quantize.pq_decode(book, codes)
  for i in range(70):
    want = np.concatenate([book[g, int(codes[i, g])] for g in range(4)])
    np.testing.assert_array_equal(got[i], want)


def test_pq_is_exact_with_a_centroid_for_every_point():
  x, book, codes = coded(num_points=20, num_centroids=20)
  np.testing.assert_allclose(quantize.pq_decode(book, codes), x, atol=1e-6)


@pytest.mark.parametrize("num_queries", [1, 3, 16, 40])
@pytest.mark.parametrize("block_size", [1, 32, 1000])
def test_pq_scores_equal_scores_of_decoded(num_queries, block_size):
  _, book, codes = coded()
  rng = np.random.default_rng(1)
  queries = rng.normal(size=(num_queries, 12)).astype(np.float32)
  got = quantize.pq_scores(
    book, codes, jnp.asarray(queries), block_size=block_size
  )
  want = queries @ np.asarray(quantize.pq_decode(book, codes)).T
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.unchecked
def test_errors():
  x, book, codes = coded()
  with pytest.raises(ValueError, match="num_bits must be one of 1, 2, 4, 8"):
    quantize.pack_bits(codes, num_bits=3)
  with pytest.raises(ValueError, match="values_width must be a multiple of 8"):
    quantize.pack_bits(codes, num_bits=1)
  with pytest.raises(ValueError, match="points_width must be a multiple of 5"):
    quantize.pq_train(jax.random.key(0), x, group_size=5)
  with pytest.raises(ValueError, match="num_centroids must lie in 1..70"):
    quantize.pq_train(jax.random.key(0), x, group_size=3)
  with pytest.raises(ValueError, match="points_width=11, codebook_width=12"):
    quantize.pq_encode(book, x[:, :11])
  with pytest.raises(ValueError, match="codes_groups=3, codebook_groups=4"):
    quantize.pq_scores(book, codes[:, :3], x)

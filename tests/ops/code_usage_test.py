import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import compiled
from tokjax.ops import code_usage as plain

code_usage = compiled(plain)


def test_worked_example():
  index = np.repeat(np.arange(8), [4, 2, 1, 1, 0, 0, 0, 0])
  counts = code_usage.code_histogram(index, num_codes=8)
  np.testing.assert_array_equal(counts, [4, 2, 1, 1, 0, 0, 0, 0])
  assert counts.dtype == jnp.int32
  assert code_usage.usage(counts) == 0.5
  np.testing.assert_allclose(code_usage.perplexity(counts), 3.3636, atol=5e-5)
  np.testing.assert_allclose(code_usage.perplexity(counts), 2**1.75, rtol=1e-6)


def test_padding_and_strangers_do_not_count():
  rng = np.random.default_rng(0)
  index = rng.integers(-3, 12, (4, 5, 6)).astype(np.int32)
  mask = rng.random(index.shape) < 0.5
  valid = (index >= 0) & (index < 9)
  got = code_usage.code_histogram(index, num_codes=9)
  np.testing.assert_array_equal(got, np.bincount(index[valid], minlength=9))
  got = code_usage.code_histogram(index, mask, num_codes=9)
  want = np.bincount(index[valid & mask], minlength=9)
  np.testing.assert_array_equal(got, want)


def test_extremes_of_several_histograms():
  rows = np.zeros((4, 6), np.float32)
  rows[1] = 0.25  # averages count as counts do
  rows[2, 3] = 1e-20
  rows[3, :2] = 3e30
  np.testing.assert_allclose(code_usage.usage(rows), [0, 1, 1 / 6, 1 / 3])
  got = code_usage.perplexity(rows)
  np.testing.assert_allclose(got, [1, 6, 1, 2], rtol=1e-6)


@pytest.mark.unchecked
def test_errors_name_the_argument():
  index = jnp.zeros((2, 3), jnp.int32)
  with pytest.raises(ValueError, match=r"mask must have the shape of index"):
    plain.code_histogram(index, jnp.ones(2, bool), num_codes=3)
  with pytest.raises(ValueError, match="num_codes must lie in 1"):
    jax.eval_shape(lambda i: plain.code_histogram(i, num_codes=0), index)

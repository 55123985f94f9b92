"""Rows of attention and outliers, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import compiled
from tokjax.ops import attention_scores

attention_scores = compiled(attention_scores)


def row_case(seed, batch=100, heads=4, key_heads=2, rows=2, keys=9, dim=8):
  rng = np.random.default_rng(seed)
  q = rng.normal(size=(batch, heads, rows, dim)).astype(np.float32)
  k = rng.normal(size=(batch, key_heads, keys, dim)).astype(np.float32)
  mask = rng.random((batch, keys)) < 0.6
  mask[0] = False
  k = np.where(mask[:, None, :, None], k, np.float32(np.nan))
  return q, k, mask


def loop_rows(q, k, mask, scale):
  probability = np.zeros((*q.shape[:3], k.shape[2]))
  group = q.shape[1] // k.shape[1]
  for b, h, r in np.ndindex(q.shape[:3]):
    seen = np.flatnonzero(mask[b])
    if seen.size:
      keys = k[b, h // group, seen].astype(np.float64)
      e = np.exp(scale * (keys @ q[b, h, r].astype(np.float64)))
      probability[b, h, r, seen] = e / e.sum()
  return probability


def test_rows_equal_a_loop():
  for seed in range(10):
    given = row_case(seed)
    got = attention_scores.row_attention(*map(jnp.asarray, given), scale=0.6)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, loop_rows(*given, 0.6), atol=1e-6)


def test_default_scale_and_no_mask():
  q, k, mask = row_case(0, batch=5)
  k = np.nan_to_num(k)
  got = attention_scores.row_attention(jnp.asarray(q), jnp.asarray(k))
  want = loop_rows(q, k, np.ones_like(mask), 8**-0.5)
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_row_of_bfloat16_is_summed_in_float32():
  q, k, _ = row_case(1, batch=5, dim=64)
  low = [jnp.asarray(np.nan_to_num(x), jnp.bfloat16) for x in (q, k)]
  got = attention_scores.row_attention(*low)
  want = attention_scores.row_attention(*[x.astype(jnp.float32) for x in low])
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, want, rtol=2e-5)


def test_gradients_of_rows_are_finite_beside_nan_padding():
  q, k, mask = map(jnp.asarray, row_case(2, batch=4))

  def total(q, k):
    return jnp.sum(jnp.sin(attention_scores.row_attention(q, k, mask)))

  d_q, d_k = jax.grad(total, argnums=(0, 1))(q, k)
  assert np.isfinite(d_q).all() and np.isfinite(d_k).all()
  assert float(jnp.abs(d_q[1]).max()) > 0
  hidden = np.broadcast_to(~np.asarray(mask)[:, None, :, None], d_k.shape)
  np.testing.assert_array_equal(np.asarray(d_k)[hidden], 0)


def test_outliers_by_hand():
  # Q1 = .0486, Q3 = .0903, bound .1528.
  scores = jnp.array([1, 1, 2, 2, 3, 3, 4, 20]) / 36
  got = attention_scores.iqr_upper(scores)
  np.testing.assert_array_equal(got, [False] * 7 + [True])
  q1, q3 = np.quantile(np.asarray(scores), [0.25, 0.75])
  assert round(q1, 4) == 0.0486 and round(q3, 4) == 0.0903
  # The next score up to the bound is no outlier: 5.5 / 36 = .1528.
  at_the_bound = scores.at[7].set(5.5 / 36 - 1e-4)
  assert not attention_scores.iqr_upper(at_the_bound).any()


@pytest.mark.parametrize("size", [1, 2, 5, 8, 33])
def test_outliers_equal_numpy(size):
  rng = np.random.default_rng(size)
  scores = rng.standard_cauchy((300, size)).astype(np.float32)
  scores[::3] = rng.integers(0, 4, (100, size))  # ties
  mask = rng.random((300, size)) < 0.7
  mask[:4] = False
  scores = np.where(mask, scores, np.float32(np.nan))
  got = np.asarray(
    attention_scores.iqr_upper(jnp.asarray(scores), jnp.asarray(mask))
  )
  found = 0
  for row, valid, ours in zip(scores, mask, got, strict=True):
    want = np.zeros(size, bool)
    if valid.any():
      inside = row[valid].astype(np.float64)
      q1, q3 = np.quantile(inside, [0.25, 0.75])
      bound = q3 + 1.5 * (q3 - q1)
      clear = np.abs(inside - bound) > 1e-5 * max(1, abs(bound))
      want[valid] = inside > bound
      np.testing.assert_array_equal(ours[valid][clear], want[valid][clear])
    found += want.sum()
    assert not ours[~valid].any()
  assert size < 5 or found > 20  # there are outliers to miss


def test_equal_scores_hold_no_outlier_and_factor_counts():
  assert not attention_scores.iqr_upper(jnp.ones((3, 9))).any()
  scores = jnp.array([0.0, 1.0, 2.0, 3.0, 4.0])  # Q1 = 1, Q3 = 3
  got = attention_scores.iqr_upper(scores, factor=0.25)
  np.testing.assert_array_equal(got, [False] * 4 + [True])
  assert not attention_scores.iqr_upper(scores, factor=0.5).any()


@pytest.mark.unchecked
def test_errors_name_the_sizes():
  q, k, mask = map(jnp.asarray, row_case(0, batch=2))
  with pytest.raises(ValueError, match="k_keys=9, mask_keys=8"):
    attention_scores.row_attention(q, k, mask[:, :-1])
  with pytest.raises(ValueError, match="q_dim=8, k_dim=7"):
    attention_scores.row_attention(q, k[..., :7])
  with pytest.raises(ValueError, match="query_heads must be a multiple of 2"):
    attention_scores.row_attention(q[:, :3], k)
  with pytest.raises(ValueError, match="scores=9, mask=8"):
    attention_scores.iqr_upper(jnp.zeros((2, 9)), mask[:, :-1])

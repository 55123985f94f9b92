"""FastV against a float64 loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import compiled
from tests.reduction.vtc_cls_test import best, case
from tokjax.reduction import fastv

fastv = compiled(fastv)


def prompt(seed, batch=8, heads=4, key_heads=2, tokens=14, visual=6, dim=4):
  rng = np.random.default_rng(seed)
  q = rng.normal(size=(batch, heads, 1, dim)).astype(np.float32)
  k = rng.normal(size=(batch, key_heads, tokens, dim)).astype(np.float32)
  start = rng.integers(0, tokens - visual, batch)
  index = (start[:, None] + np.arange(visual)).astype(np.int32)
  mask = rng.random((batch, tokens)) < 0.8
  mask[:, -1] = True
  k = np.where(mask[:, None, :, None], k, np.float32(np.nan))
  return q, k, index, mask


def test_scores_equal_a_loop():
  q, k, index, mask = prompt(0)
  got = fastv.fastv_scores(*map(jnp.asarray, (q, k, index, mask)))
  want = np.zeros((8, 14))
  for b, h in np.ndindex(8, 4):
    seen = np.flatnonzero(mask[b])
    e = np.exp(k[b, h // 2, seen].astype(float) @ q[b, h, 0] / 2)
    want[b, seen] += e / e.sum() / 4
  np.testing.assert_allclose(got, np.take_along_axis(want, index, 1), atol=1e-6)


def test_three_tokens_by_hand():
  # Exponentials 1, 3, 4 of three prompt tokens, the first two of the image.
  k = jnp.log(jnp.array([1.0, 3.0, 4.0]))[None, None, :, None]
  q = jnp.ones((1, 1, 1, 1))
  got = fastv.fastv_scores(q, k, jnp.array([[0, 1]]), scale=1.0)
  np.testing.assert_allclose(got, [[1 / 8, 3 / 8]], rtol=1e-6)
  kept = fastv.fastv(jnp.arange(2.0).reshape(1, 2, 1), got, num_keep=1)
  assert kept.index.tolist() == [[1]] and kept.tokens.tolist() == [[[1.0]]]


@pytest.mark.parametrize("num_keep", [1, 6, 12])
def test_keeps_what_a_loop_keeps(num_keep):
  features, scores, mask = case(7, batch=400)
  got = jax.device_get(
    fastv.fastv(*map(jnp.asarray, (features, scores, mask)), num_keep=num_keep)
  )
  for b in range(len(features)):
    want = best(scores[b], mask[b], num_keep)
    np.testing.assert_array_equal(got.index[b, : len(want)], want)
    np.testing.assert_array_equal(got.tokens[b, : len(want)], features[b, want])
    assert int(got.mask[b].sum()) == len(want)
  # In-place dropping keeps the rotary positions.
  np.testing.assert_array_equal(got.position_ids, got.index)


def test_scores_get_no_gradient():
  q, k, index, mask = map(jnp.asarray, prompt(1))

  def total(q, features):
    scores = fastv.fastv_scores(q, k, index, mask)
    visible = jnp.take_along_axis(mask, index, axis=1)
    kept = fastv.fastv(features, scores, visible, num_keep=2)
    return jnp.sum(scores) + jnp.sum(kept.tokens)

  d_q, d_features = jax.grad(total, argnums=(0, 1))(q, jnp.ones((8, 6, 3)))
  np.testing.assert_array_equal(d_q, jnp.zeros_like(d_q))
  counts = jnp.take_along_axis(mask, index, axis=1).sum(axis=1)
  np.testing.assert_array_equal(
    d_features.sum(axis=(1, 2)), 3 * jnp.minimum(counts, 2)
  )


@pytest.mark.unchecked
def test_errors_name_the_argument():
  features, scores, mask = map(jnp.asarray, case(0, batch=2))
  with pytest.raises(ValueError, match="features_tokens=12, scores_tokens=11"):
    fastv.fastv(features, scores[:, 1:], num_keep=3)
  with pytest.raises(ValueError, match="features_tokens=12, mask_tokens=11"):
    fastv.fastv(features, scores, mask[:, 1:], num_keep=3)
  with pytest.raises(ValueError, match="num_keep must lie in 1..12, got 0"):
    fastv.fastv(features, scores, num_keep=0)
  q, k, index, mask = map(jnp.asarray, prompt(0))
  with pytest.raises(ValueError, match="last_rows=2, one=1"):
    fastv.fastv_scores(q.repeat(2, 2), k, index, mask)
  with pytest.raises(ValueError, match="k_batch=8, visual_batch=7"):
    fastv.fastv_scores(q, k, index[1:], mask)

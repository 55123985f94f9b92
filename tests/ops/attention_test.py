"""Attention under masks, and the masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import run
from tokjax.ops import attention, attention_masks


def heads(seed, tokens=5, width=4):
  keys = jax.random.split(jax.random.key(seed), 3)
  return [np.asarray(jax.random.normal(k, (2, 3, tokens, width))) for k in keys]


def oracle(q, k, v, mask):
  q, k, v = (x.astype(np.float64) for x in (q, k, v))
  out = np.zeros((*q.shape[:3], v.shape[-1]))
  for b, h, n in np.ndindex(*q.shape[:3]):
    allowed = np.flatnonzero(mask[b, n])
    if len(allowed):
      logits = k[b, h, allowed] @ q[b, h, n] / np.sqrt(q.shape[-1])
      weights = np.exp(logits - logits.max())
      out[b, h, n] = weights @ v[b, h, allowed] / weights.sum()
  return out


def test_equals_the_loop_under_masks_of_both_ranks():
  q, k, v = heads(0)
  mask = np.random.default_rng(0).random((2, 5, 5)) < 0.5
  mask[0, 2] = False  # reads nothing
  got = run(attention.attend, q, k, v, mask)
  np.testing.assert_allclose(got, oracle(q, k, v, mask), atol=1e-5)
  assert not np.any(got[0, :, 2])
  got = run(attention.attend, q, k, v, mask[1])
  want = oracle(q, k, v, np.stack([mask[1]] * 2))
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_what_is_hidden_has_no_influence_and_no_gradient():
  q, k, v = heads(1)
  mask = attention_masks.causal(5)

  def first_rows(k, v):
    return jnp.sum(attention.attend(q, k, v, jnp.asarray(mask))[:, :, :3] ** 2)

  gradients = jax.jit(jax.grad(first_rows, argnums=(0, 1)))(k, v)
  for gradient in gradients:
    assert np.all(np.isfinite(gradient)) and not np.any(gradient[:, :, 3:])
    assert np.any(gradient[:, :, 2])


def test_a_query_that_reads_nothing_has_finite_gradients():
  q, k, v = heads(2)
  mask = np.zeros((5, 5), bool)
  gradient = jax.jit(
    jax.grad(lambda *x: jnp.sum(attention.attend(*x, jnp.asarray(mask))))
  )(q, k, v)
  assert not np.any(gradient)


def test_wrong_masks_are_named():
  q, k, v = heads(3)
  with pytest.raises(ValueError, match="mask_keys=4, keys=5"):
    attention.attend(q, k, v, jnp.ones((5, 4), bool))


def test_masks_of_scales():
  mask = attention_masks.scale_causal((1, 2))
  assert mask.shape == (5, 5) and mask[0].tolist() == [1, 0, 0, 0, 0]
  assert mask[1:].all() and mask.sum() == 21
  assert attention_masks.scale_causal((1, 2, 4, 8, 16)).sum() == 93_093
  np.testing.assert_array_equal(
    attention_masks.of_groups(range(4)), attention_masks.causal(4)
  )
  with pytest.raises(ValueError, match="side must lie in 1"):
    attention_masks.scale_causal((0, 2))

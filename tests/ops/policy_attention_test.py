"""Attention whose keys count by a policy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import run
from tokjax.ops import attention
from tokjax.ops.policy_attention import policy_attention


def heads():
  keys = jax.random.split(jax.random.key(0), 3)
  return [np.asarray(jax.random.normal(k, (2, 2, 4, 3))) for k in keys]


def policies():
  rng = np.random.default_rng(0)
  return (rng.random((2, 4, 4)) < 0.5).astype(np.float32)


def test_equals_the_formula():
  q, k, v = heads()
  policy = policies()
  got = run(policy_attention, q, k, v, policy, epsilon=1e-3)
  s = np.einsum("bhnd,bhmd->bhnm", np.float64(q), k) / np.sqrt(3)
  a = np.exp(s - s.max(-1, keepdims=True)) * policy[:, None]
  weights = (a + 1e-3 / 4) / (a.sum(-1, keepdims=True) + 1e-3)
  np.testing.assert_allclose(got, weights @ v, atol=1e-5)


def test_without_epsilon_it_is_attention_under_a_mask():
  q, k, v = heads()
  policy = policies()
  policy[0, 1] = 0
  got = run(policy_attention, q, k, v, policy, epsilon=0.0)
  want = run(attention.attend, q, k, v, policy > 0)
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_nothing_to_read_gives_the_mean():
  q, k, v = heads()
  got = run(policy_attention, q, k, v, np.zeros((2, 4, 4), np.float32))
  want = np.broadcast_to(v.mean(axis=2, keepdims=True), v.shape)
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_the_policy_learns():
  q, k, v = heads()
  gradient = jax.jit(
    jax.grad(lambda p: jnp.sum(policy_attention(q, k, v, p) ** 2))
  )(policies())
  assert np.all(np.isfinite(gradient)) and np.all(np.any(gradient, axis=-1))
  with pytest.raises(ValueError, match=r"policy must have shape \(2, 4, 4\)"):
    policy_attention(q, k, v, jnp.ones((2, 4, 3)))

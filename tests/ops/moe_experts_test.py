"""Mixtures of experts against loops over tokens, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import compiled
from tokjax.ops import moe_experts as plain
from tokjax.ops.moe_experts import Experts

module = compiled(plain)


def experts_of(num_experts=4, width=5, hidden=6, gated=True):
  init = lambda key: plain.init_experts(  # noqa: E731
    key, num_experts=num_experts, width=width, hidden=hidden, gated=gated
  )
  return jax.device_get(jax.jit(init)(jax.random.key(0)))


def example(num_tokens=12, num_experts=4, k=2):
  """Tokens with their choices; nobody asks for the last expert."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(num_tokens, 5)).astype(np.float32)
  many = max(k, num_experts - 1)
  index = np.stack([rng.permutation(many)[:k] for _ in range(num_tokens)])
  weights = rng.random(index.shape).astype(np.float32)
  return x, index, weights


def one_expert(experts, e, x):
  up, down = experts.up[e].astype(float), experts.down[e].astype(float)
  if experts.gate is None:
    return np.maximum(x @ up, 0) @ down
  gate = x @ experts.gate[e].astype(float)
  return (gate / (1 + np.exp(-gate)) * (x @ up)) @ down


def by_loops(x, index, weights, experts):
  out = np.zeros(x.shape)
  for t, j in np.argwhere(index >= 0):
    out[t] += weights[t, j] * one_expert(experts, index[t, j], x[t])
  return out


@pytest.mark.parametrize(("gated", "k"), [(True, 2), (False, 1), (True, 4)])
def test_mixture(gated, k):
  experts = experts_of(gated=gated)
  x, index, weights = example(k=k)
  index[3] = -1
  x[3] = np.nan
  activation = jax.nn.silu if gated else jax.nn.relu
  found = module.mixture(x, index, weights, experts, activation=activation)
  want = by_loops(x, index, weights, experts)
  np.testing.assert_allclose(found.output, want, rtol=1e-4, atol=1e-5)
  assert int(found.dropped) == 0


@pytest.mark.parametrize(("capacity", "dropped"), [(3, None), (0, 24)])
def test_capacity_drops_and_counts(capacity, dropped):
  experts = experts_of()
  x, index, weights = example()
  found = module.mixture(
    x, index, weights, experts, capacity=capacity, policy="position"
  )
  kept = index.copy()
  for e in range(4):
    for t, j in np.argwhere(index == e)[capacity:]:
      kept[t, j] = -1
  assert int(found.dropped) == (kept < 0).sum() == (dropped or 15)
  want = by_loops(x, kept, weights, experts)
  np.testing.assert_allclose(found.output, want, rtol=1e-4, atol=1e-5)


def test_batched_and_grouped_rows_agree():
  experts = experts_of()
  rows = np.random.default_rng(2).normal(size=(4, 3, 5)).astype(np.float32)
  batched = module.batched_mlp(experts, rows)
  grouped = module.grouped_mlp(
    experts, rows.reshape(12, 5), np.array([3, 3, 3, 3])
  )
  np.testing.assert_allclose(batched.reshape(12, 5), grouped, atol=1e-5)
  for e in range(4):
    want = one_expert(experts, e, rows[e].astype(float))
    np.testing.assert_allclose(batched[e], want, rtol=1e-4, atol=1e-5)


def test_grouped_matmul_with_empty_groups():
  rng = np.random.default_rng(0)
  rows, weights = rng.normal(size=(6, 3)), rng.normal(size=(4, 3, 2))
  sizes = np.array([2, 0, 3, 0])  # a row is left over
  got = module.grouped_matmul(
    rows.astype(np.float32), weights.astype(np.float32), sizes
  )
  group = np.repeat(np.arange(4), sizes)
  want = np.einsum("mk,mkn->mn", rows[:5], weights[group])
  np.testing.assert_allclose(got[:5], want, rtol=1e-5, atol=1e-6)


def test_experts_that_do_nothing_give_the_tokens_back():
  eye = np.stack([np.eye(5, dtype=np.float32)] * 4)
  x, index, weights = example()
  weights = weights / weights.sum(1, keepdims=True)
  found = module.mixture(
    x, index, weights, Experts(eye, eye), activation=lambda x: x
  )
  np.testing.assert_allclose(found.output, x, rtol=1e-5, atol=1e-6)


def test_gradients():
  """Of tokens, weights and experts; none for an expert that nobody asked."""
  experts = experts_of()
  x, index, weights = example()
  index = jnp.asarray(index)
  d_out = np.random.default_rng(3).normal(size=x.shape).astype(np.float32)

  def loss(x, weights, experts):
    out = plain.mixture(x, index, weights, experts, capacity=4)
    return jnp.sum(out.output * d_out)

  def dense(x, weights, experts):
    """All experts for all tokens, of which the kept ones count."""
    kept = plain.moe_dispatch.keep_within_capacity(
      index, weights, capacity=4, num_experts=4
    )
    rows = jnp.broadcast_to(x[None], (4, *x.shape))
    every = plain.batched_mlp(experts, rows)  # [E, T, D]
    chosen = jax.nn.one_hot(index, 4) * jnp.where(kept, weights, 0)[..., None]
    return jnp.sum(jnp.einsum("tke,etd->td", chosen, every) * d_out)

  grad = jax.jit(jax.grad(loss, (0, 1, 2)))(x, weights, experts)
  want = jax.jit(jax.grad(dense, (0, 1, 2)))(x, weights, experts)
  for g, w in zip(jax.tree.leaves(grad), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5)
  for g in grad[2]:
    np.testing.assert_array_equal(g[3], 0)
    assert np.abs(g[0]).max() > 0


def test_bfloat16_sums_in_float32():
  experts = jax.tree.map(lambda w: w.astype(jnp.bfloat16), experts_of())
  x, index, weights = example()
  x = x.astype(jnp.bfloat16)
  found = module.mixture(x, index, weights, experts)
  assert found.output.dtype == jnp.bfloat16
  high = jax.tree.map(lambda w: w.astype(np.float32), experts)
  want = by_loops(x.astype(float), index, weights, high)
  np.testing.assert_allclose(
    found.output.astype(np.float32), want, rtol=0.02, atol=0.03
  )


@pytest.mark.unchecked
def test_errors_name_the_argument():
  experts = experts_of()
  x, index, weights = example()
  with pytest.raises(ValueError, match="tokens=12, index_tokens=11"):
    plain.mixture(x, index[:11], weights, experts)
  with pytest.raises(ValueError, match="groups=4, group_sizes=3"):
    plain.grouped_mlp(experts, x, jnp.array([1, 2, 3]))
  with pytest.raises(ValueError, match="buffers=2, experts=4"):
    plain.batched_mlp(experts, jnp.zeros((2, 3, 5)))

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


def whole(q, k, v, mask=None):
  return attention.attend_with_lse(q, k, v, mask)


def halves(q, k, v, mask):
  parts = [
    attention.attend_with_lse(q, k[:, :, part], v[:, :, part], mask[..., part])
    for part in (slice(0, 2), slice(2, 5))
  ]
  return attention.merge(*parts), attention.merge(*reversed(parts))


def test_parts_merge_into_the_whole():
  q, k, v = heads(4)
  mask = np.random.default_rng(4).random((2, 5, 5)) < 0.5
  mask[0, 1] = False  # nothing at all
  mask[1, 2, :2], mask[1, 2, 2:] = False, True  # nothing in one part
  want = run(whole, q, k, v, mask)
  logits = np.float64(q) @ np.float64(k).swapaxes(-1, -2) / 2
  logits = np.where(mask[:, None], logits, -np.inf)
  with np.errstate(divide="ignore"):
    lse = np.log(np.exp(logits).sum(-1))
  np.testing.assert_allclose(want.lse, lse, rtol=1e-5)
  for got in run(halves, q, k, v, mask):
    np.testing.assert_allclose(got.out, want.out, atol=1e-6)
    np.testing.assert_allclose(got.lse, want.lse, rtol=1e-5)


def test_merging_has_the_gradients_of_the_whole():
  q, k, v = heads(5)
  mask = np.random.default_rng(5).random((2, 5, 5)) < 0.6
  mask[0, 1] = False

  def loss(state):
    lse = jnp.where(jnp.isfinite(state.lse), state.lse, 0)
    return jnp.sum(state.out**2) + jnp.sum(jnp.sin(lse))

  def gradients(find):
    return jax.jit(jax.grad(lambda *x: loss(find(*x)), (0, 1, 2)))(q, k, v)

  got = gradients(lambda *x: halves(*x, jnp.asarray(mask))[0])
  want = gradients(lambda *x: whole(*x, jnp.asarray(mask)))
  for one, other in zip(got, want, strict=True):
    assert np.all(np.isfinite(one))
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_heads_may_share_keys():
  q, k, v = heads(6)
  q = np.concatenate([q, 2 * q], axis=1)  # six heads over three
  mask = np.random.default_rng(6).random((5, 5)) < 0.7
  got = run(attention.attend, q, k, v, mask)
  twice = [np.repeat(x, 2, axis=1) for x in (k, v)]
  want = run(attention.attend, q, *twice, mask)
  np.testing.assert_allclose(got, want, atol=1e-6)
  with pytest.raises(ValueError, match="heads_of_queries must be a multiple"):
    attention.attend(q[:, :5], k, v)


def test_a_bias_joins_the_logits():
  q, k, v = heads(7)
  rng = np.random.default_rng(7)
  bias = rng.normal(size=(1, 3, 5, 5)).astype(np.float32)
  bias[..., 3] = -1e30  # as good as a mask
  got = run(attention.attend, q, k, v, None, bias=bias)
  logits = np.float64(q) @ np.float64(k).swapaxes(-1, -2) / 2 + bias
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  want = weights @ np.float64(v) / weights.sum(-1, keepdims=True)
  np.testing.assert_allclose(got, want, atol=1e-5)
  with pytest.raises(ValueError, match="bias must be"):
    attention.attend(q, k, v, bias=bias[:, :2])


def test_cotangents_of_parts_add_up_to_the_gradient():
  keys = jax.random.split(jax.random.key(5), 4)
  shapes = (2, 4, 5, 3), (2, 2, 6, 3), (2, 2, 6, 2), (2, 4, 5, 2)
  q, k, v, d_out = (
    jax.random.normal(key, shape)
    for key, shape in zip(keys, shapes, strict=True)
  )
  mask = jnp.arange(5)[:, None] + 2 >= jnp.arange(6)[None]
  d_lse = d_out[..., 0]

  @jax.jit
  def both(q, k, v):
    found, pull = jax.vjp(
      lambda *x: attention.attend_with_lse(*x, mask), q, k, v
    )
    delta = jnp.sum(d_out * found.out, axis=-1) - d_lse
    parts = [
      attention.attend_cotangents(
        q, k[:, :, cut], v[:, :, cut], mask[:, cut],
        lse=found.lse, delta=delta, d_out=d_out,
      )
      for cut in (slice(2), slice(2, 6))
    ]  # fmt: skip
    d_q, d_k, d_v = zip(*parts, strict=True)
    ours = sum(d_q), jnp.concatenate(d_k, 2), jnp.concatenate(d_v, 2)
    return ours, pull(attention.AttentionState(d_out, d_lse))

  for ours, want in zip(*both(q, k, v), strict=True):
    np.testing.assert_allclose(ours, want, rtol=1e-4, atol=1e-5)


def test_rows_are_cut_and_joined():
  x = np.arange(2 * 3 * 5 * 2.0).reshape(2, 3, 5, 2)
  blocks, flat = attention.cut_rows((x, x[..., 0]), 2)
  np.testing.assert_array_equal(blocks[1], x[:, :, 2:4])
  np.testing.assert_array_equal(blocks[2, :, :, 1], 0)
  joined = attention.join_rows((blocks, flat), 5)
  np.testing.assert_array_equal(joined[0], x)
  np.testing.assert_array_equal(joined[1], x[..., 0])

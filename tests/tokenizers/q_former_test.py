"""Q-Former: a float64 loop of BERT's blocks, masks, dropout."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokjax.ops import attention_masks
from tokjax.tokenizers.q_former import QFormer, QFormerConfig
from tokjax.tokenizers.slot_attention import SlotAttentionConfig

Q, N, D, C, H = 4, 5, 8, 6, 2
CONFIG = QFormerConfig(
  D, 4, H, num_queries=Q, context_dim=C, mlp_ratio=2.0, init_scale=0.5
)
SLOTS = dataclasses.replace(
  CONFIG, num_layers=2, slots=SlotAttentionConfig(D, C, 2, 1)
)


@functools.cache
def build(config=CONFIG):
  return jax.jit(lambda: QFormer(config, rngs=nnx.Rngs(0)))()


def features(seed=0):
  random = np.random.default_rng(seed)
  return random.normal(size=(2, N, C)).astype(np.float32)


@functools.partial(jax.jit, static_argnames="causal")
def call(model, x, context_mask=None, key=None, causal=False):
  mask = attention_masks.causal(Q) if causal else None
  return model.read(x, context_mask, mask=mask, key=key)


def layer(tree, *place):
  return jax.tree.map(lambda x: np.float64(x[place]), tree)


def norm(x, p):
  x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12)
  return x * p.scale[...] + p.bias[...]


def dense(x, p):
  return x @ p.kernel[...] + p.bias[...]


def attention(x, context, p, keep):
  q, k, v = dense(x, p.query), dense(context, p.key), dense(context, p.value)
  d, out = D // H, np.zeros((len(x), D))
  for h in range(H):
    part = slice(h * d, (h + 1) * d)
    for i in range(len(x)):
      e = np.exp(k[:, part] @ q[i, part] / np.sqrt(d)) * keep[i]
      out[i, part] = (e / e.sum()) @ v[:, part]
  return dense(out, p.out)


def loop(model, context, keep, mask):
  """One example in float64, layer by layer."""
  x = norm(np.float64(model.queries[...]), layer(model.norm))
  context = np.float64(context)
  for number in range(4):
    reads = number % 2 == 0
    tree, place = (model.readers, ()) if reads else (model.others, (0,))
    p = layer(tree, number // 2, *place)
    x = norm(x + attention(x, x, p.attention, mask), p.norm_attention)
    if reads:
      read = attention(x, context, p.cross, np.broadcast_to(keep, (Q, N)))
      x = norm(x + read, p.norm_read)
    hidden = dense(x, p.mlp.up)
    hidden = np.float64(jax.nn.gelu(jnp.asarray(hidden), approximate=False))
    x = norm(x + dense(hidden, p.mlp.down), p.norm_mlp)
  return x


@pytest.mark.parametrize("causal", [True, False])
def test_equals_a_loop(causal):
  model, x = build(), features()
  keep = np.array([[1, 1, 1, 1, 1], [1, 0, 0, 1, 1]], bool)
  x[~keep] = np.nan
  got = call(model, x, keep, causal=causal)
  assert got.attention is None
  mask = attention_masks.causal(Q) if causal else np.ones((Q, Q), bool)
  for i in range(2):
    want = loop(model, np.nan_to_num(x[i]), keep[i], mask)
    np.testing.assert_allclose(got.queries[i], want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("config", [CONFIG, SLOTS], ids=["cross", "slots"])
def test_later_queries_change_nothing_before(config):
  """With slots they do: they compete for the same features."""
  model, x = build(config), features()
  want = call(model, x, causal=True).queries
  changed = nnx.Param(model.queries[...].at[2:].add(jnp.arange(D) - 3.0))
  other = jax.tree.map(lambda x: x, model)
  other.queries = changed
  got = call(other, x, causal=True).queries
  same = np.abs(got - want).max((0, 2)) < 1e-6
  first = [config is CONFIG] * 2
  np.testing.assert_array_equal(same, [*first, False, False])
  both = call(other, x).queries
  assert np.abs(both - call(model, x).queries).max((0, 2)).min() > 1e-6


def test_slots_share_the_features():
  keep = np.array([[1, 1, 1, 1, 1], [1, 0, 0, 1, 1]], bool)
  got = call(build(SLOTS), features(), keep)
  assert got.attention.shape == (2, Q, N)
  np.testing.assert_allclose(got.attention.sum(1), keep, atol=1e-5)


def test_dropout_only_with_a_key():
  model, x = build(), features()
  want = call(model, x).queries
  one, again, two = (
    call(model, x, key=jax.random.key(i)).queries for i in (0, 0, 1)
  )
  np.testing.assert_array_equal(one, again)
  assert np.abs(one - two).max() > 1e-3 < np.abs(one - want).max()


def test_every_layer_may_read():
  config = dataclasses.replace(CONFIG, num_layers=2, read_every=1)
  model = build(config)
  assert model.others is None
  assert jax.jit(model)(features()).shape == (2, Q, D)


@pytest.mark.unchecked
@pytest.mark.parametrize("settings, message", [
  ({"num_layers": 3}, "num_layers must be a multiple of 2, got 3"),
  ({"num_heads": 3}, "width must be a multiple of 3"),
  ({"dropout_rate": 1.5}, "dropout_rate must lie in"),
  ({"slots": SlotAttentionConfig(7, C)}, "width_of_slots=7, width=8"),
  ({"slots": SlotAttentionConfig(D, 7)}, "input_dim_of_slots=7"),
])  # fmt: skip
def test_settings_that_cannot_be(settings, message):
  with pytest.raises(ValueError, match=message):
    QFormer(dataclasses.replace(CONFIG, **settings), rngs=nnx.Rngs(0))


@pytest.mark.unchecked
def test_error_of_the_width():
  with pytest.raises(ValueError, match="width_of_context=7, context_dim=6"):
    jax.eval_shape(build(), jnp.ones((1, N, 7)))

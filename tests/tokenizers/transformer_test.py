"""The transformer of tokenizers: by hand, under masks, with a context."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokjax.ops import attention_masks
from tokjax.tokenizers import transformer
from tokjax.tokenizers.transformer import Transformer, TransformerConfig

CONFIG = TransformerConfig(8, 2, 2, init_scale=0.3)


def made(config=CONFIG):
  return jax.jit(lambda: Transformer(config, rngs=nnx.Rngs(0)))()


def tokens(number=5, width=8, seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(2, number, width)).astype(np.float32)


def norm(x, layer, index):
  scale, bias = (np.float64(p[...])[index] for p in (layer.scale, layer.bias))
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale + bias


def dense(x, layer, index):
  return (
    x @ np.float64(layer.kernel[...])[index]
    + np.float64(layer.bias[...])[index]
  )


def attend(x, context, part, index, mask):
  q, k, v = (
    dense(y, layer, index).reshape(*y.shape[:2], 2, 4).swapaxes(1, 2)
    for y, layer in (
      (x, part.query),
      (context, part.key),
      (context, part.value),
    )
  )
  logits = np.where(mask, q @ k.swapaxes(2, 3) / 2, -np.inf)
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  mixed = weights / weights.sum(-1, keepdims=True) @ v
  return dense(mixed.swapaxes(1, 2).reshape(x.shape), part.out, index)


def gelu(x):
  from scipy.special import erf

  return x * (1 + erf(x / np.sqrt(2))) / 2


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_equals_the_layers_written_out(activation):
  config = dataclasses.replace(CONFIG, context_dim=3, activation=activation)
  model, x, context = made(config), tokens(), tokens(4, 3, seed=1)
  mask = attention_masks.causal(5)
  seen = np.arange(4)[None] <= np.arange(5)[:, None]
  got = jax.jit(lambda x, c: model(x, c, mask=mask, context_mask=seen))(
    x, context
  )
  x, context, blocks = np.float64(x), np.float64(context), model.blocks
  for i in range(2):
    y = norm(x, blocks.norm_attention, i)
    x = x + attend(y, y, blocks.attention, i, mask)
    y = norm(x, blocks.norm_context, i)
    x = x + attend(y, context, blocks.context, i, seen)
    y = norm(x, blocks.norm_mlp, i)
    up = dense(y, blocks.mlp.up, i)
    if activation == "gelu":
      hidden = gelu(up)
    else:
      gate = dense(y, blocks.mlp.gate, i)
      hidden = gate / (1 + np.exp(-gate)) * up
    x = x + dense(hidden, blocks.mlp.down, i)
  np.testing.assert_allclose(got, norm(x, model.norm, ...), atol=1e-4)


def test_steps_equal_the_whole_under_a_causal_mask():
  model, x = made(), tokens()

  @jax.jit
  def both(x):
    def one(cache, x):
      y, cache = model.step(x[:, None], cache)
      return cache, y[:, 0]

    cache, stepped = jax.lax.scan(one, model.init_cache(2, 6), x.swapaxes(0, 1))
    whole = model(x, mask=attention_masks.causal(5))
    return cache.length, stepped.swapaxes(0, 1), whole

  length, stepped, whole = both(x)
  assert int(length) == 5
  np.testing.assert_allclose(stepped, whole, atol=1e-5)


def test_parts_begin_as_they_say():
  rngs = nnx.Rngs(0)
  layer = transformer.linear(CONFIG, 400, 50, rngs)
  # Cut at two deviations, which leaves .88 of one.
  assert np.abs(layer.kernel[...]).max() <= 0.6
  assert abs(np.std(layer.kernel[...]) / (0.88 * 0.3) - 1) < 0.03
  assert not np.any(layer.bias[...])
  rows = transformer.table(400, 16, rngs)[...]
  assert abs(np.std(rows) * 4 - 1) < 0.05
  x = tokens().astype(jnp.bfloat16)
  assert transformer.layer_norm(CONFIG, rngs)(x).dtype == jnp.float32
  task = transformer.TaskLayer(CONFIG, 8, 3, rngs=rngs)
  want = task.outer(jnp.tanh(task.inner(tokens())))
  np.testing.assert_allclose(task(tokens()), want, rtol=1e-6)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"num_heads": 3}, "width must be a multiple of 3"),
    ({"activation": "relu"}, "activation must be one of"),
    ({"num_layers": 0}, "num_layers must lie in 1"),
  ],
)
def test_settings_are_checked(settings, message):
  config = dataclasses.replace(CONFIG, **settings)
  with pytest.raises(ValueError, match=message):
    Transformer(config, rngs=nnx.Rngs(0))


def test_a_context_comes_exactly_when_it_is_read():
  model = made()
  with pytest.raises(ValueError, match="context must have width 0"):
    model(tokens(), tokens())
  with pytest.raises(ValueError, match="width_of_x=3, width=8"):
    model(tokens(width=3))

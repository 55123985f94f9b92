"""Slot attention: a float64 loop, who competes, and what masks hide."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.compiled import compiled, run
from tokjax.tokenizers import slot_attention as module
from tokjax.tokenizers.slot_attention import (
  GRUCell,
  SlotAttention,
  SlotAttentionConfig,
)

slot_attention = compiled(module)
S, N, D, C = 3, 5, 8, 6


def numbers(*shape, seed=0):
  random = np.random.default_rng(seed)
  return random.normal(size=shape).astype(np.float32)


@functools.cache
def build(**settings):
  config = SlotAttentionConfig(**{"width": D, "input_dim": C, **settings})
  model = jax.jit(lambda: SlotAttention(config, rngs=nnx.Rngs(0)))()
  # Weights that matter: those at the start hardly do.
  return jax.tree.map(lambda x: x + 0.3 * numbers(*x.shape, seed=x.size), model)


@jax.jit
def apply(model, slots, inputs, mask=None):
  return model(slots, inputs, mask)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def norm(x, layer):
  x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + layer.epsilon)
  return x * np.float64(layer.scale[...]) + np.float64(layer.bias[...])


def dense(x, layer):
  return x @ np.float64(layer.kernel[...]) + np.float64(layer.bias[...])


def gru_loop(cell, x, s):
  a, b = dense(x, cell.input), dense(s, cell.state)
  d = s.shape[-1]
  r = sigmoid(a[..., :d] + b[..., :d])
  g = sigmoid(a[..., d : 2 * d] + b[..., d : 2 * d])
  n = np.tanh(a[..., 2 * d :] + r * b[..., 2 * d :])
  return (1 - g) * n + g * s


def attention_loop(q, k, v, keep, compete, norm, scale):
  """[H, S, d], [H, N, d]: updates and shares, one number at a time."""
  heads, slots, inputs = len(q), q.shape[1], k.shape[1]
  p = np.zeros((heads, slots, inputs))
  e = np.exp(scale * np.einsum("hsd,hnd->hsn", q, k))
  for h in range(heads):
    for s in range(slots):
      for n in np.flatnonzero(keep):
        total = {
          "slots": e[h, :, n].sum(),
          "heads_slots": e[:, :, n].sum(),
          "inputs": e[h, s, keep].sum(),
        }[compete]
        p[h, s, n] = e[h, s, n] / total
  share = p.sum(0) if compete == "heads_slots" else p.mean(0)
  if norm == "mean":
    w = np.where(keep, p + 1e-6, 0)
    w = w / w.sum(-1, keepdims=True)
  else:
    w = p / (1 + p.sum(-1, keepdims=True))
  return w @ v, share


def slots_loop(model, slots, inputs, keep):
  """One example in float64."""
  config, shares = model.config, None
  heads, d = config.num_heads, config.width // config.num_heads

  def split(x):
    return x.reshape(len(x), heads, d).swapaxes(0, 1)

  def maybe(x, layer):
    return x if layer is None else norm(x, layer)

  x = maybe(np.float64(inputs), model.norm_inputs)
  k, v = split(dense(x, model.key)), split(dense(x, model.value))
  size = d if config.scale_by == "head_width" else len(slots)
  s = np.float64(slots)
  for _ in range(config.num_iterations):
    q = split(dense(maybe(s, model.norm_slots), model.query))
    update, shares = attention_loop(
      q, k, v, keep, config.compete, config.norm, size**-0.5
    )
    update = update.swapaxes(0, 1).reshape(len(s), -1)
    if config.update == "gru":
      s = gru_loop(model.gru, update, s)
    else:
      s = s + update if config.update == "sum" else update
    if config.mlp_ratio:
      hidden = dense(norm(s, model.norm_mlp), model.mlp.up)
      hidden = np.float64(jax.nn.gelu(jnp.asarray(hidden), approximate=False))
      s = s + dense(hidden, model.mlp.down)
  return s, shares


@pytest.mark.parametrize("settings", [
  {},
  {"num_heads": 2, "compete": "heads_slots", "scale_by": "num_slots"},
  {"num_heads": 2, "norm": "one_plus", "update": "replace", "mlp_ratio": 0.0,
   "num_iterations": 1, "norm_inputs": False, "norm_slots": False},
  {"update": "sum", "num_iterations": 2},
  {"compete": "inputs", "num_heads": 2, "num_iterations": 1},
], ids=str)  # fmt: skip
def test_equals_a_loop(settings):
  model = build(**settings)
  slots, inputs = numbers(2, S, D), numbers(2, N, C, seed=1)
  keep = np.array([[1, 1, 0, 1, 1], [1, 0, 0, 1, 0]], bool)
  inputs[~keep] = np.nan
  found = apply(model, slots, inputs, keep)
  for i in range(2):
    clean = np.nan_to_num(inputs[i])
    want, share = slots_loop(model, slots[i], clean, keep[i])
    np.testing.assert_allclose(found.slots[i], want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.attention[i], share, atol=1e-6)
  # Each input is shared out whole; or each slot's reading is.
  over_inputs = model.config.compete == "inputs"
  total = found.attention.sum(2 if over_inputs else 1)
  want = np.ones((2, S)) if over_inputs else keep
  np.testing.assert_allclose(total, want, atol=1e-6)
  # And as if the masked inputs were not there.
  part = apply(model, slots[1:], inputs[1:, keep[1]])
  np.testing.assert_allclose(part.slots, found.slots[1:], rtol=1e-4, atol=1e-5)


def test_worked_example():
  slots = jnp.array([[[[1.0, 0.0], [0.0, 1.0]]]])
  inputs = jnp.array([[[[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]]]])
  found = slot_attention.attend_slots(slots, inputs, inputs)
  np.testing.assert_allclose(
    found.attention[0],
    [[0.80443, 0.19557, 0.5], [0.19557, 0.80443, 0.5]],
    atol=5e-6,
  )
  np.testing.assert_allclose(
    found.slots[0, 0], [[1.40591, 0.59409], [0.59409, 1.40591]], atol=5e-6
  )


@pytest.mark.parametrize("compete", ["slots", "heads_slots"])
def test_order_of_slots_and_inputs(compete):
  model = build(num_heads=2, compete=compete)
  slots, inputs = numbers(2, S, D), numbers(2, N, C, seed=1)
  want = apply(model, slots, inputs)
  swap, turn = np.array([2, 0, 1]), np.array([3, 0, 4, 2, 1])
  got = apply(model, slots[:, swap], inputs[:, turn])
  np.testing.assert_allclose(got.slots, want.slots[:, swap], atol=1e-5)
  np.testing.assert_allclose(
    got.attention, want.attention[:, swap][:, :, turn], atol=1e-6
  )


def test_one_slot_of_one_head_is_the_mean():
  x = numbers(2, 1, N, 4)
  found = slot_attention.attend_slots(x[:, :, :1], x, x)
  np.testing.assert_allclose(found.slots, x.mean(2, keepdims=True), atol=1e-6)
  np.testing.assert_array_equal(found.attention, np.ones((2, 1, N)))


def test_equal_slots_stay_equal():
  slots = np.broadcast_to(numbers(2, 1, D), (2, S, D))
  found = apply(build(), slots, numbers(2, N, C, seed=1))
  np.testing.assert_allclose(found.slots, found.slots[:, :1] + 0 * slots)


def test_nothing_to_read():
  q, x = numbers(1, 2, S, 4), numbers(1, 2, N, 4, seed=1)
  for compete in ("slots", "heads_slots", "inputs"):

    def total(q, x, compete=compete):
      found = module.attend_slots(
        q, x, x, jnp.zeros((1, N), bool), compete=compete
      )
      return jnp.sum(found.slots) + jnp.sum(found.attention)

    value, gradients = run(jax.value_and_grad(total, (0, 1)), q, x)
    assert value == 0 and not np.any(gradients[0]) and not np.any(gradients[1])


def test_gru_cell():
  cell = jax.jit(lambda: GRUCell(4, rngs=nnx.Rngs(0)))()
  bound = 4**-0.5
  for x in jax.tree.leaves(cell):
    assert 0 < np.abs(x).max() <= bound
  x, s = numbers(3, 4), numbers(3, 4, seed=1)
  got = run(cell, x, s)
  want = gru_loop(cell, np.float64(x), np.float64(s))
  np.testing.assert_allclose(got, want, rtol=1e-5)
  # A shut gate leaves the state as it is.
  bias = cell.input.bias[...].at[4:8].set(50.0)
  shut = GRUCell(4, rngs=nnx.Rngs(1))
  shut.input.bias = nnx.Param(bias)
  np.testing.assert_allclose(run(shut, x, s), s, rtol=1e-6)


def test_gradients_reach_slots_inputs_and_parameters():
  model = build(num_heads=2)
  slots, inputs = numbers(2, S, D), numbers(2, N, C, seed=1)
  mask = np.ones((2, N), bool)
  mask[:, 2] = False

  @jax.jit
  def gradients(model, slots, inputs):
    def total(model, slots, inputs):
      return jnp.sum(jnp.sin(model(slots, inputs, mask).slots))

    return jax.grad(total, argnums=(0, 1, 2))(model, slots, inputs)

  of_model, of_slots, of_inputs = gradients(model, slots, inputs)
  for x in jax.tree.leaves(of_model):
    assert np.isfinite(x).all()
  assert np.any(of_model.query.kernel[...]) and np.all(np.any(of_slots, -1))
  assert not np.any(of_inputs[:, 2]) and np.all(np.any(of_inputs[:, :2], -1))


@pytest.mark.unchecked
@pytest.mark.parametrize("settings, message", [
  ({"compete": "all"}, "compete must be one of 'slots', 'heads_slots'"),
  ({"norm": "sum"}, "norm must be one of"),
  ({"scale_by": "d"}, "scale_by must be one of"),
  ({"update": "add"}, "update must be one of 'gru', 'sum', 'replace'"),
  ({"num_heads": 3}, "width must be a multiple of 3, got 8"),
  ({"num_iterations": 0}, "num_iterations must lie in"),
])  # fmt: skip
def test_settings_that_cannot_be(settings, message):
  with pytest.raises(ValueError, match=message):
    SlotAttention(SlotAttentionConfig(D, C, **settings), rngs=nnx.Rngs(0))


@pytest.mark.unchecked
def test_errors():
  model = build()
  with pytest.raises(ValueError, match="width_of_slots=7, width=8"):
    jax.eval_shape(model, jnp.ones((1, S, 7)), jnp.ones((1, N, C)))
  with pytest.raises(ValueError, match="width_of_inputs=7, input_dim=6"):
    jax.eval_shape(model, jnp.ones((1, S, D)), jnp.ones((1, N, 7)))
  x = jnp.ones((1, 1, N, 2))
  with pytest.raises(ValueError, match="mask_inputs=4, inputs=5"):
    slot_attention.attend_slots(x, x, x, jnp.ones((1, 4), bool))

"""Optimisers: the chain of each, the schedule and what decays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tokjax.train import optimizer
from tokjax.train.optimizer import OptimizerConfig


class Net(nnx.Module):
  """Every kind of parameter: stacked layers, embedding, norm."""

  def __init__(self, rngs):
    keys = jax.random.split(rngs.params(), 3)
    self.blocks = jax.vmap(lambda k: nnx.Linear(4, 6, rngs=nnx.Rngs(k)))(keys)
    self.words = nnx.Embed(5, 4, rngs=rngs)
    self.norm_mlp = nnx.LayerNorm(4, rngs=rngs)


@pytest.fixture
def net():
  return Net(nnx.Rngs(0))


def test_mask_spares_biases_norms_and_single_axes(net):
  net.norm_mlp.projection = nnx.Param(jnp.ones((2, 2)))  # inside a norm
  net.gate = nnx.Param(jnp.ones(3))
  mask = optimizer.decay_mask(net, OptimizerConfig().no_decay)
  got = {
    jax.tree_util.keystr(path, simple=True, separator="."): decays
    for path, decays in jax.tree_util.tree_leaves_with_path(mask)
  }
  assert got == {
    "blocks.bias.value": False,  # of shape [3, 6]
    "blocks.kernel.value": True,
    "gate.value": False,
    "norm_mlp.bias.value": False,
    "norm_mlp.projection.value": False,
    "norm_mlp.scale.value": False,
    "words.embedding.value": True,
  }


def test_decay_moves_masked_in_parameters_only(net):
  config = OptimizerConfig(
    learning_rate=0.5, schedule="constant", weight_decay=0.1
  )
  transform = optimizer.make(config, 10)
  zero = jax.tree.map(jnp.zeros_like, net)
  updates, _ = transform.update(zero, transform.init(net), net)
  np.testing.assert_allclose(
    updates.blocks.kernel[...], -0.05 * net.blocks.kernel[...], rtol=1e-6
  )
  np.testing.assert_array_equal(updates.blocks.bias[...], np.zeros((3, 6)))
  np.testing.assert_array_equal(updates.norm_mlp.scale[...], np.zeros(4))


def test_adamw_is_the_textbook_loop():
  config = OptimizerConfig(
    learning_rate=0.1,
    warmup_steps=2,
    schedule="linear",
    weight_decay=0.3,
    clip_norm=1.0,
    b1=0.8,
    b2=0.9,
    epsilon=1e-6,
  )
  rng = np.random.default_rng(0)
  w = rng.normal(size=(3, 2))
  gradients = rng.normal(size=(5, 3, 2)) * 3
  transform = optimizer.make(config, 6)
  params = {"kernel": jnp.asarray(w, jnp.float32)}
  state = transform.init(params)
  mean, square = np.zeros_like(w), np.zeros_like(w)
  rates = [0.0, 0.05, 0.1, 0.075, 0.05]
  for step, g in enumerate(gradients):
    updates, state = transform.update(
      {"kernel": jnp.asarray(g, jnp.float32)}, state, params
    )
    params = optax.apply_updates(params, updates)
    g = g / max(1.0, np.sqrt((g**2).sum()))
    mean, square = 0.8 * mean + 0.2 * g, 0.9 * square + 0.1 * g**2
    m, v = mean / (1 - 0.8 ** (step + 1)), square / (1 - 0.9 ** (step + 1))
    w = w - rates[step] * (m / (np.sqrt(v) + 1e-6) + 0.3 * w)
  np.testing.assert_allclose(params["kernel"], w, rtol=1e-5)


@pytest.mark.parametrize(
  ("config", "want"),
  [
    (OptimizerConfig(learning_rate=2.0, schedule="constant"), [2, 2, 2, 2, 2]),
    (
      OptimizerConfig(
        learning_rate=2.0, schedule="linear", warmup_steps=1, final_ratio=0.25
      ),
      [0, 2, 1.5, 1, 0.5],
    ),
    (
      OptimizerConfig(learning_rate=2.0, warmup_steps=2, final_ratio=0.5),
      [0, 1, 2, 1.5, 1],
    ),
  ],
  ids=["constant", "linear", "cosine"],
)
def test_schedule_by_hand(config, want):
  rate = optimizer.schedule(config, 4)
  got = [float(rate(step)) for step in range(5)]
  np.testing.assert_allclose(got, want, rtol=1e-6)
  assert float(rate(9)) == pytest.approx(want[-1])  # stays


@pytest.mark.parametrize("name", optimizer.NAMES)
def test_every_optimizer_lowers_a_quadratic(name, net):
  config = OptimizerConfig(name=name, learning_rate=0.02, clip_norm=None)
  transform = optimizer.make(config, 100)
  target = jax.tree.map(lambda x: x + 0.5, net)

  def loss_fn(params):
    return sum(
      jnp.sum((p - t) ** 2)
      for p, t in zip(
        jax.tree.leaves(params), jax.tree.leaves(target), strict=True
      )
    )

  @jax.jit
  def step(params, state):
    updates, state = transform.update(jax.grad(loss_fn)(params), state, params)
    return optax.apply_updates(params, updates), state

  params, state = net, transform.init(net)
  for _ in range(60):
    params, state = step(params, state)
  assert isinstance(params, Net)
  assert loss_fn(params) < 0.5 * loss_fn(net)


def test_clip_bounds_the_whole_gradient():
  config = OptimizerConfig(
    "sgd", 1.0, schedule="constant", clip_norm=0.5, b1=0.0
  )
  transform = optimizer.make(config, 10)
  params = {"a": jnp.zeros(1), "b": jnp.zeros((1, 1))}
  gradient = {"a": jnp.full(1, 3.0), "b": jnp.full((1, 1), 4.0)}
  updates, _ = transform.update(gradient, transform.init(params), params)
  np.testing.assert_allclose(updates["a"], [-0.3], rtol=1e-6)
  np.testing.assert_allclose(updates["b"], [[-0.4]], rtol=1e-6)


def test_muon_takes_each_layer_of_a_stack_by_itself(net):
  config = OptimizerConfig("muon", 1.0, schedule="constant", clip_norm=None)
  transform = optimizer.make(config, 10)
  gradient = jax.tree.map(
    lambda x: jax.random.normal(jax.random.key(1), x.shape), net
  )
  updates, state = transform.update(gradient, transform.init(net), net)
  # Orthogonal rows, times 0.2 sqrt(6); Newton-Schulz leaves them near 1.
  for update in np.asarray(updates.blocks.kernel[...]):
    values = np.linalg.svd(update, compute_uv=False) / (0.2 * 6**0.5)
    assert (values > 0.6).all() and (values < 1.3).all(), values
  # Adam's first step is the sign.
  np.testing.assert_allclose(
    updates.words.embedding[...],
    -np.sign(gradient.words.embedding[...]),
    rtol=1e-4,
  )


def test_adafactor_stores_rows_and_columns():
  transform = optimizer.make(OptimizerConfig("adafactor"), 10)
  state = transform.init({"kernel": jnp.ones((256, 128))})
  assert sum(x.size for x in jax.tree.leaves(state)) < 500


@pytest.mark.parametrize(
  ("config", "message"),
  [
    (OptimizerConfig("adam"), "name must be one of 'adamw'"),
    (OptimizerConfig(schedule="step"), "schedule must be one of 'constant'"),
    (OptimizerConfig(warmup_steps=11), "warmup_steps must lie in 0..10"),
    (OptimizerConfig(b1=1.5), "b1 must lie in 0..1"),
    (OptimizerConfig(final_ratio=2.0), "final_ratio must lie in 0..1"),
    (OptimizerConfig(weight_decay=-0.1), "weight_decay must lie in 0"),
  ],
)
def test_bad_settings_are_named(config, message):
  with pytest.raises(ValueError, match=message):
    optimizer.make(config, 10)


def test_what_is_frozen_stays_and_is_not_in_the_norm():
  params = {"encoder": jnp.ones((2, 2)), "head": jnp.ones((2, 2))}
  gradient = {"encoder": jnp.full((2, 2), 100.0), "head": jnp.full((2, 2), 0.1)}
  config = OptimizerConfig(
    name="sgd", b1=0.0, learning_rate=1.0, schedule="constant", clip_norm=1.0,
    weight_decay=0.5, frozen=("^encoder",),
  )  # fmt: skip
  transform = optimizer.make(config, 10)
  update, _ = transform.update(gradient, transform.init(params), params)
  np.testing.assert_array_equal(update["encoder"], 0)
  np.testing.assert_allclose(update["head"], -0.6, rtol=1e-6)  # -(0.1 + 0.5)
  lost = dataclasses.replace(config, frozen=("^decoder",))
  with pytest.raises(ValueError, match="frozen matches no parameter"):
    optimizer.make(lost, 10).init(params)
  assert optimizer.frozen_mask(params, ("head$",)) == {
    "encoder": False, "head": True,
  }  # fmt: skip

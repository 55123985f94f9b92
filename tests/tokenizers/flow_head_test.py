"""The flow head: exact velocities, guidance, time, learning."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.compiled import compiled
from tokjax.tokenizers import flow_head
from tokjax.tokenizers.flow_head import FlowHead, FlowHeadConfig

flows = compiled(flow_head)
CONFIG = FlowHeadConfig(
  2, 3, width=8, num_blocks=2, num_frequencies=4, mean=1.0, deviation=2.0
)


@functools.cache
def head():
  return jax.jit(lambda: FlowHead(CONFIG, rngs=nnx.Rngs(0)))()


class Exact:
  """Goes straight to its condition, wherever it is: v = (z - x) / t."""

  config = FlowHeadConfig(2, 2, mean=1.0, deviation=2.0)

  def __call__(self, x, time, condition):
    return (condition - x) / time[..., None]


@pytest.mark.parametrize("num_steps", [1, 3, 16])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_straight_lines_end_where_they_should(num_steps, shift):
  z = jnp.array([[0.5, -1.0], [2.0, 0.0]])

  @jax.jit
  def draw(key, z):
    return flow_head.flow_sample(
      key, Exact(), (z,), weights=(), num_steps=num_steps, time_shift=shift
    )

  got = draw(jax.random.key(0), z)
  np.testing.assert_allclose(got, 2 * z + 1, atol=1e-5)


class Constant:
  """The condition is the velocity."""

  config = FlowHeadConfig(1, 1, mean=0.0, deviation=1.0)

  def __call__(self, x, time, condition):
    return condition


def drawn(conditions, **settings):
  conditions = tuple(jnp.array([[c]]) for c in conditions)

  @jax.jit
  def draw(key):
    return flow_head.flow_sample(
      key, Constant(), conditions, temperature=0.0, **settings
    )

  return float(draw(jax.random.key(0))[0, 0])


def test_guidance_is_the_published_sum():
  # v_u = 0, v_tu = .2, v_c = 1: 1.1 * .2 + 3 * .8
  assert drawn((1.0, 0.2, 0.0)) == pytest.approx(2.62)
  assert drawn((1.0, 0.2, 0.0), weights=(1.0, 1.0)) == pytest.approx(1)
  assert drawn((1.0, 0.2), weights=(2.0,)) == pytest.approx(0.2 + 2 * 0.8)
  kept = drawn((1.0, 0.2, 0.0), renormalize=True)
  assert kept == pytest.approx(1)
  with pytest.raises(ValueError, match="weights_and_one=3, conditions=1"):
    drawn((1.0,))


def test_a_new_head_moves_nothing_and_its_loss_is_that_of_zero():
  z, condition = np.float32([[3.0, -1.0]]), np.ones((1, 3), np.float32)
  got = flows.flow_sample(jax.random.key(1), head(), (condition,), weights=())
  noise = jax.random.normal(jax.random.key(1), (1, 2))
  np.testing.assert_allclose(got, 2 * noise + 1, rtol=1e-5)
  loss = flows.flow_loss(jax.random.key(2), head(), condition, z)
  noise = jax.random.normal(jax.random.split(jax.random.key(2))[0], (1, 2))
  want = np.mean(np.square((z - 1) / 2 - noise), axis=-1)
  np.testing.assert_allclose(loss, want, rtol=1e-5)


def test_learns_two_tokens_by_their_conditions():
  z = jnp.array([[3.0, -1.0], [-2.0, 1.0]])
  conditions = jnp.eye(3)[:2]
  optimizer = optax.adam(1e-2)

  @jax.jit
  def fit(model):
    def loss(model, key):
      many = jnp.tile(conditions, (32, 1)), jnp.tile(z, (32, 1))
      return jnp.mean(flow_head.flow_loss(key, model, *many))

    def step(carry, key):
      model, state = carry
      value, gradient = jax.value_and_grad(loss)(model, key)
      updates, state = optimizer.update(gradient, state)
      return (optax.apply_updates(model, updates), state), value

    keys = jax.random.split(jax.random.key(0), 400)
    (model, _), values = jax.lax.scan(
      step, (model, optimizer.init(model)), keys
    )
    drawn = flow_head.flow_sample(
      jax.random.key(9), model, (conditions,), weights=()
    )
    return values, drawn

  values, drawn = fit(head())
  assert values[-20:].mean() < 0.2 * values[:20].mean()
  np.testing.assert_allclose(drawn, z, atol=0.5)

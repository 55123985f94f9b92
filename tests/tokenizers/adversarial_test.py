"""Discriminator and adversarial losses: numbers, and who gets a gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.compiled import compiled, run
from tokjax.tokenizers import adversarial
from tokjax.tokenizers.adversarial import AdversarialConfig, AdversarialState
from tokjax.tokenizers.discriminator import Discriminator, DiscriminatorConfig

TINY = DiscriminatorConfig(width=4, num_layers=1, groups=4)
f = compiled(adversarial)


@functools.cache
def build(norm="group"):
  config = dataclasses.replace(TINY, norm=norm)
  model = jax.jit(lambda: Discriminator(config, rngs=nnx.Rngs(0)))()
  random = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: (x + 0.2 * random.normal(size=x.shape)).astype(np.float32), model
  )


def images(seed=0, batch=2):
  random = np.random.default_rng(seed)
  return random.normal(size=(batch, 8, 8, 3)).astype(np.float32)


def convolved(x, layer, stride):
  kernel = np.asarray(layer.kernel[...], np.float64)
  x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  side = (x.shape[1] - 4) // stride + 1
  out = np.zeros((len(x), side, side, kernel.shape[-1]))
  for i in range(side):
    for j in range(side):
      a, b = i * stride, j * stride
      window = x[:, a : a + 4, b : b + 4]
      out[:, i, j] = np.einsum("bhwc,hwcd->bd", window, kernel)
  return out if layer.bias is None else out + np.asarray(layer.bias[...])


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_discriminator_equals_loops(norm):
  model, x = build(norm), images()
  got = run(model, x)
  y = convolved(x.astype(np.float64), model.convs[0], 2)
  y = np.where(y > 0, y, 0.2 * y)
  y = convolved(y, model.convs[1], 1)
  if norm == "group":
    parts = y.reshape(*y.shape[:3], 4, 2)
    mean, var = (z((1, 2, 4), keepdims=True) for z in (parts.mean, parts.var))
    y = ((parts - mean) / np.sqrt(var + 1e-5)).reshape(y.shape)
  else:
    y = (y - y.mean((0, 1, 2))) / np.sqrt(y.var((0, 1, 2)) + 1e-5)
  y = y * np.asarray(model.scales[0]) + np.asarray(model.shifts[0])
  y = np.where(y > 0, y, 0.2 * y)
  want = convolved(y, model.conv_out, 1)[..., 0]
  assert got.shape == (2, 2, 2) and got.dtype == jnp.float32
  np.testing.assert_allclose(got, want, atol=1e-4)


def test_published_discriminator_sees_70_pixels():
  model = nnx.eval_shape(
    lambda: Discriminator(DiscriminatorConfig(), rngs=nnx.Rngs(0))
  )
  assert [c.kernel.shape[-1] for c in model.convs] == [64, 128, 256, 512]
  x = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
  seen = jax.eval_shape(lambda model, x: model(x), model, x)
  assert seen.shape == (1, 30, 30)
  seen = 1
  for stride in (1, 1, 2, 2, 2):  # from the logits back
    seen = (seen - 1) * stride + 4
  assert seen == 70


def test_worked_example_of_the_hinge():
  real, fake = np.float32([0.5]), np.float32([-0.2])
  assert float(f.discriminator_hinge(real, fake)) == pytest.approx(0.65)
  assert float(f.generator_hinge(fake)) == pytest.approx(0.2)
  # Beyond the margin nothing pulls.
  real, fake = np.float32([1.5]), np.float32([-3])
  assert float(f.discriminator_hinge(real, fake)) == 0


def test_gate_opens_at_its_step():
  steps = np.arange(4)
  np.testing.assert_array_equal(run(adversarial.gate, steps, 2), [0, 0, 1, 1])


def test_lecam_by_hand_and_without_gradient_to_the_means():
  found = AdversarialState(np.float32(2), np.float32(-1))
  state = AdversarialState(np.float32(1), np.float32(0.5))
  value, gradients = jax.jit(
    jax.value_and_grad(adversarial.lecam, (0, 1))
  )(found, state)  # fmt: skip
  assert float(value) == 1.5**2 + 2**2
  assert [float(x) for x in gradients[0]] == [3.0, -4.0]
  assert [float(x) for x in gradients[1]] == [0.0, 0.0]


def test_r1_is_the_squared_slope():
  slope = images(3, 1)[0]
  model = lambda x: jnp.sum(x * slope[None], axis=(1, 2, 3)) + 7  # noqa: E731
  got = f.r1_penalty(model, images())
  assert float(got) == pytest.approx((slope**2).sum(), rel=1e-5)


def test_adaptive_weight_balances_the_last_layer():
  h, w = images(1)[0, 0], np.float32(np.random.default_rng(2).normal(size=3))

  def nll(w):
    return jnp.mean(jnp.square(h @ w - 1))

  def gan(w):
    return -0.01 * jnp.mean(jnp.tanh(h @ w))

  got = run(adversarial.adaptive_weight, nll, gan, w)
  error = h.astype(np.float64) @ w - 1
  one = 2 * (error[:, None] * h).mean(0)
  two = -0.01 * ((1 - np.tanh(h @ w) ** 2)[:, None] * h).mean(0)
  want = np.linalg.norm(one) / (np.linalg.norm(two) + 1e-4)
  assert float(got) == pytest.approx(want, rel=1e-4)
  weight = functools.partial(adversarial.adaptive_weight, nll, gan)
  assert not np.any(jax.jit(jax.grad(weight))(w))
  still = run(adversarial.adaptive_weight, nll, lambda w: 0.0 * w[0], w)
  assert 0 < float(still) <= 1e4


FULL = AdversarialConfig(
  weight=0.5, start_step=2, lecam_weight=0.1, lecam_decay=0.9, r1_weight=2.0
)


@functools.partial(jax.jit, static_argnames="part")
def gradients(model, reconstructions, step, part):
  def value(model, x, r):
    state = AdversarialState(jnp.float32(0.3), jnp.float32(-0.2))
    found, state = adversarial.losses(
      FULL, model, x, r, state, step=step, balance=3.0
    )
    parts = {"generator": found.generator, "discriminator": found.discriminator}
    return parts.get(part, sum(parts.values())), (found, state)

  value = jax.value_and_grad(value, (0, 1, 2), has_aux=True)
  (_, aux), grads = value(model, images(), reconstructions)
  return aux, grads


def test_one_backward_pass_gives_each_side_its_own_gradient():
  model, r = build(), images(1)
  (found, state), both = gradients(model, r, 5, "both")
  _, generator = gradients(model, r, 5, "generator")
  _, teacher = gradients(model, r, 5, "discriminator")

  def largest(tree):
    return max(float(np.abs(x).max()) for x in jax.tree.leaves(tree))

  assert largest(generator[0]) == 0 and largest(generator[2]) > 0
  assert largest(teacher[0]) > 0 and largest(teacher[2]) == 0
  assert largest(both[1]) == 0  # real images get none
  same = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
  jax.tree.map(same, both[0], teacher[0])
  jax.tree.map(same, both[2], generator[2])
  real, fake = (np.asarray(run(model, x), np.float64) for x in (images(), r))
  assert float(found.generator) == pytest.approx(
    -0.5 * 3 * fake.mean(), rel=1e-4
  )
  hinge = (np.maximum(1 - real, 0).mean() + np.maximum(1 + fake, 0).mean()) / 2
  drift = max(real.mean() + 0.2, 0) ** 2 + max(0.3 - fake.mean(), 0) ** 2
  want = hinge + 0.1 * drift + 2 * float(found.stats["r1"])
  assert float(found.discriminator) == pytest.approx(want, rel=1e-4)
  assert float(found.stats["r1"]) > 0
  assert float(state.real) == pytest.approx(0.27 + 0.1 * real.mean(), abs=1e-5)
  assert float(state.fake) == pytest.approx(-0.18 + 0.1 * fake.mean(), abs=1e-5)


def test_before_the_start_nothing_moves():
  (found, state), grads = gradients(build(), images(1), 1, "both")
  assert float(found.generator) == float(found.discriminator) == 0
  assert all(not np.any(x) for x in jax.tree.leaves(grads))
  assert float(state.real) == pytest.approx(0.3)
  assert float(state.fake) == pytest.approx(-0.2)


def test_statistics_of_a_batch_are_those_of_all_devices():
  model, x, r = build("batch"), images(0, 8), images(1, 8)
  config = AdversarialConfig(start_step=0, lecam_weight=1.0)

  def losses(x, r, axis_name=None):
    return adversarial.losses(
      config, model, x, r, adversarial.init_state(), step=0,
      axis_name=axis_name,
    )  # fmt: skip

  want = run(losses, x, r)
  mesh = jax.make_mesh((8,), ("data",))
  local = functools.partial(losses, axis_name="data")
  with jax.set_mesh(mesh):
    shards = jax.device_put((x, r), jax.P("data"))
    got = jax.jit(
      jax.shard_map(local, in_specs=jax.P("data"), out_specs=jax.P())
    )(*shards)
  same = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  jax.tree.map(same, got, want)


@pytest.mark.unchecked
def test_errors():
  with pytest.raises(ValueError, match="norm must be one of 'group'"):
    adversarial.losses(
      FULL, build("batch"), images(), images(), adversarial.init_state(), step=0
    )
  with pytest.raises(ValueError, match="reconstructions must have the shape"):
    adversarial.losses(
      FULL, build(), images(), images(0, 3), adversarial.init_state(), step=0
    )
  with pytest.raises(ValueError, match="channels must be a multiple of 3"):
    Discriminator(dataclasses.replace(TINY, groups=3), rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="norm must be one of"):
    Discriminator(dataclasses.replace(TINY, norm="layer"), rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="height must lie in 6.."):
    jax.eval_shape(build(), jnp.zeros((1, 4, 8, 3)))

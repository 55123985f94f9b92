"""Losses of routers against sums in float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import compiled, run
from tokjax.ops import moe_losses as plain
from tokjax.ops import moe_routing

module = compiled(plain)
route = functools.partial(run, moe_routing.route, num_chosen=2)


def example(num_tokens=12):
  rng = np.random.default_rng(0)
  logits = 2 * rng.normal(size=(num_tokens, 8)).astype(np.float32)
  bias = 0.3 * rng.normal(size=8).astype(np.float32)
  return logits, rng.random(num_tokens) < 0.8, bias


def softmax(z):
  e = np.exp(z - z.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def test_the_worked_example():
  """Two tokens of four agree."""
  logits = np.array(
    [[2, 1, 0, -1], [2, 1, 0, -1], [0, 0, 1, 2], [2, 0, 1, -1]], np.float32
  )
  found = route(logits)
  loss = module.balance_loss(found.probabilities, found.counts)
  assert float(loss) == pytest.approx(1.163483, abs=1e-6)
  assert float(module.z_loss(logits)) == pytest.approx(6.020669, abs=1e-5)


def balance(probabilities, index, k):
  num_experts = probabilities.shape[1]
  counts = np.bincount(index.reshape(-1), minlength=num_experts)
  shares = counts / (k * len(index))
  return num_experts * (probabilities.mean(0) * shares).sum()


def test_losses_of_masked_tokens_and_of_sequences():
  logits, mask, _ = example(24)
  poisoned = np.where(mask[:, None], logits, np.nan)
  found = route(poisoned, mask)
  p, index = softmax(logits.astype(np.float64)), np.asarray(found.index)
  loss = module.balance_loss(found.probabilities, found.counts, mask)
  np.testing.assert_allclose(loss, balance(p[mask], index[mask], 2), rtol=1e-5)
  lse = np.log(np.exp(logits[mask].astype(np.float64)).sum(-1))
  np.testing.assert_allclose(
    module.z_loss(poisoned, mask), np.mean(lse**2), rtol=1e-5
  )
  pairs = [(i, mask[8 * i : 8 * i + 8]) for i in range(3)]
  want = [
    balance(p[8 * i : 8 * i + 8][m], index[8 * i : 8 * i + 8][m], 2)
    for i, m in pairs
  ]
  got = module.sequence_balance_loss(
    found.probabilities.reshape(3, 8, 8),
    found.index.reshape(3, 8, 2),
    mask.reshape(3, 8),
  )
  np.testing.assert_allclose(got, np.mean(want), rtol=1e-5)


def test_limits_of_the_balance():
  even = np.full((8, 8), 1 / 8, np.float32)
  counts = np.full(8, 2)
  assert float(module.balance_loss(even, counts)) == pytest.approx(1)
  sure = np.eye(8, dtype=np.float32)[np.zeros(8, int)]
  one_sided = np.array([8, 8, 0, 0, 0, 0, 0, 0])
  assert float(module.balance_loss(sure, one_sided)) == pytest.approx(4)


def test_nothing_counts():
  logits, mask, _ = example()
  nothing = ~mask & mask
  found = route(logits, nothing)
  for loss in (
    module.balance_loss(found.probabilities, found.counts, nothing),
    module.z_loss(logits, nothing),
  ):
    assert float(loss) == 0


def test_losses_over_devices_are_those_of_all_tokens():
  logits, mask, bias = example(16)

  def local(logits, mask, bias):
    found = moe_routing.route(logits, mask, num_chosen=2)
    sums = dict(axis_name="data")
    return (
      plain.balance_loss(found.probabilities, found.counts, mask, **sums),
      plain.z_loss(logits, mask, **sums),
      plain.balancing_bias(bias, found.counts, **sums),
    )

  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((4,), ("data",), auto, devices=jax.devices()[:4])
  spread = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(*(jax.P("data"),) * 2, jax.P()),
    out_specs=jax.P(),
  )
  got = jax.jit(spread)(logits, mask, bias)
  found = route(logits, mask)
  counts = np.asarray(found.counts)
  want = (
    module.balance_loss(found.probabilities, found.counts, mask),
    module.z_loss(logits, mask),
    bias + 1e-3 * np.sign(counts.mean() - counts),
  )
  for g, w in zip(got, want, strict=True):
    np.testing.assert_allclose(g, w, rtol=1e-5)


def test_gradient_of_the_balance():
  """Through probabilities only: shares of choices are constants."""
  logits, mask, _ = example()

  def loss(logits, mask):
    found = moe_routing.route(logits, mask, num_chosen=2)
    return plain.balance_loss(found.probabilities, found.counts, mask)

  got = jax.jit(jax.grad(loss))(logits, mask)
  p = softmax(logits.astype(np.float64))
  index = np.argsort(-p, axis=1)[mask, :2]
  share = np.bincount(index.reshape(-1), minlength=8) / (2 * mask.sum())
  pull = p * (share - (p * share).sum(1, keepdims=True))
  want = 8 * pull * mask[:, None] / mask.sum()
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-7)


def test_bias_evens_out_the_load():
  """Experts that all prefer lose their lead, at any k."""
  rng = np.random.default_rng(1)
  logits = rng.normal(size=(64, 4)) + [2, 0, 0, 0]
  logits = jnp.asarray(logits, jnp.float32)

  def step(bias, _):
    found = moe_routing.route(logits, None, bias, num_chosen=1, score="sigmoid")
    return plain.balancing_bias(bias, found.counts, rate=0.01), found.counts

  run = jax.jit(lambda bias: jax.lax.scan(step, bias, length=200))
  _, counts = run(jnp.zeros(4))
  assert counts[0].max() > 40
  assert math.isclose(counts[-1].max(), 16, abs_tol=3)


@pytest.mark.unchecked
def test_errors_name_the_argument():
  rows = jnp.zeros((4, 8))
  with pytest.raises(ValueError, match="counts=7, experts=8"):
    plain.balance_loss(rows, jnp.zeros(7, int))
  with pytest.raises(ValueError, match=r"mask must be of the tokens \(4,\)"):
    plain.z_loss(rows, jnp.ones(3, bool))
  with pytest.raises(ValueError, match="bias=8, counts=7"):
    plain.balancing_bias(jnp.zeros(8), jnp.zeros(7, int))

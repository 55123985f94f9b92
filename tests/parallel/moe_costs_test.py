"""The cost model against compiled programs and numbers worked by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from tests.parallel import moe_layers
from tokjax.benchmarks import compiled_bytes
from tokjax.parallel import moe_costs, moe_folding, moe_weights
from tokjax.parallel.moe_costs import MoeSent, Workload
from tokjax.parallel.moe_weights import MoeConfig

H100 = dict(flops=989e12, near_rate=450e9, far_rate=50e9, domain=8)


def bytes_sent(text, ep, etp):
  """What a device sends to others, by the shapes in a compiled program."""
  found = compiled_bytes.results(text)
  return MoeSent(
    found["all-to-all"] * (ep - 1) / ep,
    found["all-gather"] * (etp - 1) / etp  # of the result
    + found["reduce-scatter"] * (etp - 1),
  )


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
  ("attention", "ep", "etp"),
  [(dict(dp=2, cp=2, tp=2), 8, 1), (dict(cp=2, tp=2), 2, 2)],
)
def test_bytes_are_those_of_the_compiled_program(attention, ep, etp, backward):
  config = MoeConfig(num_experts=8, num_chosen=2, capacity_factor=2.0)
  folded = moe_layers.folded_mesh(attention, dict(ep=ep, etp=etp))
  weights = moe_layers.weights_of(config)
  x, _, _ = moe_layers.example(batch=4, length=16)

  def layer(x, weights):
    return moe_folding.moe_layer(
      x, weights, config=config, folded=folded
    ).output

  spec = jax.P(folded.dp, folded.sequence)
  x = jax.device_put(
    jnp.nan_to_num(x), jax.sharding.NamedSharding(folded.mesh, spec)
  )
  weights = jax.tree.map(
    lambda w, spec: jax.device_put(
      w, jax.sharding.NamedSharding(folded.mesh, spec)
    ),
    weights,
    moe_weights.weight_specs(weights, folded),
  )
  forward = jax.jit(lambda x, w: jax.vjp(layer, x, w))
  program = forward.lower(x, weights).compile()
  if backward:
    output, back = program(x, weights)
    pull = jax.jit(lambda back, d_out: back(d_out))
    program = pull.lower(back, output).compile()
  tokens = x.size // 6 // folded.size(folded.tokens)
  work = Workload(
    tokens, 6, 4, 2, ep, etp, room=2.0, itemsize=4, backward=backward
  )
  assert bytes_sent(program.as_text(), ep, etp) == moe_costs.sent(work)


def test_bytes_and_products_by_hand():
  work = Workload(100, 8, 32, num_chosen=3, ep=4, etp=2, room=1.5)
  assert work.rows == 450
  assert moe_costs.sent(work) == MoeSent(2 * 450 * 16 * 3 / 4, 2 * 450 * 16)
  assert work.flops == 6 * 450 * 8 * 32
  plain = dataclasses.replace(work, gated=False, backward=True)
  assert plain.flops == 8 * 450 * 8 * 32


def test_one_device_sends_nothing():
  work = Workload(100, 8, 32)
  assert moe_costs.sent(work) == MoeSent(0, 0)
  time = moe_costs.seconds(work, **H100)
  assert time == (work.flops / 989e12, 0, 0)


@pytest.mark.parametrize(
  ("hidden", "link_rate", "want"),
  [
    (16384, 450e9, 0.09),
    (2560, 450e9, 0.57),
    (16384, 50e9, 0.80),
    (2560, 50e9, 5.2),
  ],
)
def test_ratios_of_published_experts(hidden, link_rate, want):
  got = moe_costs.exchange_ratio(hidden, flops=989e12, link_rate=link_rate)
  assert got == pytest.approx(want, abs=0.05 if want > 1 else 0.005)


def test_links_that_a_group_takes():
  """ep of 4: in a domain of 8 whole, half, or one by one."""
  work = Workload(100, 8, 32, ep=4)
  amount = moe_costs.sent(work).exchange

  def time(stride):
    there = dataclasses.replace(work, stride=stride)
    return moe_costs.seconds(there, **H100).exchange

  assert time(1) == time(2) == amount / 450e9
  assert time(4) == pytest.approx(amount * 2 / 3 / 50e9)
  assert time(8) == time(64) == amount / 50e9


def test_folding_pays_for_small_experts():
  """Eight-way experts beside tp 2 and cp 4, in domains of 8."""

  def gain(hidden):
    work = Workload(4096, 4096, hidden, ep=8)
    apart = moe_costs.unfolded(work, tp=2, cp=4)
    assert (apart.ep, apart.etp, apart.stride) == (4, 2, 8)
    assert apart.flops == work.flops
    return sum(moe_costs.seconds(apart, **H100)) / sum(
      moe_costs.seconds(work, **H100)
    )

  assert gain(1408) > gain(16384) > 1
  assert gain(1408) > 3


@pytest.mark.unchecked
def test_errors_name_the_argument():
  work = Workload(100, 8, 32, ep=4)
  with pytest.raises(ValueError, match="devices_of_all_experts must be a mult"):
    moe_costs.unfolded(work, tp=3)
  with pytest.raises(ValueError, match="ep must lie in 1..inf, got 0"):
    moe_costs.sent(Workload(100, 8, 32, ep=0))
  with pytest.raises(ValueError, match="domain must lie in 1..inf, got 0"):
    moe_costs.seconds(work, **{**H100, "domain": 0})

"""Experts spread over devices against all of them on one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import run
from tests.parallel import moe_layers
from tests.parallel.moe_layers import assert_close, folded_mesh, found, oracle
from tokjax.ops import moe_losses, moe_routing
from tokjax.parallel import moe_folding, moe_weights
from tokjax.parallel.moe_weights import MoeConfig

CONFIG = MoeConfig(num_experts=8, num_chosen=2)
ALONE = (dict(tp=1), {})
EP_OVER_TP = (dict(tp=4), dict(ep=4))
EP_OVER_SEQUENCE = (dict(dp=2, cp=2, tp=2), dict(ep=4))
EP_OVER_ALL = (dict(dp=2, cp=2, tp=2), dict(ep=8))
EP_INSIDE_CP = (dict(cp=4, tp=2), dict(ep=2, etp=2))  # cp is cut in two
ETP = (dict(dp=2, tp=2), dict(ep=2, etp=2))


@pytest.mark.parametrize(
  ("layout", "exchange"),
  [
    (ALONE, "capacity"),
    (EP_OVER_TP, "padded"),
    (EP_OVER_ALL, "capacity"),
    (EP_INSIDE_CP, "padded"),
    (ETP, "capacity"),
  ],
)
def test_equals_the_layer_on_one_device(layout, exchange):
  """Outputs, losses, and gradients of tokens and of all weights."""
  config = dataclasses.replace(CONFIG, exchange=exchange, buffer_factor=8.0)
  got, overflow = found(config, layout)
  assert overflow == 0
  assert_close(got, oracle(CONFIG))


@pytest.mark.parametrize(
  ("layout", "settings"),
  [
    (EP_OVER_ALL, dict(policy="probs")),
    (
      EP_OVER_SEQUENCE,
      dict(policy="position", exchange="padded", score="sigmoid", num_chosen=3),
    ),
  ],
)
def test_capacity_of_sequences_does_not_depend_on_the_layout(layout, settings):
  config = dataclasses.replace(
    CONFIG,
    capacity_factor=1.0,
    drop_over="sequence",
    buffer_factor=8.0,
    **settings,
  )
  want = oracle(config)
  assert 0 < want.dropped < 32
  got, overflow = found(config, layout)
  assert overflow == 0
  assert_close(got, want)
  if config.score == "sigmoid":
    np.testing.assert_array_equal(got.gradients[1].bias, 0)


def test_capacity_of_devices_is_that_of_their_tokens():
  """Every device is a layer of its own with the capacity of 8 tokens."""
  config = dataclasses.replace(CONFIG, capacity_factor=1.25)
  got, _ = found(config, (dict(dp=4), dict(ep=4)))
  x, mask, d_out = moe_layers.example()
  weights = moe_layers.weights_of(config)
  alone = [  # devices have one sequence each
    moe_layers.alone(*(a[i : i + 1] for a in (x, mask)), weights,
                     d_out[i : i + 1], config)
    for i in range(4)
  ]  # fmt: skip
  assert_close(got.output, np.concatenate([one.output for one in alone]))
  dropped = [int(one.dropped) for one in alone]
  assert int(got.dropped) == sum(dropped) > 0
  assert_close(got.losses, oracle(CONFIG).losses)  # counts are before dropping


def test_losses_of_rank_groups_and_counts_of_all():
  x, mask, _ = moe_layers.example()
  config = dataclasses.replace(CONFIG, capacity_factor=0.5)
  weights = moe_layers.weights_of(config)
  folded = folded_mesh(*EP_OVER_SEQUENCE)
  layer = functools.partial(moe_folding.moe_layer, config=config, folded=folded)
  got = jax.jit(lambda *a: layer(*a)._replace(output=None))(x, weights, mask)
  want, counts = [], 0
  for half in (slice(0, 2), slice(2, 4)):
    logits = np.where(mask[half, :, None], x[half], 0) @ weights.router
    routing = run(moe_routing.route, logits, mask[half], num_chosen=2)
    loss = run(
      moe_losses.balance_loss,
      routing.probabilities,
      routing.counts,
      mask[half],
    )
    want.append(loss)
    counts = counts + np.asarray(routing.counts)
  np.testing.assert_allclose(got.losses.group, np.mean(want), rtol=1e-5)
  assert abs(got.losses.group - got.losses.everywhere) > 1e-4
  np.testing.assert_array_equal(got.counts, counts)  # before dropping
  assert int(got.dropped) > 0


def test_explicit_meshes():
  x, mask, d_out = moe_layers.example()
  weights = moe_layers.weights_of(CONFIG)
  folded = folded_mesh(*EP_OVER_SEQUENCE, jax.sharding.AxisType.Explicit)
  with jax.set_mesh(folded.mesh):
    tokens = jax.P(folded.dp, folded.sequence)
    x, mask = (jax.device_put(a, tokens) for a in (x, mask))
    weights = jax.tree.map(
      jax.device_put, weights, moe_weights.weight_specs(weights, folded)
    )
    layer = functools.partial(
      moe_folding.moe_layer, config=CONFIG, folded=folded
    )
    output = jax.jit(lambda *a: layer(*a).output)(x, weights, mask)
  assert jax.typeof(output).sharding.spec == jax.P(*tokens, None)
  assert_close(output, oracle(CONFIG).output)


def test_inside_of_a_shard_map_of_ones_own():
  """As a layer between others, on the tokens that a device has."""
  x, _, _ = moe_layers.example(batch=2)
  x = np.nan_to_num(x)
  weights = moe_layers.weights_of(CONFIG)
  folded = folded_mesh(dict(tp=4), dict(ep=2))
  tokens = jax.P(folded.dp, folded.sequence)

  def local(x, weights):
    found = moe_folding.moe_shard(x, weights, config=CONFIG, folded=folded)
    return x + found.output

  around = jax.shard_map(
    local,
    mesh=folded.mesh,
    in_specs=(tokens, moe_weights.weight_specs(weights, folded)),
    out_specs=tokens,
  )
  got = jax.jit(around)(x, weights)
  layer = functools.partial(
    moe_folding.moe_layer, config=CONFIG, folded=folded_mesh(*ALONE)
  )
  assert_close(got, x + jax.jit(lambda *a: layer(*a).output)(x, weights))


def test_new_weights():
  config = dataclasses.replace(CONFIG, score="sigmoid")
  weights = run(
    moe_weights.init_moe, jax.random.key(0), config, width=64, hidden=32
  )
  for w, inputs in (
    (weights.router, 64),
    (weights.experts.up, 64),
    (weights.experts.gate, 64),
    (weights.experts.down, 32),
  ):
    assert float(jnp.std(w)) == pytest.approx(inputs**-0.5, rel=0.1)
  np.testing.assert_array_equal(weights.bias, np.zeros(8))


@pytest.mark.unchecked
@pytest.mark.parametrize(
  ("settings", "shape", "error", "match"),
  [
    (dict(exchange="post"), (4, 8), ValueError, "exchange must be one of"),
    (dict(drop_over="day"), (4, 8), ValueError, "drop_over must be one of"),
    (dict(num_experts=6), (4, 8), ValueError, "num_experts must be a multiple"),
    ({}, (3, 8), ValueError, "batch must be a multiple of 2, got 3"),
    ({}, (4, 6), ValueError, "sequence must be a multiple of 4, got 6"),
    (dict(exchange="ragged"), (4, 8), NotImplementedError, "use 'padded'"),
  ],
)
def test_errors_name_the_argument(settings, shape, error, match):
  config = dataclasses.replace(CONFIG, **settings)
  weights = moe_layers.weights_of(config)
  layer = functools.partial(
    moe_folding.moe_layer,
    config=config,
    folded=folded_mesh(*EP_OVER_SEQUENCE),
  )
  with pytest.raises(error, match=match):
    jax.eval_shape(layer, jnp.zeros((*shape, 6)), weights)

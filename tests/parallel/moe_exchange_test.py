"""Rows that travel between devices: which, how many, and what has no room."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parallel import moe_layers
from tests.parallel.moe_layers import assert_close, folded_mesh, found, oracle
from tokjax.parallel import moe_exchange, moe_folding, moe_weights
from tokjax.parallel.moe_weights import MoeConfig

CONFIG = MoeConfig(num_experts=8, num_chosen=2)
EP_OVER_TP = (dict(tp=4), dict(ep=4))
EP_OVER_ALL = (dict(dp=2, cp=2, tp=2), dict(ep=8))
ETP = (dict(dp=2, tp=2), dict(ep=2, etp=2))


def test_what_overflows_is_counted_and_left_out():
  config = dataclasses.replace(CONFIG, exchange="padded", buffer_factor=0.5)
  got, overflow = found(config, ETP)
  want = oracle(CONFIG)
  assert overflow > 0
  assert int(got.dropped) == 0
  same = np.isclose(got.output, want.output, atol=1e-5).all(-1)
  assert 32 - overflow <= same.sum() < 32
  for gradient in jax.tree.leaves(got.gradients):
    assert np.isfinite(gradient).all()


def collectives(text):
  names = (
    r"(all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute)"
  )
  return sorted(re.findall(rf" {names}(?:-start)?\(", text))


@pytest.mark.parametrize(
  ("layout", "exchange", "want"),
  [
    (EP_OVER_ALL, "capacity", ["all-to-all"] * 2),
    (EP_OVER_TP, "capacity", ["all-to-all"] * 2),
    (EP_OVER_TP, "padded", ["all-to-all"] * 3),  # and the counts
    (ETP, "capacity", ["all-gather"] + ["all-to-all"] * 2 + ["reduce-scatter"]),
  ],
)
def test_nothing_else_is_sent(layout, exchange, want):
  """From the layout of attention to that of experts and back."""
  config = dataclasses.replace(CONFIG, exchange=exchange, capacity_factor=1.0)
  x, _, _ = moe_layers.example()
  weights = moe_layers.weights_of(config)
  folded = folded_mesh(*layout)

  def place(x, spec):
    return jax.device_put(x, jax.sharding.NamedSharding(folded.mesh, spec))

  x = place(x, jax.P(folded.dp, folded.sequence))
  weights = jax.tree.map(
    place, weights, moe_weights.weight_specs(weights, folded)
  )
  layer = jax.jit(
    lambda x, weights: (
      moe_folding.moe_layer(x, weights, config=config, folded=folded).output
    )
  )
  text = layer.lower(x, weights).compile().as_text()
  assert collectives(text) == want


def ragged_all_to_all(
  operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *,
  axis_name,
):  # fmt: skip
  """What devices that have it do, by sending everything to all."""
  rows, begin, number, place = jax.lax.all_gather(
    (operand, input_offsets, send_sizes, output_offsets), axis_name
  )
  me = jax.lax.axis_index(axis_name)
  for source in range(rows.shape[0]):
    at = jnp.arange(output.shape[0]) - place[source, me]
    comes = (at >= 0) & (at < number[source, me])
    comes &= at < recv_sizes[source]  # both sides must agree
    row = rows[source, jnp.where(comes, begin[source, me] + at, 0)]
    output = jnp.where(comes[:, None], row, output)
  return output


@pytest.mark.parametrize(
  ("layout", "buffer_factor"), [(EP_OVER_TP, 0.75), (ETP, 8.0)]
)
def test_ragged_places_every_row(monkeypatch, layout, buffer_factor):
  monkeypatch.setattr(moe_exchange, "_check_ragged", lambda mesh: None)
  monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
  config = dataclasses.replace(
    CONFIG, exchange="ragged", buffer_factor=buffer_factor
  )
  got, overflow = found(config, layout)
  want = oracle(CONFIG)
  if buffer_factor > 1:
    assert overflow == 0
    assert_close(got, want)
  else:
    assert overflow > 0
    same = np.isclose(got.output, want.output, atol=1e-5).all(-1)
    assert 32 - overflow <= same.sum() < 32


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_ragged_is_lowered_for_devices_that_have_it(platform):
  config = dataclasses.replace(CONFIG, exchange="ragged")
  x, _, _ = moe_layers.example()
  weights = moe_layers.weights_of(config)
  folded = folded_mesh(*ETP)
  anywhere = dataclasses.replace(folded, mesh=folded.mesh.abstract_mesh)

  def loss(x, weights):
    layer = moe_folding.moe_layer(x, weights, config=config, folded=anywhere)
    return jnp.sum(layer.output**2)

  traced = jax.jit(jax.grad(loss, (0, 1))).trace(x, weights)
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  assert text.count("ragged_all_to_all") == 4  # there and back, twice

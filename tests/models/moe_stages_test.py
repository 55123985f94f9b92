"""Stages of the model, on devices of their own, against all of it on one."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from tests.parallel.moe_layers import folded_mesh
from tokjax.models import moe_transformer
from tokjax.models.moe_transformer import (
  MoeTransformer,
  MoeTransformerConfig,
  next_token_loss,
)
from tokjax.parallel import rules
from tokjax.parallel.moe_weights import MoeConfig

CONFIG = MoeTransformerConfig(
  vocab_size=16,
  width=16,
  num_layers=4,
  num_heads=4,
  num_key_heads=2,
  hidden=8,
  init_scale=0.2,
  balance_over="everywhere",  # the same however examples are cut
  moe=MoeConfig(num_experts=8, num_chosen=2),
  qkv_bias=True,
  shared_hidden=12,
  shared_gate=True,
)
ONE = ({}, {})
FOLDED = (dict(pp=2, dp=2, tp=2), dict(ep=4))
APART = (dict(pp=2, cp=2, tp=2), dict(ep=2, etp=2))
NUM_MICRO = 4


@functools.cache
def new_model():
  """With biases that are not zero."""
  model = jax.jit(lambda: MoeTransformer(CONFIG, rngs=nnx.Rngs(0)))()
  rng = np.random.default_rng(0)

  def moved(path, x):
    is_bias = rules.leaf_path(path).endswith("bias")
    return rng.normal(size=x.shape).astype(x.dtype) if is_bias else x

  return jax.tree.map_with_path(moved, jax.device_get(model))


def sentences():
  rng = np.random.default_rng(0)
  ids = rng.integers(0, 16, (8, 8)).astype(np.int32)
  mask = np.ones((8, 8), bool)
  mask[2, 5:] = False
  return ids, mask


@functools.cache
def program(sizes):
  """The model where its weights live, and its loss with gradients."""
  folded = folded_mesh(*(dict(axes) for axes in sizes))
  model = rules.shard(
    new_model(), folded.mesh, moe_transformer.placement(folded)
  )
  loss = functools.partial(next_token_loss, folded=folded, num_micro=NUM_MICRO)
  gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
  return model, gradient.lower(model, *sentences()).compile()


@functools.cache
def found(sizes):
  model, compiled = program(sizes)
  # One program at a time: there are fewer cores than devices.
  (value, told), gradients = jax.block_until_ready(
    compiled(model, *sentences())
  )
  return jax.device_get((value, told, gradients))


@functools.cache
def predict():
  folded = folded_mesh(*ONE)
  return jax.jit(lambda model, *given: model(*given, folded=folded))


def layout(sizes):
  return tuple(tuple(axes.items()) for axes in sizes)


@pytest.mark.parametrize("sizes", [FOLDED, APART], ids=["folded", "apart"])
def test_stages_have_the_gradients_of_one_device(sizes):
  value, told, gradients = found(layout(sizes))
  want_value, want, want_gradients = found(layout(ONE))
  np.testing.assert_allclose(value, want_value, rtol=1e-5)
  np.testing.assert_allclose(told.logits, want.logits, atol=1e-5)
  for name in ("sequence", "everywhere", "z"):
    got, expected = (getattr(x.losses, name) for x in (told, want))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
  # Bubbles count for nothing.
  np.testing.assert_array_equal(told.counts, want.counts)
  np.testing.assert_array_equal(told.counts.sum(1), 2 * sentences()[1].sum())
  assert told.dropped == told.overflow == 0
  for (path, got), expected in zip(
    jax.tree.leaves_with_path(gradients),
    jax.tree.leaves(want_gradients),
    strict=True,
  ):
    path = rules.leaf_path(path)
    assert np.abs(expected).max() > 1e-4, path
    np.testing.assert_allclose(got, expected, atol=1e-5, err_msg=path)


def test_layers_live_on_their_stage():
  model, compiled = program(layout(FOLDED))
  places = {
    rules.leaf_path(path): x.sharding.spec
    for path, x in jax.tree.leaves_with_path(model)
  }
  for path, place in places.items():
    assert ("pp" in place) == path.startswith("blocks/")
  assert places["blocks/up"] == jax.P("pp", ("dp", "tp"))
  assert places["blocks/queries/bias"] == jax.P("pp", "tp")
  assert places["blocks/shared/down/kernel"] == jax.P("pp", "tp")
  # One hand-over of a tick in the forward pass, one in the backward pass.
  lines = compiled.as_text().splitlines()
  sent = [line for line in lines if " collective-permute(" in line]
  assert sum("while/body" in line for line in sent) == 2


def test_micro_batches_are_routed_by_themselves():
  """Predictions and counts are those of the batch, losses are means."""
  _, told, _ = found(layout(ONE))
  ids, mask = sentences()
  run = predict()
  whole = run(new_model(), ids, mask)
  np.testing.assert_allclose(told.logits, whole.logits, atol=1e-5)
  np.testing.assert_array_equal(told.counts, whole.counts)
  parts = [
    run(new_model(), ids[m::NUM_MICRO], mask[m::NUM_MICRO]).losses
    for m in range(NUM_MICRO)
  ]
  for got, *each in zip(told.losses, *parts, strict=True):
    np.testing.assert_allclose(got, np.mean(each), rtol=1e-5)
  assert abs(told.losses.everywhere - whole.losses.everywhere) > 1e-3

"""Parts of a block; the model's tests have the rest."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.parallel.moe_layers import folded_mesh
from tokjax.models import moe_block
from tokjax.models.moe_block import (
  MoeBlock,
  MoeTransformerConfig,
  SharedExpert,
)
from tokjax.parallel.moe_weights import MoeConfig

CONFIG = MoeTransformerConfig(
  width=16,
  num_heads=4,
  num_key_heads=2,
  hidden=8,
  init_scale=0.2,
  moe=MoeConfig(num_experts=4, num_chosen=2),
  shared_hidden=12,
)


def example():
  return np.random.default_rng(0).normal(size=(2, 4, 16)).astype(np.float32)


@pytest.mark.parametrize("is_gated", [True, False])
def test_shared_expert_is_a_gated_mlp(is_gated):
  config = dataclasses.replace(CONFIG, shared_gate=is_gated)
  expert = jax.jit(lambda: SharedExpert(config, rngs=nnx.Rngs(0)))()
  folded = folded_mesh(dict(dp=2, cp=2, tp=2), {})
  run = jax.jit(lambda expert, x: expert(x, folded=folded))
  x = example()
  got = jax.block_until_ready(run(expert, x))
  up, gate, down = (
    np.asarray(getattr(expert, name).kernel[...], float)
    for name in ("up", "gate", "down")
  )
  gate = x @ gate
  want = (gate / (1 + np.exp(-gate)) * (x @ up)) @ down
  if is_gated:
    share = x @ np.asarray(expert.share.kernel[...], float)
    want = want / (1 + np.exp(-share))
  assert (expert.share is not None) == is_gated
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_block_adds_the_shared_expert_to_the_others():
  """On the same normed tokens as those; padding does not matter to it."""
  folded = folded_mesh({}, {})
  block = jax.jit(lambda: MoeBlock(CONFIG, rngs=nnx.Rngs(0)))()
  mask = np.ones((2, 4), bool)
  run = jax.jit(lambda block, x: block(x, mask, folded=folded))

  def alone(block, x):  # the block without what all tokens have
    shared, block.shared = block.shared, None
    y, found = block(x, mask, folded=folded)
    normed = block.norm_experts(y - found.output)
    return y + shared(normed, folded=folded)

  x = example()
  got, found = run(block, x)
  np.testing.assert_allclose(got, jax.jit(alone)(block, x), atol=1e-5)
  assert found.counts.sum() == 2 * mask.size  # of the routed ones alone
  few = dataclasses.replace(CONFIG, shared_hidden=0)
  assert jax.eval_shape(lambda: MoeBlock(few, rngs=nnx.Rngs(0))).shared is None


@pytest.mark.parametrize("num_heads", [4, 2])
def test_more_devices_than_heads_of_keys(num_heads):
  """Four devices for two heads of keys, and for as many of queries."""
  config = dataclasses.replace(CONFIG, num_heads=num_heads)
  block = jax.jit(lambda: MoeBlock(config, rngs=nnx.Rngs(0)))()
  x = np.random.default_rng(1).normal(size=(2, 8, 16)).astype(np.float32)

  def found(sizes):
    folded = folded_mesh(sizes, {})
    run = jax.jit(lambda block, x: block(x, x[..., 0] < 9, folded=folded)[0])
    return jax.block_until_ready(run(block, x))

  np.testing.assert_allclose(
    found(dict(cp=2, tp=4)), found({}), rtol=1e-5, atol=1e-5
  )


def test_layers_and_places():
  x = example()
  make = functools.partial(moe_block.linear, CONFIG, 16, 400)
  layer = jax.jit(lambda: make(nnx.Rngs(0), use_bias=True))()
  assert float(jnp.std(layer.kernel[...])) == pytest.approx(0.2, rel=0.05)
  np.testing.assert_array_equal(layer.bias[...], np.zeros(400))
  assert jax.eval_shape(lambda: make(nnx.Rngs(0))).bias is None
  got = jax.jit(lambda x: moe_block.rms_norm(CONFIG, nnx.Rngs(0))(x))(x)
  mean_square = np.square(x.astype(float)).mean(-1, keepdims=True)
  np.testing.assert_allclose(got, x / np.sqrt(mean_square + 1e-5), rtol=1e-5)
  folded = folded_mesh(dict(dp=2, cp=2, tp=2), {})
  put = jax.jit(lambda x: moe_block.lay(x, folded, folded.dp, folded.sequence))
  laid = jax.block_until_ready(put(x))
  np.testing.assert_array_equal(laid, x)
  assert laid.sharding.spec == jax.P("dp", ("cp", "tp"))

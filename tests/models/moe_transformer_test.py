"""The model folded over eight devices and on one."""

import functools

import jax
import jax.numpy as jnp
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
  num_layers=2,
  num_heads=4,
  num_key_heads=2,
  hidden=8,
  init_scale=0.2,
  balance_over="everywhere",  # the same however examples are cut
  moe=MoeConfig(num_experts=8, num_chosen=2),
)
ONE = ({}, {})
FOLDED = (dict(dp=2, cp=2, tp=2), dict(ep=8))
APART = (dict(dp=4, tp=2), dict(ep=2, etp=2))  # ep from dp, experts as heads


@functools.cache
def new_model():
  return jax.device_get(
    jax.jit(lambda: MoeTransformer(CONFIG, rngs=nnx.Rngs(0)))()
  )


def sentences():
  """Each token is followed by itself plus one, or plus two at its end."""
  start = np.arange(8)[:, None] * 3
  ids = (start + np.arange(8)[None] + np.arange(8)[None] // 4) % 16
  mask = np.ones((8, 8), bool)
  mask[2, 5:] = False
  return ids.astype(np.int32), mask


@functools.cache
def trained(attention, experts, num_steps=6):
  """Losses of some steps of gradient descent."""
  folded = folded_mesh(dict(attention), dict(experts))
  ids, mask = sentences()
  model = rules.shard(
    new_model(), folded.mesh, moe_transformer.placement(folded)
  )

  @jax.jit
  def step(model, ids, mask):
    loss = functools.partial(next_token_loss, folded=folded)
    gradient = jax.value_and_grad(loss, has_aux=True)
    (loss, found), gradients = gradient(model, ids, mask)
    new = jax.tree.map(lambda w, g: w - 0.5 * g, model, gradients)
    new = jax.lax.with_sharding_constraint(
      new,
      rules.shardings(new, folded.mesh, moe_transformer.placement(folded)),
    )
    return new, (loss, found.counts)

  losses = []
  for _ in range(num_steps):
    # One program at a time: there are fewer cores than devices.
    model, (loss, counts) = jax.block_until_ready(step(model, ids, mask))
    losses.append(float(loss))
  up = model.blocks.up[...]
  return losses, np.asarray(counts), up.sharding.spec, jax.device_get(up)


def layout(sizes):
  return tuple(tuple(axes.items()) for axes in sizes)


@pytest.mark.parametrize("sizes", [FOLDED, APART], ids=["folded", "apart"])
def test_trains_as_on_one_device(sizes):
  losses, _, spec, up = trained(*layout(sizes))
  want, counts, _, want_up = trained(*layout(ONE))
  np.testing.assert_allclose(losses, want, rtol=1e-4)
  np.testing.assert_allclose(up, want_up, atol=1e-4)
  assert want[-1] < 0.9 * want[0]
  np.testing.assert_array_equal(counts.sum(1), 2 * sentences()[1].sum())
  cut = ("dp", "cp", "tp") if sizes is FOLDED else "dp0"
  assert spec[1] == cut


def test_predictions_do_not_look_ahead_nor_at_padding():
  folded = folded_mesh(*ONE)
  ids, mask = sentences()
  run = jax.jit(lambda m, i, k: m(i, k, folded=folded).logits)
  want = run(new_model(), ids, mask)
  other = np.where(mask & (np.arange(8) < 6)[None], ids, 15 - ids)
  got = run(new_model(), other, mask)
  np.testing.assert_allclose(got[:, :6][mask[:, :6]], want[:, :6][mask[:, :6]],
                             atol=1e-5)  # fmt: skip
  assert np.abs(got - want).max() > 0.1


def test_loss_is_that_of_the_next_tokens():
  folded = folded_mesh(*ONE)
  ids, mask = sentences()
  loss = functools.partial(next_token_loss, folded=folded)
  got, found = jax.jit(loss)(new_model(), ids, mask)
  logits = np.asarray(found.logits, float)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  each = [
    -log_p[b, s, ids[b, s + 1]] for b, s in np.ndindex(8, 7) if mask[b, s + 1]
  ]
  want = np.mean(each) + 1e-2 * found.losses.everywhere + 1e-3 * found.losses.z
  np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.unchecked
def test_errors_name_the_argument():
  with pytest.raises(ValueError, match="num_heads must be a multiple of 3"):
    config = MoeTransformerConfig(width=16, num_heads=4, num_key_heads=3)
    jax.eval_shape(lambda: MoeTransformer(config, rngs=nnx.Rngs(0)))
  stages, more = (dict(pp=2, dp=2, tp=2), dict(ep=4)), (dict(pp=4), {})
  for sizes, num_micro, batch, match in (
    (FOLDED, 1, 3, "batch must be a multiple of 2, got 3"),
    (stages, 4, 12, "batch must be a multiple of 8, got 12"),
    (more, 2, 8, "num_layers must be a multiple of 4, got 2"),
    (ONE, 0, 8, "num_micro must lie in 1..inf, got 0"),
  ):
    run = functools.partial(
      MoeTransformer.__call__, folded=folded_mesh(*sizes), num_micro=num_micro
    )
    with pytest.raises(ValueError, match=match):
      jax.eval_shape(run, new_model(), jnp.zeros((batch, 8), int))

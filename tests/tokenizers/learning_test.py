"""Every tokenizer learns a few examples, and its step never asks the host.

SETRec, the glyph language model, VAT and VQGAN do so in tests of their own.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.contracts import (
  hiera_tok_test,
  illume_test,
  ming_test,
  seed_test,
  slot_mllm_test,
  token_flow_test,
)
from tests.tokenizers import one_d_piece_test, two_stage_test
from tests.tokenizers.tiny_tokenizer import built, quantizer
from tokjax.tokenizers.lavit import LavitConfig

STEPS = 80
FEW = 4  # examples, so that there is little to remember

SEED = seed_test.CONFIG
SLOTS = slot_mllm_test.CONFIG
LAVIT = LavitConfig(8, 6, 4, 1, 2, 2.0, quantizer("ema"))
stage = dataclasses.replace

# Below what the loss must fall, config, what is read, shape of the features.
SYSTEMS = {
  "one-d-piece": (0.2, one_d_piece_test.CONFIG, "images"),
  "two-stage": (1.4, two_stage_test.CONFIG, "images"),
  "two-stage-pixels": (0.48, two_stage_test.PIXELS, "images"),
  "hiera-tok": (0.2, hiera_tok_test.CONFIG, "images"),
  "ming": (0.5, ming_test.CONFIG, "images", (4, 6)),
  "token-flow": (0.65, token_flow_test.CONFIG, "images", (16, 5)),
  "illume": (0.4, illume_test.ILLUME, "features", (4, 5)),
  "illume-plus": (0.65, illume_test.PLUS, "images", (4, 5)),
  "seed": (
    0.9,
    stage(SEED, stage="contrastive"),
    "features",
    (5, 6),
  ),
  "seed-codes": (
    0.4,
    stage(SEED, stage="tokenizer"),
    "features",
    (5, 6),
  ),
  "slot-mllm": (0.45, stage(SLOTS, stage="slots"), "features", (5, 6)),
  "slot-mllm-codes": (
    0.15,
    stage(SLOTS, stage="tokenizer"),
    "features",
    (5, 6),
  ),
  "lavit": (0.5, stage(LAVIT, stage="merge"), "features", (6, 8)),
  "lavit-codes": (0.6, LAVIT, "features", (6, 8)),
}


def learned(name):
  _, config, reads, *shape = SYSTEMS[name]
  tokenizer, state = built(config)
  rng = np.random.default_rng(0)
  side = getattr(config, "image_size", 0)
  images = rng.uniform(-1, 1, (FEW, 1, 1, 3)) * np.ones((1, side, side, 1))
  features = [rng.normal(size=(FEW, *x)) for x in shape]
  inputs = ([images] if reads == "images" else []) + features
  inputs = [np.float32(x) for x in inputs]
  others = {"contrastive": "other", "tokenizer": "embedding"}
  given = {}
  if name.startswith("seed"):
    x = np.float32(rng.normal(size=(FEW, 4)))
    given = {others[config.stage]: x if name == "seed" else x[:, None]}
  adam = optax.adam(1e-2)

  def train(tokenizer, state):
    def loss(tokenizer, state, key):
      found, state = tokenizer(*inputs, state, train=True, key=key, **given)
      return sum(found.losses.values(), jnp.float32(0)), state

    def step(carry, key):
      tokenizer, state, moments = carry
      (value, state), slope = jax.value_and_grad(loss, has_aux=True)(
        tokenizer, state, key
      )
      update, moments = adam.update(slope, moments, tokenizer)
      tokenizer = optax.apply_updates(tokenizer, update)
      return (tokenizer, state, moments), value

    keys = jax.random.split(jax.random.key(5), STEPS)
    carry = tokenizer, state, adam.init(tokenizer)
    return jax.lax.scan(step, carry, keys)[1]

  traced = jax.jit(train).trace(tokenizer, state)
  assert "callback" not in str(traced.jaxpr)
  return np.asarray(traced.lower().compile()(tokenizer, state))


@pytest.mark.parametrize("name", SYSTEMS)
def test_loss_falls_and_the_host_is_left_alone(name):
  figure, *_ = SYSTEMS[name]
  losses = learned(name)
  assert losses[-10:].mean() < figure < losses[:3].mean()

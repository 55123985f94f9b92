"""Contracts of slot attention and Slot-MLLM."""

import dataclasses
import functools

import jax
from flax import nnx

from tests.contracts import harness
from tests.contracts.harness import Case
from tests.tokenizers.filled_module import filled, filled_tokenizer
from tokjax.tokenizers.codebook import CodebookConfig
from tokjax.tokenizers.q_former import QFormerConfig
from tokjax.tokenizers.residual_quantizer import RVQConfig
from tokjax.tokenizers.slot_attention import (
  SlotAttention,
  SlotAttentionConfig,
  attend_slots,
)
from tokjax.tokenizers.slot_mllm import SlotMLLMConfig


def inputs(seed):
  keys = jax.random.split(jax.random.key(seed), 3)
  x = jax.random.normal(keys[0], (8, 5, 6))
  mask = jax.random.bernoulli(keys[1], 0.8, (8, 5)).at[:, 0].set(True)
  return x, mask, jax.random.normal(keys[2], (8, 3, 8))


def slots(model, x, mask, start):
  return model(start, x, mask)


def slots_made():
  config = SlotAttentionConfig(8, 6, 2, 2, compete="heads_slots")
  return filled(lambda: SlotAttention(config, rngs=nnx.Rngs(0)))


def attended(x, mask, start):
  q = start.reshape(8, 3, 2, 4).swapaxes(1, 2)
  k = x[..., None, :4].swapaxes(1, 2) * q[:, :, :1]
  return attend_slots(q, k, k, mask, norm="one_plus")


CONFIG = SlotMLLMConfig(
  QFormerConfig(8, 1, 2, num_queries=3, context_dim=6, read_every=1,
                slots=SlotAttentionConfig(8, 6, 2, 2)),
  RVQConfig(CodebookConfig(6, 4, learning="ema"), num_stages=2),
  num_features=5, feature_dim=6, num_decoder_layers=1, num_feature_layers=1,
  num_decoder_heads=2,
  freeze_slots=False,
)  # fmt: skip


def slot_mllm(weights, x, mask, _):
  model, state = weights
  return model(x, state, mask=mask, train=True, key=jax.random.key(2))


def slot_mllm_made(stage):
  return filled_tokenizer(dataclasses.replace(CONFIG, stage=stage))


ALL = (0, 1, 2)
CASES = [
  Case("slot-attention", slots, inputs, ALL, (0, 2), weights=slots_made),
  Case("attend-slots", attended, inputs, ALL, (0, 2)),
  Case("slot-mllm-slots", slot_mllm, inputs, ALL, (0,),
       weights=functools.partial(slot_mllm_made, "slots")),
  Case("slot-mllm-codes", slot_mllm, inputs, ALL, (0,),
       weights=functools.partial(slot_mllm_made, "tokenizer")),
]  # fmt: skip


@harness.all_checks(CASES)
def test_contract(check, case):
  check(case)

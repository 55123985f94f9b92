"""Contracts of SEED and its parts."""

import dataclasses
import functools

import jax
import numpy as np
from flax import nnx

from tests.contracts import harness
from tests.contracts.harness import Case
from tests.tokenizers.filled_module import filled_tokenizer
from tokjax.ops import attention_masks
from tokjax.ops.contrastive import contrastive_loss
from tokjax.tokenizers.codebook import CodebookConfig
from tokjax.tokenizers.language_ids import from_language, to_language
from tokjax.tokenizers.q_former import QFormerConfig
from tokjax.tokenizers.seed import SeedConfig

FORMER = QFormerConfig(8, 1, 2, num_queries=3, context_dim=6, read_every=1)
REVERSE = QFormerConfig(8, 1, 2, num_queries=1, context_dim=8, read_every=1)
CONFIG = SeedConfig(
  FORMER, CodebookConfig(6, 4, learning="ema"), 1, 1, REVERSE, embed_dim=4,
  other_dim=4, projection_dim=5,
)  # fmt: skip


def inputs(seed):
  keys = jax.random.split(jax.random.key(seed), 3)
  x = jax.random.normal(keys[0], (8, 5, 6))
  mask = jax.random.bernoulli(keys[1], 0.8, (8, 5)).at[:, 0].set(True)
  return x, mask, jax.random.normal(keys[2], (8, 4))


def made(config):
  model, state = filled_tokenizer(config)
  model.log_temperature = nnx.Param(np.float32(-1.0))
  return model, state


def queried(weights, x, mask, _):
  model, _ = weights
  causal = attention_masks.causal(3)
  return model.q_former(x, mask, mask=causal, key=jax.random.key(1))


def seed(weights, x, mask, other):
  model, state = weights
  given = {"other": other}
  if model.config.stage == "tokenizer":
    given = {"embedding": other[:, None]}
  return model(x, state, mask=mask, train=True, key=jax.random.key(2), **given)


def ids(seed):
  return (jax.random.randint(jax.random.key(seed), (8, 3, 2), 0, 5),)


def there_and_back(indices):
  settings = {"num_codes": 5, "offset": 9, "order": "levels", "shared": False}
  found = to_language(indices, **settings, begin=1)
  return found, from_language(found[:, 1:], num_levels=2, **settings)


STAGE_1, STAGE_2 = (
  functools.partial(made, dataclasses.replace(CONFIG, stage=stage))
  for stage in ("contrastive", "tokenizer")
)
CASES = [
  Case("q-former", queried, inputs, (0, 1, 2), (0,), weights=STAGE_1),
  Case("seed-1", seed, inputs, (0, 1, 2), (0, 2), weights=STAGE_1),
  Case("seed-2", seed, inputs, (0, 1, 2), (2,), weights=STAGE_2),
  Case("contrastive", lambda x, mask, y: contrastive_loss(
         x[:, 0, :4], y, mask[:, 1], label_smoothing=0.1),
       inputs, (0, 1, 2), (0, 2)),
  Case("language-ids", there_and_back, ids, bfloat16_tolerance=None),
]  # fmt: skip


@harness.all_checks(CASES)
def test_contract(check, case):
  check(case)

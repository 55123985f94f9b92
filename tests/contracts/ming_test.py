"""Contracts of MingTok."""

import functools

import jax

from tests.contracts import harness
from tests.contracts.harness import Case
from tests.tokenizers.filled_module import filled_tokenizer
from tokjax.tokenizers.ming import MingTokConfig
from tokjax.tokenizers.transformer import TransformerConfig

SMALL = TransformerConfig(8, 1, 2, activation="swiglu", init_scale=0.3)


def both(seed):
  image_key, feature_key = jax.random.split(jax.random.key(seed))
  images = jax.random.uniform(image_key, (8, 8, 8, 3), minval=-1)
  return images, jax.random.normal(feature_key, (8, 4, 6))


def reconstructed(weights, images, features):
  tokenizer, state = weights
  found, _ = tokenizer(
    images, features, state, train=True, key=jax.random.key(2)
  )  # fmt: skip
  return found


CONFIG = MingTokConfig(8, 4, 4, SMALL, SMALL, SMALL, feature_dim=6)
CASES = [
  Case(
    "ming-tok",
    reconstructed,
    both,
    batched=(0, 1),
    differentiable=(0, 1),
    weights=functools.partial(filled_tokenizer, CONFIG),
  ),
]


@harness.all_checks(CASES)
def test_contract(check, case):
  check(case)

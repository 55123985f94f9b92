"""Contracts of LaVIT and of attention under policies."""

import functools

import jax

from tests.contracts import harness
from tests.contracts.harness import Case
from tests.tokenizers.filled_module import filled_tokenizer
from tests.tokenizers.tiny_tokenizer import quantizer
from tokjax.ops.policy_attention import policy_attention
from tokjax.tokenizers.lavit import LavitConfig


def features(seed):
  return (jax.random.normal(jax.random.key(seed), (8, 6, 8)),)


def tokenized(weights, x):
  tokenizer, state = weights
  return tokenizer(x, state, train=True, key=jax.random.key(2))


def encoded(weights, x):
  tokenizer, state = weights
  return tokenizer.encode(x, state)[1]


def attended(x):
  heads = x.reshape(*x.shape[:2], 2, 4).swapaxes(1, 2)
  return policy_attention(heads, heads, heads, x[:, :, :6] ** 2)


def weights(**settings):
  config = LavitConfig(8, 6, 4, 1, 2, 2.0, quantizer("ema"), **settings)
  return functools.partial(filled_tokenizer, config)


CASES = [
  Case("policy-attention", attended, features, (0,), (0,)),
  Case("lavit", tokenized, features, (0,), (0,),
       weights=weights(stage="merge")),
  Case("lavit-encoded", encoded, features, (0,), (), weights=weights()),
]  # fmt: skip


@harness.all_checks(CASES)
def test_contract(check, case):
  check(case)

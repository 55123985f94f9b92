"""Contracts of HieraTok."""

import functools

import jax

from tests.contracts import harness
from tests.contracts.harness import Case
from tests.tokenizers.filled_module import filled_tokenizer
from tests.tokenizers.tiny_tokenizer import TRUNK
from tokjax.tokenizers.hiera_tok import HieraTokConfig


@jax.jit
def photos(seed):
  return (jax.random.uniform(jax.random.key(seed), (8, 8, 8, 3), minval=-1),)


def reconstructed(weights, images):
  tokenizer, state = weights
  found, _ = tokenizer(images, state, train=True, key=jax.random.key(2))
  return found


CONFIG = HieraTokConfig(8, 4, (1, 2), 3, TRUNK, TRUNK)
CASES = [
  Case("hiera-tok", reconstructed, photos, (0,), (0,),
       weights=functools.partial(filled_tokenizer, CONFIG)),
]  # fmt: skip


@harness.all_checks(CASES)
def test_contract(check, case):
  check(case)

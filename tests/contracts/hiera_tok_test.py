"""Contracts of HieraTok."""

import jax
from flax import nnx

from tests.contracts import harness
from tests.contracts.harness import Case
from tests.tokenizers.tiny_tokenizer import TRUNK
from tokjax.tokenizers.hiera_tok import HieraTokConfig


def photos(seed):
  return (jax.random.uniform(jax.random.key(seed), (8, 8, 8, 3), minval=-1),)


def reconstructed(images):
  # Built inside, so that the weights live on the mesh of the inputs.
  config = HieraTokConfig(8, 4, (1, 2), 3, TRUNK, TRUNK)
  tokenizer = config.build(nnx.Rngs(0))
  found, _ = tokenizer(images, (), train=True, key=jax.random.key(2))
  return found


CASES = [
  Case("hiera-tok", reconstructed, photos, (0,), (0,)),
]


@harness.all_checks(CASES)
def test_contract(check, case):
  check(case)

"""Contracts of MingTok."""

import jax
from flax import nnx

from tests.contracts import harness
from tests.contracts.harness import Case
from tokjax.tokenizers.ming import MingTokConfig
from tokjax.tokenizers.transformer import TransformerConfig

SMALL = TransformerConfig(8, 1, 2, activation="swiglu", init_scale=0.3)


def both(seed):
  image_key, feature_key = jax.random.split(jax.random.key(seed))
  images = jax.random.uniform(image_key, (8, 8, 8, 3), minval=-1)
  return images, jax.random.normal(feature_key, (8, 4, 6))


def reconstructed(images, features):
  # Built inside, so that the weights live on the mesh of the inputs.
  config = MingTokConfig(8, 4, 4, SMALL, SMALL, SMALL, feature_dim=6)
  tokenizer = config.build(nnx.Rngs(0))
  found, _ = tokenizer(
    images, features, (), train=True, key=jax.random.key(2)
  )  # fmt: skip
  return found


CASES = [Case("ming-tok", reconstructed, both, (0, 1), (0, 1))]


@harness.all_checks(CASES)
def test_contract(check, case):
  check(case)

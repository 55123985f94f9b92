"""Contracts of TokenFlow and its quantizer."""

import functools

import jax
import jax.numpy as jnp

from tests.contracts import harness
from tests.contracts.harness import Case
from tests.tokenizers.filled_module import filled_tokenizer
from tokjax.tokenizers.codebook import CodebookConfig
from tokjax.tokenizers.conv import ConvConfig
from tokjax.tokenizers.dual_quantizer import DualConfig, joint_nearest
from tokjax.tokenizers.token_flow import TokenFlowConfig
from tokjax.tokenizers.transformer import TransformerConfig

CONV = ConvConfig(
  width=4, multipliers=(1,), num_res_blocks=1, z_dim=3, groups=2,
  attention=False, flavour="maskgit",
)  # fmt: skip
BOOKS = (
  CodebookConfig(7, 4, metric="cosine"),
  CodebookConfig(7, 2, metric="cosine"),
)
CONFIG = TokenFlowConfig(
  image_size=6,
  features_dim=5,
  quantizer=DualConfig(*BOOKS, sides=(1, 2, 4)),
  encoder=CONV,
  decoder=CONV,
  semantic_decoder=TransformerConfig(8, 1, 2),
)


def inputs(seed):
  keys = jax.random.split(jax.random.key(seed))
  shapes = (8, 6, 6, 3), (8, 16, 5)
  return tuple(map(jax.random.normal, keys, shapes))


def flowed(weights, images, features):
  model, state = weights
  return model(images, features, state, train=True, key=jax.random.key(2))


def joined(images, features):
  tables = jnp.eye(3), jnp.eye(5)[:3]
  return joint_nearest(
    (images[:, 0, 0], features[:, 0]), tables, (1.0, jnp.float32(0.5))
  )


CASES = [
  Case(
    "token-flow",
    flowed,
    inputs,
    batched=(0, 1),
    differentiable=(0, 1),
    tolerance=1e-4,
    weights=functools.partial(filled_tokenizer, CONFIG),
  ),
  Case("joint-nearest", joined, inputs, batched=(0, 1)),
]


@harness.all_checks(CASES)
def test_contract(check, case):
  check(case)

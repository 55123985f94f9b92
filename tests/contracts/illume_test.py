"""Contracts of ILLUME and ILLUME+."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from tests.contracts import harness
from tests.contracts.harness import Case
from tests.tokenizers.filled_module import filled_tokenizer
from tokjax.tokenizers.codebook import CodebookConfig
from tokjax.tokenizers.conv import ConvConfig
from tokjax.tokenizers.illume import IllumeConfig
from tokjax.tokenizers.illume_plus import DualViTokConfig, from_ids, to_ids
from tokjax.tokenizers.transformer import TransformerConfig
from tokjax.tokenizers.vector_quantizer import VQConfig

CONV = ConvConfig(
  width=4, multipliers=(1,), num_res_blocks=1, z_dim=3, groups=2,
  attention=False, flavour="maskgit",
)  # fmt: skip
BOOK = VQConfig(CodebookConfig(7, 2, learning="simvq"))
ILLUME = IllumeConfig(5, 4, TransformerConfig(8, 1, 2), BOOK)
PLUS = DualViTokConfig(
  image_size=4,
  semantic=ILLUME,
  quantizer=BOOK,
  encoder=CONV,
  decoder=dataclasses.replace(CONV, condition_dim=4),
  noise_rate=0.5,
)


def inputs(seed):
  keys = jax.random.split(jax.random.key(seed), 3)
  images = jax.random.normal(keys[0], (8, 4, 4, 3))
  features = jax.random.normal(keys[1], (8, 4, 5))
  return images, features, jax.random.bernoulli(keys[2], 0.7, (8, 4))


def plain(weights, images, features, mask):
  model, state = weights
  return model(features, state, mask, train=True)


def plus(weights, images, features, mask):
  model, state = weights
  return model(images, features, state, train=True, key=jax.random.key(2))


def ids(images, features, mask):
  layout = {"num_semantic": 2, "num_pixel": 2, "offset": 9}
  codes = mask.astype(jnp.int32)
  written = to_ids(codes, 1 - codes, **layout)
  return written, from_ids(written, num_tokens=4, **layout)


CASES = [
  Case("illume", plain, inputs, (0, 1, 2), (1,), 1e-4,
       weights=functools.partial(filled_tokenizer, ILLUME)),
  Case("illume-plus", plus, inputs, (0, 1, 2), (0, 1), 1e-4,
       weights=functools.partial(filled_tokenizer, PLUS)),
  Case("illume-ids", ids, inputs, (0, 1, 2)),
]  # fmt: skip


@harness.all_checks(CASES)
def test_contract(check, case):
  check(case)

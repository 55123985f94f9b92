"""Contracts of the quantizers of the zoo that no other table has."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from tests.contracts import harness
from tests.contracts.harness import Case
from tests.tokenizers.filled_module import filled, filled_tokenizer
from tokjax.tokenizers import code_resets, codebook, quantizers
from tokjax.tokenizers.codebook import CodebookConfig
from tokjax.tokenizers.graph_tokens import (
  PAD,
  GraphEncoderConfig,
  GraphTokens,
)
from tokjax.tokenizers.grouped_quantizer import GroupedConfig
from tokjax.tokenizers.lookup_free import LookupFreeConfig
from tokjax.tokenizers.residual_quantizer import RVQConfig
from tokjax.tokenizers.vector_quantizer import VQConfig

BOOK = CodebookConfig(6, 4, learning="gradient", reset="anchors")


def vectors(seed):
  x_key, mask_key = jax.random.split(jax.random.key(seed))
  # Halves, which bfloat16 holds: what is nearest does not hang on rounding.
  x = jnp.round(2 * jax.random.normal(x_key, (8, 5, 4))) / 2
  return x, jax.random.bernoulli(mask_key, 0.7, x.shape[:2])


def quantized(weights, x, mask):
  quantizer, state = weights
  return quantizer(x, state, mask, train=True, key=jax.random.key(2))


def looked_up(weights, x, mask):
  quantizer, state = weights
  found, state = quantizer(x, state, mask)
  joint = quantizers.joint_index(found.indices, quantizer.num_codes, 2)
  return joint, quantizer.lookup(found.indices, state)


def anchored(x, mask):
  config = CodebookConfig(6, 4, learning="ema", reset="anchors", decay=0.5)
  book = codebook.Codebook(config, rngs=nnx.Rngs(0))
  state = book.init_state(jax.random.key(1))
  index = jnp.where(mask, jnp.arange(5, dtype=jnp.int32)[None], -1)
  return codebook.update(state, x, index, config=config)


def tokens(seed):
  keys = jax.random.split(jax.random.key(seed), 3)
  draw = jax.random.randint
  return (
    draw(keys[0], (8, 2), 0, 4),
    draw(keys[1], (8, 2), 0, 6),
    draw(keys[2], (8, 3), PAD, 6),
  )


def encoded(encoder, *tokens):
  return encoder(GraphTokens(*tokens), key=jax.random.key(1))


def encoder(composer):
  config = GraphEncoderConfig(
    3, 6, 2, 3, width=8, max_hops=4, composer=composer, num_layers=1,
    num_heads=2,
  )  # fmt: skip
  return filled(lambda: config.build(nnx.Rngs(0)))


def rows(name, config, function=quantized, differentiable=(0,)):
  return Case(
    name,
    function,
    vectors,
    batched=(0, 1),
    differentiable=differentiable,
    weights=functools.partial(filled_tokenizer, config),
  )


CASES = [
  rows("vq-gumbel", VQConfig(BOOK, estimator="gumbel")),
  rows("rvq-anchors", RVQConfig(BOOK, 2)),
  rows("grouped-rvq", GroupedConfig(
    RVQConfig(CodebookConfig(6, 2, learning="ema", reset="batch"), 2)
  )),
  rows("fsq", LookupFreeConfig("fsq", (5, 4), input_dim=4)),
  rows("lfq", LookupFreeConfig("lfq", num_bits=4, commitment_weight=0.25)),
  rows("bsq", LookupFreeConfig("bsq", num_bits=3, input_dim=4)),
  rows("grouped-lookup", GroupedConfig(
    VQConfig(CodebookConfig(6, 2, learning="ema"))
  ), looked_up, ()),
  Case("anchors", anchored, vectors, batched=(0, 1)),
  Case(
    "rows-of-all-devices",
    lambda x, mask: code_resets.rows_of_all_devices(x, mask),
    vectors,
    batched=(0, 1),
    differentiable=(0,),
  ),
  *(
    Case(
      f"graph-{composer}",
      encoded,
      tokens,
      batched=(0, 1, 2),
      bfloat16_tolerance=None,
      weights=functools.partial(encoder, composer),
    )
    for composer in ("mlp", "transformer")
  ),
]  # fmt: skip


@harness.all_checks(CASES)
def test_contract(check, case):
  check(case)

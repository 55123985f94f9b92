"""Contracts of the quantizers with learned tables."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from tests.contracts import harness
from tests.contracts.harness import Case
from tests.tokenizers.filled_module import filled_tokenizer
from tokjax.tokenizers import codebook, measures
from tokjax.tokenizers.codebook import CodebookConfig
from tokjax.tokenizers.residual_quantizer import RVQConfig
from tokjax.tokenizers.vector_quantizer import VQConfig


def vectors(seed):
  x_key, mask_key = jax.random.split(jax.random.key(seed))
  # Halves, which bfloat16 holds: what is nearest does not hang on rounding.
  x = jnp.round(2 * jax.random.normal(x_key, (8, 5, 4))) / 2
  return x, jax.random.bernoulli(mask_key, 0.7, x.shape[:2])


def quantized(weights, x, mask, train=True):
  quantizer, state = weights
  return quantizer(x, state, mask, train=train, key=jax.random.key(2))


evaluated = functools.partial(quantized, train=False)


RESET = CodebookConfig(6, 4, learning="ema", reset="batch")


def codes():
  return codebook.Codebook(RESET, rngs=nnx.Rngs(0)).init_state(
    jax.random.key(1)
  )


def updated(state, x, mask):
  index = jnp.where(mask, jnp.arange(5, dtype=jnp.int32)[None], -1)
  return codebook.update(
    state, x, index, config=RESET, key=jax.random.key(3)
  )  # fmt: skip


def vector(name, learning, metric="euclidean", **settings):
  book = CodebookConfig(6, 4, metric=metric, learning=learning)
  return Case(
    name,
    quantized,
    vectors,
    batched=(0, 1),
    differentiable=(0,),
    weights=functools.partial(filled_tokenizer, VQConfig(book, **settings)),
  )


def residual(name, function, differentiable=(), **settings):
  config = RVQConfig(CodebookConfig(6, 4, learning="ema"), 3, **settings)
  return Case(
    name,
    function,
    vectors,
    batched=(0, 1),
    differentiable=differentiable,
    weights=functools.partial(filled_tokenizer, config),
  )


CASES = [
  vector("vq-ema", "ema"),
  vector("vq-gradient", "gradient", "cosine", entropy_weight=0.1),
  vector("vq-simvq", "simvq", estimator="rotation"),
  residual("rvq", quantized, (0,)),
  residual("rvq-beam", evaluated, beam_size=2),
  Case("codebook-update", updated, vectors, (0, 1), weights=codes),
  Case(
    "masked-mean",
    lambda x, mask: measures.masked_mean(x[..., 0], mask),
    vectors,
    batched=(0, 1),
    differentiable=(0,),
  ),
]


@harness.all_checks(CASES)
def test_contract(check, case):
  check(case)

"""Contracts of the quantizers with learned tables."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from tests.contracts import harness
from tests.contracts.harness import Case
from tokjax.tokenizers import codebook, measures
from tokjax.tokenizers.codebook import CodebookConfig
from tokjax.tokenizers.residual_quantizer import ResidualQuantizer, RVQConfig
from tokjax.tokenizers.vector_quantizer import VectorQuantizer, VQConfig


def vectors(seed):
  x_key, mask_key = jax.random.split(jax.random.key(seed))
  # Halves, which bfloat16 holds: what is nearest does not hang on rounding.
  x = jnp.round(2 * jax.random.normal(x_key, (8, 5, 4))) / 2
  return x, jax.random.bernoulli(mask_key, 0.7, x.shape[:2])


def vector_quantized(
  x, mask, *, learning="ema", metric="euclidean", **settings
):
  # Built inside, so that the weights live on the mesh of the inputs.
  book = CodebookConfig(6, 4, metric=metric, learning=learning)
  quantizer = VectorQuantizer(VQConfig(book, **settings), rngs=nnx.Rngs(0))
  state = quantizer.init_state(jax.random.key(1))
  return quantizer(x, state, mask, train=True, key=jax.random.key(2))


def residual_quantized(x, mask, *, train=True, **settings):
  config = RVQConfig(CodebookConfig(6, 4, learning="ema"), 3, **settings)
  quantizer = ResidualQuantizer(config, rngs=nnx.Rngs(0))
  state = quantizer.init_state(jax.random.key(1))
  return quantizer(x, state, mask, train=train, key=jax.random.key(2))


def updated(x, mask, **settings):
  config = CodebookConfig(6, 4, learning="ema", **settings)
  state = codebook.Codebook(config, rngs=nnx.Rngs(0)).init_state(
    jax.random.key(1)
  )
  index = jnp.where(mask, jnp.arange(5, dtype=jnp.int32)[None], -1)
  return codebook.update(
    state, x, index, config=config, key=jax.random.key(3)
  )  # fmt: skip


def rows(name, function, differentiable=(0,), **settings):
  return Case(
    name,
    functools.partial(function, **settings),
    vectors,
    batched=(0, 1),
    differentiable=differentiable,
  )


CASES = [
  rows("vq-ema", vector_quantized),
  rows(
    "vq-gradient",
    vector_quantized,
    learning="gradient",
    num_heads=1,
    metric="cosine",
    entropy_weight=0.1,
  ),  # fmt: skip
  rows("vq-simvq", vector_quantized, learning="simvq", estimator="rotation"),
  rows("rvq", residual_quantized),
  rows(
    "rvq-beam", residual_quantized, differentiable=(), train=False, beam_size=2
  ),  # fmt: skip
  rows("codebook-update", updated, (), reset="batch"),
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

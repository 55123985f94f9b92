"""Contracts of multi-scale quantisation and of Gaussian latents."""

import functools

import jax
import jax.numpy as jnp

from tests.contracts import harness
from tests.contracts.harness import Case
from tests.tokenizers.filled_module import filled_tokenizer
from tokjax.tokenizers import gaussian
from tokjax.tokenizers.codebook import CodebookConfig
from tokjax.tokenizers.multi_scale_quantizer import MultiScaleConfig


def maps(seed):
  x_key, mask_key = jax.random.split(jax.random.key(seed))
  # Quarters, which bfloat16 holds: what is nearest does not hang on rounding.
  x = jnp.round(4 * jax.random.normal(x_key, (8, 4, 4))) / 4
  return x, jax.random.bernoulli(mask_key, 0.7, (8,))


def quantizer(sizes, learning="gradient", **settings):
  config = MultiScaleConfig(
    CodebookConfig(6, 4, learning=learning),
    sizes,
    code_deviation=1.0,
    **settings,
  )
  return functools.partial(filled_tokenizer, config)


def quantized(weights, x, mask):
  quantizer, state = weights
  return quantizer(x, state, mask, train=True, key=jax.random.key(2))


def given(weights, x, mask):
  quantizer, state = weights
  indices = quantizer(x, state, mask)[0].indices
  return quantizer.ar_inputs(indices, state), quantizer.lookup(
    indices, state, upto=1
  )


def divergence(x, mask):
  tokens = jnp.broadcast_to(mask[:, None], x.shape[:2])
  return gaussian.kl_divergence(gaussian.from_features(x), tokens)


def drawn(x):
  return gaussian.sample(jax.random.key(3), gaussian.from_features(x))


MAP = quantizer((1, 2), num_convolutions=4)
ROW = quantizer(
  (1, 2, 4), "ema", layout="row", num_convolutions=0, learned_maps=True
)
CASES = [
  Case("map", quantized, maps, (0, 1), (0,), weights=MAP),
  Case("row-learned-maps", quantized, maps, (0, 1), (0,), weights=ROW),
  Case("inputs-of-the-next-scale", given, maps, (0, 1), weights=MAP),
  Case("kl-divergence", divergence, maps, (0, 1), (0,)),
  Case("sample", drawn, lambda seed: maps(seed)[:1], differentiable=(0,)),
]


@harness.all_checks(CASES)
def test_contract(check, case):
  check(case)

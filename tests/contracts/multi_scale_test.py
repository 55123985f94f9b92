"""Contracts of multi-scale quantisation and of Gaussian latents."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from tests.contracts import harness
from tests.contracts.harness import Case
from tokjax.tokenizers import gaussian
from tokjax.tokenizers.codebook import CodebookConfig
from tokjax.tokenizers.multi_scale_quantizer import MultiScaleConfig


def maps(seed):
  x_key, mask_key = jax.random.split(jax.random.key(seed))
  # Quarters, which bfloat16 holds: what is nearest does not hang on rounding.
  x = jnp.round(4 * jax.random.normal(x_key, (8, 4, 4))) / 4
  return x, jax.random.bernoulli(mask_key, 0.7, (8,))


def _built(sizes, learning="gradient", **settings):
  # Built inside, so that the weights live on the mesh of the inputs.
  config = MultiScaleConfig(
    CodebookConfig(6, 4, learning=learning),
    sizes,
    code_deviation=1.0,
    **settings,
  )
  quantizer = config.build(nnx.Rngs(0))
  return quantizer, quantizer.init_state(jax.random.key(1))


def quantized(x, mask, **settings):
  quantizer, state = _built(**settings)
  return quantizer(x, state, mask, train=True, key=jax.random.key(2))


def given(x, mask):
  quantizer, state = _built((1, 2), num_convolutions=4)
  indices = quantizer(x, state, mask)[0].indices
  return quantizer.ar_inputs(indices, state), quantizer.lookup(
    indices, state, upto=1
  )


def divergence(x, mask):
  tokens = jnp.broadcast_to(mask[:, None], x.shape[:2])
  return gaussian.kl_divergence(gaussian.from_features(x), tokens)


def drawn(x):
  return gaussian.sample(jax.random.key(3), gaussian.from_features(x))


def row(name, function, differentiable=(0,), **settings):
  return Case(
    name,
    functools.partial(function, **settings),
    maps,
    batched=(0, 1),
    differentiable=differentiable,
  )


CASES = [
  row("map", quantized, sizes=(1, 2), num_convolutions=4),
  row(
    "row-learned-maps",
    quantized,
    sizes=(1, 2, 4),
    learning="ema",
    layout="row",
    num_convolutions=0,
    learned_maps=True,
  ),
  row("inputs-of-the-next-scale", given, ()),
  row("kl-divergence", divergence),
  Case("sample", drawn, lambda seed: maps(seed)[:1], differentiable=(0,)),
]


@harness.all_checks(CASES)
def test_contract(check, case):
  check(case)

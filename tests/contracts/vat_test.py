"""Contracts of the tokenizer of shapes and of what it is made of."""

import functools

import jax

from tests.contracts import harness
from tests.contracts.harness import Case
from tests.tokenizers.filled_module import filled_tokenizer
from tokjax.ops import fourier, triplanes
from tokjax.tokenizers import vat
from tokjax.tokenizers.codebook import CodebookConfig
from tokjax.tokenizers.multi_scale_quantizer import MultiScaleConfig
from tokjax.tokenizers.transformer import TransformerConfig

WIDTH = 8
STACK = {"width": WIDTH, "num_layers": 1, "num_heads": 2}
CONFIG = vat.VATConfig(
  MultiScaleConfig(
    CodebookConfig(6, 4, learning="ema"),
    (1, 2),
    layout="row",
    num_convolutions=0,
    code_deviation=1.0,
  ),
  encoder=TransformerConfig(**STACK),
  decoder=TransformerConfig(**STACK),
  planes=TransformerConfig(**STACK, context_dim=WIDTH),
  num_frequencies=2,
  plane_tokens=2,
  plane_shuffle=2,
  plane_dim=4,
  head_width=4,
  num_volume=3,
)


def shapes(seed):
  keys = jax.random.split(jax.random.key(seed), 3)
  points = jax.random.uniform(keys[0], (8, 5, 6), minval=-1)
  queries = jax.random.uniform(keys[1], (8, 6, 3), minval=-1)
  return points, queries, jax.random.bernoulli(keys[2], 0.5, (8, 6))


def reconstructed(weights, points, queries, occupancy):
  model, state = weights
  return model(
    points, queries, occupancy, state, train=True, key=jax.random.key(2)
  )


def planes(seed):
  keys = jax.random.split(jax.random.key(seed))
  places = jax.random.uniform(keys[1], (8, 5, 3), minval=-1)
  return jax.random.normal(keys[0], (8, 3, 4, 4, 2)), places


CASES = [
  Case(
    "vat",
    reconstructed,
    shapes,
    batched=(0, 1, 2),
    differentiable=(0, 1),
    # A rounded coordinate may fall to another code.
    bfloat16_tolerance=None,
    weights=functools.partial(filled_tokenizer, CONFIG),
  ),
  Case(
    "triplane-query",
    triplanes.triplane_query,
    planes,
    batched=(0, 1),
    differentiable=(0, 1),
  ),
  Case(
    "triplane-query-in-blocks",
    lambda x, places: triplanes.triplane_query(
      x, places, combine="concatenate", block_size=2
    ),
    planes,
    batched=(0, 1),
    differentiable=(0, 1),
  ),
  Case(
    "fourier-features",
    lambda x: fourier.fourier_features(x, num_frequencies=3),
    lambda seed: shapes(seed)[1:2],
    differentiable=(0,),
  ),
]


@harness.all_checks(CASES)
def test_contract(check, case):
  check(case)

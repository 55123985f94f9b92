"""Contracts of vector quantisation without codebook state."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.contracts import harness
from tests.contracts.harness import Case
from tokjax.ops import (
  binary_codes,
  bit_indices,
  code_entropy,
  code_usage,
  estimators,
  scalar_codes,
)

LEVELS = (5, 4, 3)


def normal(rng, *shape):
  return rng.normal(size=shape).astype(np.float32)


def features(seed):
  return (normal(np.random.default_rng(seed), 8, 4, 3),)


def pairs(seed):
  rng = np.random.default_rng(seed)
  return normal(rng, 8, 4, 5), normal(rng, 8, 4, 5)


def choices(seed):
  rng = np.random.default_rng(seed)
  return normal(rng, 8, 4, 5), normal(rng, 5, 3)


def masked(seed):
  rng = np.random.default_rng(seed)
  return normal(rng, 8, 5, 6), rng.random((8, 5)) < 0.7


def indices(seed):
  rng = np.random.default_rng(seed)
  index = rng.integers(-1, 60, (8, 5)).astype(np.int32)
  words = rng.integers(0, 2**32, (8, 5, 2), np.uint32)
  return index, rng.random((8, 5)) < 0.7, words


def estimated(x, q):
  moved = estimators.directional(jax.random.key(7), x, q)
  return estimators.rotate_to(x, q), moved


def picked(logits, book):
  drawn = estimators.gumbel_codes(jax.random.key(7), logits, book)
  return drawn, estimators.index_backpropagation(logits, book)


def entropies(logits, mask):
  over_bits = code_entropy.bit_entropy_penalty(logits, mask)
  return code_entropy.entropy_penalty(logits, mask), over_bits


def rounded(z):
  residual = scalar_codes.residual_fsq_quantize(z, LEVELS, num_stages=2)
  signs = binary_codes.lfq_quantize(z), binary_codes.bsq_quantize(z)
  return scalar_codes.fsq_quantize(z, LEVELS), residual, signs


def from_indices(index, mask, words):
  """All that starts from an index."""
  stages = jnp.where(mask[..., None], jnp.stack([index, index + 1], -1), -1)
  tokens = bit_indices.split_index(index, (4, 3))
  wide = binary_codes.bsq_decode(words, num_bits=50)
  histogram = code_usage.code_histogram(index, mask, num_codes=60)
  return (
    scalar_codes.fsq_decode(index, LEVELS),
    scalar_codes.residual_fsq_decode(stages, LEVELS),
    binary_codes.lfq_decode(index, num_bits=7, bit_order="lsb"),
    bit_indices.join_index(tokens, (4, 3)),
    bit_indices.bits_to_index(wide > 0),
    histogram,
    code_usage.usage(histogram),
    code_usage.perplexity(histogram),
  )


BOTH = (0, 1)
CASES = [
  Case("estimators", estimated, pairs, BOTH, differentiable=BOTH),
  Case("picked", picked, choices, differentiable=BOTH),
  Case("entropies", entropies, masked, BOTH, differentiable=(0,)),
  Case("rounded", rounded, features, differentiable=(0,)),
  Case("from_indices", from_indices, indices, (0, 1, 2)),
]


@harness.all_checks(CASES)
def test_contract(check, case):
  check(case)

"""Contracts of the kernels: one row per public function and implementation."""

import functools

import jax
import jax.numpy as jnp

from tests.contracts import harness
from tests.contracts.harness import Case
from tokjax.kernels.maxsim import (
  maxsim,
  maxsim_alignment,
  maxsim_packed,
  maxsim_pairs,
)
from tokjax.kernels.nearest_code import nearest_code, topk_codes

# Scores are sums of 5 inner products of width 16; bfloat16 inputs are widened
# or summed in float32, so only the order of summation differs.
SUMS = 2e-5


def sets(seed, num_queries=8, num_documents=8):
  keys = jax.random.split(jax.random.key(seed), 4)
  queries = jax.random.normal(keys[0], (num_queries, 5, 16))
  documents = jax.random.normal(keys[1], (num_documents, 11, 16))
  query_mask = jax.random.bernoulli(keys[2], 0.8, queries.shape[:2])
  document_mask = jax.random.bernoulli(keys[3], 0.7, documents.shape[:2])
  return queries, documents, query_mask, document_mask


def pairs(seed, rows=8):
  queries, documents, query_mask, document_mask = sets(seed, rows, 3 * rows)
  documents = documents.reshape(rows, 3, 11, 16)
  return queries, documents, query_mask, document_mask.reshape(rows, 3, 11)


def packed(seed):
  queries, documents, query_mask, _ = sets(seed)
  tokens = documents.reshape(-1, 16)
  key = jax.random.fold_in(jax.random.key(seed), 1)
  ids = jnp.sort(jax.random.randint(key, tokens.shape[:1], 0, 13))
  return queries, tokens, ids, query_mask


def codes(seed):
  keys = jax.random.split(jax.random.key(seed), 3)
  x = jax.random.normal(keys[0], (8, 5, 6))
  mask = jax.random.bernoulli(keys[2], 0.8, x.shape[:2])
  return x, jax.random.normal(keys[1], (24, 6)), mask


def maxsim_case(name, function, inputs=sets, batched=(0, 1, 2, 3), **settings):
  return Case(
    name,
    functools.partial(function, **settings),
    inputs,
    batched=batched,
    differentiable=(0, 1),
    tolerance=SUMS,
  )


CASES = [
  maxsim_case("maxsim", maxsim),
  maxsim_case("maxsim-reference", maxsim, implementation="reference"),
  maxsim_case("maxsim-xla", maxsim, implementation="xla"),
  maxsim_case("maxsim-documents", maxsim, batched=(1, 3)),
  maxsim_case("maxsim-queries", maxsim, batched=(0, 2), mean=True),
  # 3,000 bytes: blocks of a few documents, a number that does not divide 8.
  maxsim_case("maxsim-blocks", maxsim, memory_budget_bytes=3000),
  maxsim_case("maxsim_pairs", maxsim_pairs, pairs),
  maxsim_case(  # two rows a device
    "maxsim_pairs-rows", maxsim_pairs, functools.partial(pairs, rows=16)
  ),
  maxsim_case("maxsim_packed", maxsim_packed, packed, (0, 3), num_documents=12),
  maxsim_case(
    "maxsim_packed-blocks",
    maxsim_packed,
    packed,
    (0, 3),
    num_documents=12,
    memory_budget_bytes=2000,
  ),
  maxsim_case("maxsim_alignment", maxsim_alignment),
  Case("nearest_code", nearest_code, codes, batched=(0, 2)),
  Case(  # codes are spread over the devices, tokens are not
    "nearest_code-codes",
    functools.partial(nearest_code, metric="cosine", block_size=2),
    codes,
    batched=(1,),
  ),
  Case(  # three codes a device
    "topk_codes-codes",
    lambda x, codebook, mask: topk_codes(x, codebook, 5, mask, block_size=7),
    codes,
    batched=(1,),
  ),
]


@harness.all_checks(CASES)
def test_contract(check, case):
  check(case)

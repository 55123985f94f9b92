"""Contracts of the ops: one row per public function."""

import functools

import jax

from tests.contracts import harness
from tests.contracts.harness import Case
from tokjax.ops.selection import TopK, merge_top_k, streaming_top_k, top_k
from tokjax.ops.similarity import safe_normalize


@jax.jit
def vectors(seed):
  return (jax.random.normal(jax.random.key(seed), (8, 7)),)


@jax.jit
def search(seed):
  keys = jax.random.split(jax.random.key(seed), 2)
  queries = jax.random.normal(keys[0], (8, 6))
  return queries, jax.random.normal(keys[1], (40, 6))


@jax.jit
def two_selections(seed):
  keys = jax.random.split(jax.random.key(seed), 2)
  a, b = (top_k(jax.random.normal(key, (8, 9)), 4) for key in keys)
  return a.values, a.index, b.values, b.index + 9


def merge(a_values, a_index, b_values, b_index):
  return merge_top_k(TopK(a_values, a_index), TopK(b_values, b_index), 5)


SELECTION = [
  Case("top_k", lambda x: top_k(x, 3), vectors, differentiable=(0,)),
  Case("merge_top_k", merge, two_selections, (0, 1, 2, 3), (0, 2)),
  Case(
    "streaming_top_k",
    functools.partial(streaming_top_k, k=5, block_size=16),
    search,
    differentiable=(0, 1),
  ),
]

SIMILARITY = [
  Case("safe_normalize", safe_normalize, vectors, differentiable=(0,)),
]

CASES = [*SELECTION, *SIMILARITY]


@harness.all_checks(CASES)
def test_contract(check, case):
  check(case)

"""Contracts of XTR: training scores, aggregation and search."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests.contracts import harness
from tests.contracts.harness import Case
from tokjax.retrieval import token_index, token_retrieval, xtr

DIM = 16


def unit_rows(seed, *shape):
  rows = np.random.default_rng(seed).standard_normal((*shape, DIM))
  rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
  return jnp.asarray(rows, jnp.float32)


def batch(seed):
  random = np.random.default_rng(seed)
  query_mask = jnp.asarray(random.random((8, 4)) < 0.8)
  document_mask = jnp.asarray(random.random((16, 6)) < 0.8)
  queries, documents = unit_rows(seed, 8, 4), unit_rows(seed + 10, 16, 6)
  return queries, documents, query_mask, document_mask


def train_case(name, batched, **settings):
  return Case(
    name,
    functools.partial(xtr.train_scores, **settings),
    batch,
    batched=batched,
    differentiable=(0, 1),
  )


def entries(seed):
  random = np.random.default_rng(seed)
  shape = (8, 4, 6)
  documents = jnp.asarray(random.integers(-1, 9, shape), jnp.int32)
  scores = jnp.asarray(random.standard_normal(shape), jnp.float32)
  return documents, scores, jnp.asarray(random.random((8, 4)) < 0.8)


def aggregate_case(name, **settings):
  return Case(
    name,
    functools.partial(xtr.aggregate, k=5, **settings),
    entries,
    batched=(0, 1, 2),
    differentiable=(1,),
  )


@functools.cache
def index():
  random = np.random.default_rng(0)
  offsets = np.concatenate([[0], np.cumsum(random.integers(0, 30, 32))])
  tokens = np.asarray(unit_rows(0, int(offsets[-1])))
  return token_index.build(tokens, offsets, page_size=4)


def questions(seed):
  index()  # built here, outside of any trace
  random = np.random.default_rng(seed)
  return unit_rows(seed, 8, 5), jnp.asarray(random.random((8, 5)) < 0.8)


CASES = [
  train_case("train-exact", (0, 1, 2, 3), k_train=7),
  train_case("train-queries-sharded", (0, 2), k_train=7),
  train_case("train-documents-sharded", (1, 3), k_train=7),
  train_case("train-threshold", (0, 1, 2, 3), k_train=7, topk="threshold"),
  train_case(
    "train-blocks", (0, 1, 2, 3), k_train=7, memory_budget_bytes=10_000
  ),
  # Few tokens are retrieved, so every maximum is positive and counted.
  train_case("train-positive", (0, 1, 2, 3), k_train=7, z="positive"),
  aggregate_case("aggregate-table", num_documents=9),
  aggregate_case("aggregate-sorted"),
  Case(
    "xtr-search",
    lambda queries, mask: xtr.search(
      index(), queries, mask, k=5, k_prime=9, block_size=64
    ),
    questions,
    batched=(),  # documents are what could be spread
  ),
  Case(
    "nearest-tokens",
    lambda queries, mask: token_retrieval.nearest_tokens(
      index(), queries[:, 0], 9, block_size=64
    ),
    questions,
    batched=(),
  ),
]


@harness.all_checks(CASES)
def test_contract(check, case):
  check(case)


def test_aggregate_maps_over_queries():
  aggregate = jax.jit(functools.partial(xtr.aggregate, k=5))
  documents, scores, mask = map(np.asarray, entries(0))
  together = aggregate(documents, scores, mask)
  for i in range(8):
    rows = (x[i : i + 1] for x in (documents, scores, mask))
    one = aggregate(*rows)
    np.testing.assert_array_equal(one.index[0], together.index[i])
    np.testing.assert_allclose(
      jax.device_get(one.scores[0]), together.scores[i], rtol=1e-6
    )

"""Contracts of codecs and search: one row per function of arrays."""

import functools

import jax
import numpy as np

from tests.contracts import harness
from tests.contracts.harness import Case
from tokjax.retrieval import codecs, index_scoring, search, token_index

DIM = 16
SUMS = 2e-5  # sums of at most 5 inner products of width 16


def unit_rows(seed, *shape):
  rows = np.random.default_rng(seed).standard_normal((*shape, DIM))
  rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
  return jax.numpy.asarray(rows, jax.numpy.float32)


@functools.cache
def index():
  random = np.random.default_rng(0)
  lengths = random.integers(0, 30, 32)
  offsets = np.concatenate([[0], np.cumsum(lengths)])
  tokens = np.asarray(unit_rows(0, int(offsets[-1])))
  means = token_index.mean_vectors(tokens, offsets)
  return token_index.build(
    tokens,
    offsets,
    page_size=4,
    candidates={"mean": token_index.store_vectors(means)},
  )


def questions(seed):
  index()  # built here, outside of any trace
  random = np.random.default_rng(seed)
  return unit_rows(seed, 8, 5), jax.numpy.asarray(random.random((8, 5)) < 0.8)


def lists(seed):
  random = np.random.default_rng(seed)
  documents = jax.numpy.asarray(random.integers(-1, 32, (8, 6)), "int32")
  return *questions(seed), documents


@functools.cache
def codec(name):
  return codecs.train(name, None, np.zeros((1, DIM), np.float32))


def round_trip(name, rows):
  return codec(name).decode(codec(name).encode(rows))


CASES = (
  [
    Case(
      f"codec-{name}",
      functools.partial(round_trip, name),
      lambda seed: (unit_rows(seed, 8),),
      tolerance=1e-5,
      # A value at the border of a bucket may fall on its other side.
      bfloat16_tolerance=0.05 if name == "float32" else None,
    )
    for name in ("float32", "bfloat16", "int8")
  ]
  + [
    Case(
      f"search-{mode}",
      lambda queries, mask, mode=mode: search.search(
        index(), queries, mask, mode=mode, k=5, num_candidates=9
      ),
      questions,
      batched=(),  # documents are what `search_sharded` spreads
      tolerance=SUMS,
    )
    for mode in ("exact", "mean")
  ]
  + [
    Case(
      "rescore",
      lambda *arrays: index_scoring.rescore(index(), *arrays),
      lists,
      batched=(),
      tolerance=SUMS,
    )
  ]
)


@harness.all_checks(CASES)
def test_contract(check, case):
  check(case)

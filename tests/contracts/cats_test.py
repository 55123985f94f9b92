"""Contracts of CATS and of the gated MLP over active rows."""

import functools

import jax

from tests.contracts import harness
from tests.contracts.harness import Case
from tokjax.kernels.gated_mlp import gated_rows
from tokjax.sparse import cats

CONFIG = cats.CatsConfig(sparsity=0.7)


def mlp(seed, tokens=(8, 2)):
  keys = jax.random.split(jax.random.key(seed), 5)
  x = jax.random.normal(keys[0], (*tokens, 8))
  w_gate = jax.random.normal(keys[1], (8, 16)) / 3
  w_up, w_down = (jax.random.normal(key, (16, 8)) / 4 for key in keys[2:4])
  return x, w_gate, w_up, w_down, jax.random.bernoulli(keys[4], 0.8, tokens)


def rows(seed):
  x, w_gate, w_up, w_down, _ = mlp(seed, (8,))
  gate = cats.sparse_gate(cats.silu_gate(x, w_gate), 0.3)
  return x, gate, w_up, w_down


def sparse(x, w_gate, w_up, w_down, mask, **settings):
  return cats.gated_mlp(x, w_gate, w_up, w_down, 0.2, mask, **settings)


def calibrated(x, w_gate, w_up, w_down, mask):
  del w_up, w_down
  gate = cats.silu_gate(x, w_gate)
  first = cats.observe(cats.start_histogram(), gate, mask)
  second = cats.observe(cats.refine(first, CONFIG), gate, mask)
  return cats.find_threshold(second, CONFIG), first.total


def mlp_case(name, function, **settings):
  return Case(name, function, mlp, batched=(0, 4), **settings)


CASES = [
  mlp_case("gated_mlp", sparse, differentiable=(0, 1, 2, 3)),
  mlp_case(
    "gated_mlp-rows",
    functools.partial(sparse, implementation="xla", capacity=12),
    differentiable=(0, 1, 2, 3),
  ),
  mlp_case("cats-threshold", calibrated),
  Case(
    "gated_rows",
    gated_rows,
    rows,
    batched=(0, 1),
    differentiable=(0, 1, 2, 3),
  ),
]


@harness.all_checks(CASES)
def test_contract(check, case):
  check(case)

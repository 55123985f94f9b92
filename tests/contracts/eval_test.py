"""Contracts of the metrics: one row per public array function."""

import functools

import jax
import jax.numpy as jnp

from tests.contracts import harness
from tests.contracts.harness import Case
from tokjax.eval import agreement, ranking


@jax.jit
def grades(seed):
  keys = jax.random.split(jax.random.key(seed), 2)
  ranked = jax.random.randint(keys[0], (8, 12), 0, 4).astype(jnp.float32)
  return ranked, jax.random.bernoulli(keys[1], 0.8, ranked.shape)


def with_ideal(seed):
  ranked, where = grades(seed)
  return ranked, -jnp.sort(-ranked, axis=1), where


def with_count(seed):
  ranked, where = grades(seed)
  return ranked, jnp.sum(ranked > 0, axis=1), where


@jax.jit
def rankings(seed):
  keys = jax.random.split(jax.random.key(seed), 17)
  rows = [jax.random.permutation(key, 40)[:10] for key in keys[:16]]
  where = jax.random.bernoulli(keys[16], 0.8, (8, 10))
  return jnp.stack(rows[:8]), jnp.stack(rows[8:]), where


@jax.jit
def scorings(seed):
  keys = jax.random.split(jax.random.key(seed), 2)
  return tuple(jax.random.normal(key, (8, 20)) for key in keys)


def metric(function, inputs, **settings):
  """Grades are small integers, exact in bfloat16."""
  return Case(
    f"{function.__name__}{'-capped' if 'capped' in settings else ''}",
    functools.partial(function, **settings),
    inputs,
    batched=tuple(range(len(inputs(0)))),
    bfloat16_tolerance=1e-6,
  )


CASES = [
  metric(ranking.ndcg, with_ideal, k=10),
  metric(ranking.recall, with_count, k=10),
  metric(ranking.recall, with_count, k=5, capped=True),
  metric(ranking.precision, grades, k=10),
  metric(ranking.success, grades, k=2),
  metric(ranking.reciprocal_rank, grades, k=10),
  metric(ranking.average_precision, with_count),
  metric(agreement.overlap, rankings),
  metric(agreement.top_one_recall, rankings),
  metric(agreement.spearman, scorings),
]


@harness.all_checks(CASES)
def test_contract(check, case):
  check(case)

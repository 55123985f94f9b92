"""Contracts of training losses and of the gradient cache."""

import functools

import jax
import jax.numpy as jnp

from tests.contracts import harness
from tests.contracts.harness import Case
from tokjax.kernels.maxsim import EMPTY_SCORE, maxsim
from tokjax.retrieval import losses
from tokjax.train.gradient_cache import cached_value_and_grad


def lists(seed, width=16):
  """Scores (one document is empty), teacher, mask, weight of 8 queries."""
  keys = jax.random.split(jax.random.key(seed), 4)
  scores = jax.random.normal(keys[0], (8, width)).at[2, 1].set(EMPTY_SCORE)
  teacher = jax.random.normal(keys[1], (8, width))
  mask = jax.random.bernoulli(keys[2], 0.8, (8, width)).at[:, 0].set(True)
  weight = jax.random.uniform(keys[3], (8,)).at[5].set(0)
  return scores, teacher, mask, weight


def without_teacher(seed):
  scores, _, mask, weight = lists(seed)
  return scores, mask, weight


@jax.jit
def token_sets(seed):
  keys = jax.random.split(jax.random.key(seed), 3)
  matrix = jax.random.normal(keys[0], (6, 6)) / 3
  queries = jax.random.normal(keys[1], (16, 4, 6))
  return matrix, queries, jax.random.normal(keys[2], (32, 5, 6))


def encode(matrix, tokens, key):
  del key
  return jnp.tanh(tokens @ matrix)


def score(embeddings):
  scores = maxsim(embeddings["queries"], embeddings["documents"])
  return losses.in_batch_cross_entropy(scores)


def cached(matrix, queries, documents):
  return cached_value_and_grad(
    encode,
    score,
    matrix,
    {"queries": queries, "documents": documents},
    chunk_size=8,
  )


def case(name, function, inputs, **settings):
  return Case(
    name,
    functools.partial(function, **settings),
    inputs,
    batched=tuple(range(4 if inputs is lists else 3)),
    differentiable=(0,),
    bfloat16_tolerance=1e-5,  # scores are widened before anything else
  )


CASES = [
  case("nway_cross_entropy", losses.nway_cross_entropy, without_teacher),
  case("in_batch", losses.in_batch_cross_entropy, without_teacher),
  case(
    "in_batch-stanford",
    losses.in_batch_cross_entropy,
    without_teacher,
    own_negatives=False,
  ),
  case("kl_distillation", losses.kl_distillation, lists, temperature=0.5),
  case("kl-min_max", losses.kl_distillation, lists, normalize="min_max"),
  case("margin_mse", losses.margin_mse, lists),
  # bfloat16 embeddings are rounded after the encoder: 2**-8 of scores near 4.
  Case("cached_value_and_grad", cached, token_sets, batched=(1, 2)),
]


@harness.all_checks(CASES)
def test_contract(check, case):
  check(case)

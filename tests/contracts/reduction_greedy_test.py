"""Contracts of greedy selection and of the methods built on it."""

import functools

import jax
import jax.numpy as jnp

from tests.contracts import harness
from tests.contracts.harness import Case
from tokjax.kernels.greedy_select import (
  greedy_select,
  greedy_select_features,
)
from tokjax.reduction.catp import catp_context, catp_query, catp_stage1
from tokjax.reduction.divprune import divprune
from tokjax.reduction.mmtok import mmtok
from tokjax.reduction.todre import cls_pivot, cross_modal_ratio, todre


def normal(seed, i, *shape):
  return jax.random.normal(jax.random.key(100 * seed + i), shape)


def valid(seed, num_tokens=11):
  return jax.random.bernoulli(jax.random.key(seed + 50), 0.8, (8, num_tokens))


def features(seed):
  return normal(seed, 0, 8, 11, 6), valid(seed)


def table(seed):
  x = normal(seed, 1, 8, 11, 6)
  return jnp.einsum("bnd,bmd->bnm", x, x) / 6, valid(seed)


@jax.jit
def table_and_bonus(seed):
  x, mask = table(seed)
  return x, mask, jax.random.uniform(jax.random.key(seed), (8, 11))


@jax.jit
def with_pivot(seed):
  pivot = jax.random.randint(jax.random.key(seed), (8,), 0, 11)
  return features(seed)[0], pivot, valid(seed)


def with_texts(seed):
  text, text_mask = normal(seed, 3, 8, 4, 6), valid(seed, 4)
  return (
    *features(seed)[:1],
    normal(seed, 2, 8, 11, 3),
    text,
    valid(seed),
    text_mask,
  )


def with_mean(seed):
  return features(seed)[0], normal(seed, 4, 8, 6), valid(seed)


@jax.jit
def with_attention(seed):
  rows = jax.random.uniform(jax.random.key(seed), (2, 8, 11))
  x, mean, mask = with_mean(seed)
  return x, *rows, mean, mask


@jax.jit
def attention(seed):
  kinds = jax.random.randint(jax.random.key(seed), (8, 11), 0, 3)
  return normal(seed, 5, 8, 4, 11, 8), normal(seed, 6, 8, 2, 11, 8), kinds


def selection(name, **settings):
  if "bonus" not in name:
    function = functools.partial(greedy_select, num_keep=5, **settings)
    return Case(name, function, table, batched=(0, 1))

  def function(table, mask, bonus):
    return greedy_select(table, mask, bonus=bonus, num_keep=5, **settings)

  return Case(name, function, table_and_bonus, batched=(0, 1, 2))


def method(name, function, inputs, **settings):
  return Case(
    name,
    functools.partial(function, **settings),
    inputs,
    batched=tuple(range(len(inputs(0)))),
    differentiable=(0,),
  )


CASES = [
  selection("max_min"),
  selection("max_min-reference", implementation="reference"),
  selection("max_sum", objective="max_sum"),
  selection("coverage-bonus", objective="coverage"),
  selection("mmr-bonus", objective="mmr"),
  selection("dpp-bonus", objective="dpp"),
  Case(
    "features",
    functools.partial(greedy_select_features, num_keep=5, block_size=4),
    features,
    batched=(0, 1),
  ),
  method("divprune", divprune, features, num_keep=5),
  method("divprune-l1", divprune, features, num_keep=5, metric="l1"),
  method(
    "divprune-stream", divprune, features, num_keep=5, gram="stream",
    first="index",
  ),
  method("todre", todre, with_pivot, num_keep=5),
  method("mmtok", mmtok, with_texts, num_keep=5),
  method("catp_stage1", catp_stage1, with_mean, num_keep=5),
  method("catp_context", catp_context, with_attention, num_keep=5),
  method("catp_query", catp_query, with_mean, num_keep=5),
  Case("cls_pivot", cls_pivot, lambda seed: (normal(seed, 7, 8, 3, 11),)),
  Case("cross_modal_ratio", cross_modal_ratio, attention, batched=(0, 1, 2)),
]  # fmt: skip


@harness.all_checks(CASES)
def test_contract(check, case):
  check(case)

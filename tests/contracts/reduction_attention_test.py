"""Contracts of attention scores and of the methods that rank by them."""

import functools

import jax
import jax.numpy as jnp

from tests.contracts import harness
from tests.contracts.harness import Case
from tokjax.kernels.column_attention import column_attention
from tokjax.ops import attention_scores
from tokjax.reduction import controls, fastv, hiprune, vtc_cls

GRID = (3, 4)


def layer(seed, heads=2, key_heads=2, rows=9, keys=9):
  parts = jax.random.split(jax.random.key(seed), 4)
  q = jax.random.normal(parts[0], (8, heads, rows, 8))
  k = jax.random.normal(parts[1], (8, key_heads, keys, 8))
  mask = jax.random.bernoulli(parts[2], 0.8, (8, keys))
  weight = jax.random.uniform(parts[3], (8, rows))
  return q, k, mask, jnp.where(weight < 0.2, 0, weight)


def one_row(seed, heads=4, key_heads=2):
  q, k, mask, _ = layer(seed, heads, key_heads, rows=1, keys=14)
  key = jax.random.fold_in(jax.random.key(seed), 7)
  return q, k, jax.random.randint(key, (8, 6), 0, 14), mask


def layers(seed):
  q, k, mask, _ = layer(seed, rows=1, keys=9)
  return jnp.stack([q, q + 1], 1), jnp.stack([k, k * 2], 1), mask[:, 1:]


@jax.jit
def scored(seed):
  parts = jax.random.split(jax.random.key(seed), 4)
  features = jax.random.normal(parts[0], (8, 12, 5))
  # Sixteenths, which bfloat16 holds.
  scores = [
    jax.random.randint(part, (8, 12), 0, 16) / 16 for part in parts[1:3]
  ]
  mask = jax.random.bernoulli(parts[3], 0.8, (8, 12))
  return features, *scores, mask


@jax.jit
def with_text(seed):
  key = jax.random.fold_in(jax.random.key(seed), 3)
  text = jax.random.normal(key, (8, 4, 5))
  return *scored(seed), text, jnp.ones((8, 4), bool)


@jax.jit
def images(seed):
  return (jax.random.uniform(jax.random.key(seed), (8, 16, 16, 3)),)


def cls_scores(q, k, mask):
  return vtc_cls.cls_scores(jnp.swapaxes(q, 0, 1), jnp.swapaxes(k, 0, 1), mask)


def last_token(q, k, index, mask):
  return fastv.fastv_scores(q, k, index, mask)


def row_attention(q, k, index, mask):
  del index
  return attention_scores.row_attention(q, k, mask)


def outliers(features, shallow, deep, mask):
  del features, deep
  return attention_scores.iqr_upper(shallow, mask)


def by_shallow(method):
  def keep(features, shallow, deep, mask):
    del deep
    return method(features, shallow, mask, num_keep=5)

  return keep


def random_keep(features, shallow, deep, mask):
  del shallow, deep
  return controls.random_keep(jax.random.key(0), features, mask, num_keep=5)


def uniform_keep(features, shallow, deep, mask):
  del shallow, deep
  return controls.uniform_keep(features, mask, num_keep=5)


def pool_keep(features, shallow, deep, mask):
  del shallow, deep
  return controls.pool_keep(features, mask, num_keep=6, grid=GRID)


def column_case(name, inputs=layer, **settings):
  return Case(
    name,
    functools.partial(column_attention, **settings),
    inputs,
    batched=(0, 1, 2, 3),
    bfloat16_tolerance=2e-5,  # products are exact, sums are float32
  )


def method_case(name, function, inputs=scored, batched=(0, 1, 2, 3)):
  return Case(name, function, inputs, batched=batched, differentiable=(0,))


CASES = [
  column_case("column_attention"),
  column_case("column_attention-reference", implementation="reference"),
  column_case(
    "column_attention-grouped",
    functools.partial(layer, heads=4, rows=5),
    causal=True,
  ),
  Case("row_attention", row_attention, one_row, (0, 1, 2, 3), (0, 1)),
  Case("iqr_upper", outliers, scored, (0, 1, 2, 3)),
  Case("cls_scores", cls_scores, layers, (0, 1, 2)),
  Case("fastv_scores", last_token, one_row, (0, 1, 2, 3)),
  Case(
    "received_scores",
    lambda q, k, mask, _: hiprune.received_scores(q, k, mask),
    layer,
    (0, 1, 2, 3),
  ),
  method_case("vtc_cls", by_shallow(vtc_cls.vtc_cls)),
  method_case("fastv", by_shallow(fastv.fastv)),
  method_case(
    "hiprune",
    functools.partial(hiprune.hiprune, num_keep=5, alpha=1.0, grid=GRID),
  ),
  method_case(
    "hiprune-reference",
    functools.partial(
      hiprune.hiprune, num_keep=7, alpha=1.0, grid=GRID, compat="reference"
    ),
  ),
  method_case(
    "hiprune-text",
    functools.partial(hiprune.hiprune, num_keep=5, beta=0.4, grid=GRID),
    with_text,
    tuple(range(6)),
  ),
  method_case("random_keep", random_keep),
  method_case("uniform_keep", uniform_keep),
  method_case("pool_keep", pool_keep),
  method_case(
    "downsample",
    functools.partial(controls.downsample, num_keep=4, patch_size=4),
    images,
    (0,),
  ),
]


@harness.all_checks(CASES)
def test_contract(check, case):
  check(case)

"""Contracts of CRISP, of what it is compared with, and of projection heads."""

import functools

import jax
from flax import nnx

from tests.contracts import harness
from tests.contracts.harness import Case
from tests.tokenizers.filled_module import filled
from tokjax.retrieval import crisp, heads, token_pruning


def texts(seed, num_tokens=11):
  x_key, mask_key = jax.random.split(jax.random.key(seed))
  x = jax.random.normal(x_key, (8, num_tokens, 6))
  return x, jax.random.bernoulli(mask_key, 0.7, x.shape[:2])


def from_random_tokens(x, mask):
  return crisp.cluster(x, mask, num_clusters=3, key=jax.random.key(7))


def both_sides(seed):
  (q, q_mask), (d, d_mask) = texts(seed, 5), texts(seed + 10)
  return q, d, q_mask, d_mask


def head(**settings):
  config = heads.HeadConfig(input_dim=6, output_dim=4, **settings)
  return filled(lambda: heads.ProjectionHead(config, rngs=nnx.Rngs(0)))


def project(head, x, _mask):
  return jax.tree.map(lambda p: p.astype(x.dtype), head)(x)


def rows(name, function, **settings):
  return Case(
    name,
    functools.partial(function, **settings),
    texts,
    batched=(0, 1),
    differentiable=(0,),
  )


def projected(name, **settings):
  return Case(
    name,
    project,
    texts,
    batched=(0, 1),
    differentiable=(0,),
    weights=functools.partial(head, **settings),
  )


CASES = [
  rows("crisp-fixed", crisp.cluster, num_clusters=3),
  rows("crisp-ratio", crisp.cluster, ratio=0.4, renormalize=True),
  rows("crisp-random", from_random_tokens),
  Case(
    "crisp-score",
    lambda *arrays: crisp.score(
      *arrays, crisp.CrispConfig(query_clusters=2, document_ratio=0.5)
    ),
    both_sides,
    batched=(0, 1, 2, 3),
    differentiable=(0, 1),
    # Sums of at most two inner products of means of bfloat16 rounding.
    bfloat16_tolerance=0.1,
  ),
  rows("keep-first", token_pruning.keep_tokens, num_keep=4),
  rows("keep-last", token_pruning.keep_tokens, num_keep=4, keep="last"),
  rows("keep-every", token_pruning.keep_every, step=3),
  projected("head-linear", bias=True),
  projected("head-ffn", kind="ffn", activation="gelu", residual="first"),
  projected(
    "head-glu",
    kind="glu",
    activation="silu",
    residual="all",
    learned_scale=True,
    bias=True,
  ),
]


@harness.all_checks(CASES)
def test_contract(check, case):
  check(case)

"""Contracts of sparse attention."""

import jax

from tests.contracts import harness
from tests.contracts.harness import Case
from tokjax.kernels.sparse_attention import rule_attention
from tokjax.ops import mask_rules
from tokjax.sparse import anchor_attention as aa
from tokjax.sparse.anchor_attention import AnchorConfig


def heads(seed):
  parts = jax.random.split(jax.random.key(seed), 3)
  return tuple(
    jax.random.normal(part, (8, num_heads, 16, 4))
    for part, num_heads in zip(parts, (2, 1, 1), strict=True)
  )


def anchored(q, k, v):
  config = AnchorConfig(block=2, step=2, theta=0.1, max_stripes=4)
  read, stats = aa.anchor_attention(q, k, v, config)
  return read, stats, aa.recall(read.lse, q, k)


def ruled(q, k, v):
  given = mask_rules.tokens(q.shape[2])
  return rule_attention(q, k, v, mask_rules.causal, given, block_size=8)


CASES = [
  Case(
    "rule-attention",
    ruled,
    heads,
    batched=(0, 1, 2),
    differentiable=(0, 1, 2),
  ),
  Case(
    "anchor-attention",
    anchored,
    heads,
    batched=(0, 1, 2),
    differentiable=(0, 1, 2),
  ),
]


@harness.all_checks(CASES)
def test_contract(check, case):
  check(case)

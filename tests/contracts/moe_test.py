"""Contracts of mixtures of experts.

The harness cuts tokens over eight devices, whose experts are whole: where they
are spread, see tests/parallel.
"""

import jax

from tests.contracts import harness
from tests.contracts.harness import Case
from tokjax.ops import moe_dispatch, moe_experts, moe_losses, moe_routing


def logits(seed):
  keys = jax.random.split(jax.random.key(seed))
  mask = jax.random.bernoulli(keys[1], 0.8, (8, 3))
  return 2 * jax.random.normal(keys[0], (8, 3, 4)), mask


def routed(score, **settings):
  def function(logits, mask):
    found = moe_routing.route(
      logits, mask, num_chosen=2, score=score, **settings
    )
    losses = (
      moe_losses.balance_loss(found.probabilities, found.counts, mask),
      moe_losses.sequence_balance_loss(found.probabilities, found.index, mask),
      moe_losses.z_loss(logits, mask),
    )
    return found, losses

  return function


def choices(seed):
  keys = jax.random.split(jax.random.key(seed), 3)
  index = jax.random.randint(keys[0], (8, 3, 2), -1, 4)
  weights = jax.random.uniform(keys[1], (8, 3, 2))
  return jax.random.normal(keys[2], (8, 3, 5)), index, weights


def by_rows(x, index, weights):
  """Each example is a set of tokens of its own."""

  def one(x, index, weights):
    kept = moe_dispatch.keep_within_capacity(
      index, weights, capacity=1, num_experts=4
    )
    plan = moe_dispatch.plan_rows(index, num_experts=4, num_buffers=4)
    rows = moe_dispatch.gather_rows(x, plan)
    return kept, plan, moe_dispatch.combine_rows(rows, weights, plan)

  return jax.vmap(one)(x, index, weights)


def tokens(seed):
  keys = jax.random.split(jax.random.key(seed), 4)
  index = jax.random.randint(keys[0], (16, 2), -1, 4)
  weights = jax.random.uniform(keys[1], (16, 2))
  experts = moe_experts.init_experts(keys[2], num_experts=4, width=5, hidden=6)
  return jax.random.normal(keys[3], (16, 5)), index, weights, *experts


def mixed(x, index, weights, *experts):
  return moe_experts.mixture(
    x, index, weights, moe_experts.Experts(*experts), capacity=4
  )


CASES = [
  Case("softmax", routed("softmax"), logits, (0, 1), (0,)),
  Case(
    "sigmoid-in-groups",
    routed("sigmoid", num_groups=2, num_kept_groups=1),
    logits,
    (0, 1),
    (0,),
  ),
  Case("sinkhorn", routed("sinkhorn"), logits, (0, 1), (0,)),
  Case("rows", by_rows, choices, (0, 1, 2), (0, 2)),
  Case("mixture", mixed, tokens, (0, 1, 2), (0, 2, 3, 4, 5)),
]


@harness.all_checks(CASES)
def test_contract(check, case):
  check(case)

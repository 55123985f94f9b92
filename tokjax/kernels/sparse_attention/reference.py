"""Attention under a rule in its shortest correct form: the definition of truth.

It makes the mask of all pairs.
"""

from tokjax.ops import attention, mask_rules
from tokjax.ops.mask_rules import Rule, Tokens
from tokjax.typing import Array, Float

__all__ = ["rule_attention_forward"]


def rule_attention_forward(
  q: Float[Array, "B H N d"],
  k: Float[Array, "B K M d"],
  v: Float[Array, "B K M e"],
  rule: Rule,
  readers: Tokens,
  read: Tokens,
) -> tuple[
  Float[Array, "B H N e"], Float[Array, "B H N"], Float[Array, "B H N"]
]:
  """What `rule_attention` returns: result, lse, highest logit, float32.

  Args:
    q: queries.
    k: keys, of a divisor of their heads.
    v: values.
    rule: who may read whom.
    readers: what the queries are.
    read: what the keys are.
  """
  mask = mask_rules.may_read(rule, readers, read)
  state, highest = attention.attend_with_highest(q, k, v, mask)
  return *state, highest

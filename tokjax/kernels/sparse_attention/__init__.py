"""Attention that leaves out the blocks of which a rule lets nothing be read."""

from tokjax.kernels.sparse_attention.api import RuleAttention, rule_attention

__all__ = ["RuleAttention", "rule_attention"]

"""Doing less of the work where most of it does not matter.

- `anchor_attention`: causal attention to the first keys, the last ones, and
  those that come near the best of them; `causal_heads`: a head at a time.
- `biformer`: regions of a map that read the few regions closest to them.
- `cats`: a gated MLP that skips the units whose gate is small.
- `rule_attention`: attention under a rule of what tokens are
  (`tokjax.ops.mask_rules`), without the blocks that the rule leaves empty.
"""

__all__ = [
  "anchor_attention",
  "biformer",
  "cats",
  "causal_heads",
  "rule_attention",
]

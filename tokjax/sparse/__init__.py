"""Doing less of the work where most of it does not matter.

- `anchor_attention`: causal attention to the first keys, the last ones, and
  those that come near the best of them; made of `causal_heads`, a head at a
  time, and `row_groups`, rows that read keys of their own.
- `biformer`: regions of a map that read the few regions closest to them.
- `cats`: a gated MLP that skips the units whose gate is small.

Attention under a rule of what tokens are (`tokjax.ops.mask_rules`), without
the blocks that the rule leaves empty: `tokjax.kernels.sparse_attention`.
"""

__all__ = [
  "anchor_attention",
  "biformer",
  "cats",
  "causal_heads",
  "row_groups",
]

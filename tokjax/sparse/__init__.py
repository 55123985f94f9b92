"""Doing less of the work where most of it does not matter.

- `anchor_attention`: causal attention to the first keys, the last ones, and
  those that come near the best of them; `causal_heads`: a head at a time.
- `biformer`: regions of a map that read the few regions closest to them.
- `cats`: a gated MLP that skips the units whose gate is small.
"""

__all__ = ["anchor_attention", "biformer", "cats", "causal_heads"]

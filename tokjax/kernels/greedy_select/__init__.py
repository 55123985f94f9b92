"""Greedy subset selection: K picks, one after the other, in one call."""

from tokjax.kernels.greedy_select.api import OBJECTIVES, greedy_select
from tokjax.kernels.greedy_select.features import (
  greedy_select_features,
  similarity_table,
)
from tokjax.kernels.greedy_select.picks import Picks

__all__ = [
  "OBJECTIVES",
  "Picks",
  "greedy_select",
  "greedy_select_features",
  "similarity_table",
]

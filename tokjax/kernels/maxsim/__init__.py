"""MaxSim: how well each query token is met by a document, summed."""

from tokjax.kernels.maxsim.api import (
  EMPTY_SCORE,
  Alignment,
  maxsim,
  maxsim_alignment,
  maxsim_pairs,
)
from tokjax.kernels.maxsim.packed import maxsim_packed

__all__ = [
  "EMPTY_SCORE",
  "Alignment",
  "maxsim",
  "maxsim_alignment",
  "maxsim_packed",
  "maxsim_pairs",
]

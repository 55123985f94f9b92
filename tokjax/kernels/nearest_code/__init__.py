"""Nearest codeword: which of K codes each token is closest to, exactly."""

from tokjax.kernels.nearest_code.api import nearest_code, topk_codes
from tokjax.kernels.nearest_code.search import METRICS, NearestCodes
from tokjax.kernels.nearest_code.sharding import sharded_nearest_code

__all__ = [
  "METRICS",
  "NearestCodes",
  "nearest_code",
  "sharded_nearest_code",
  "topk_codes",
]

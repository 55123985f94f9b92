"""Column attention: what each key receives from all rows of a softmax."""

from tokjax.kernels.column_attention.api import (
  ColumnAttention,
  column_attention,
)

__all__ = ["ColumnAttention", "column_attention"]

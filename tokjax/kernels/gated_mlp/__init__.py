"""Gated MLP over the rows of its weights that any token needs."""

from tokjax.kernels.gated_mlp.api import GatedRows, gated_rows

__all__ = ["GatedRows", "gated_rows"]

"""What every tokenizer and quantizer returns."""

from typing import NamedTuple

from tokjax.typing import Array, Bool, Float, Int

__all__ = ["Quantized"]


class Quantized(NamedTuple):
  """Vectors replaced by codes.

  Attributes:
    indices: which code each vector got, -1 where there is none; one more axis
      where a vector has several codes.
    codes: what stands for the vectors; in training with the gradient of the
      chosen estimator.
    mask: True where a vector counts; codes elsewhere are zero.
    losses: scalars by name, already weighted: their sum joins the loss.
    stats: scalars by name that say how the codebook fares: the share of codes
      in `usage`, and `perplexity`, over the vectors of the call.
  """

  indices: Int[Array, "..."]
  codes: Float[Array, "*batch D"]
  mask: Bool[Array, "*batch"]
  losses: dict[str, Float[Array, ""]]
  stats: dict[str, Float[Array, ""]]

"""What every tokenizer and quantizer returns.

A tokenizer of images is a module that training, evaluation and the command
line use through this much:

    tokenizer.reads                     # ("images",), ("features",) or both
    state = tokenizer.init_state(key)   # codebooks; () where there is none
    found, state = tokenizer(images, state, train=True, key=key)

`reads` names what the call takes before the state, in order: images are
[B, height, width, 3] in -1..1, features [B, N, C] of a frozen encoder. `found`
is a `Reconstructed`. What is worth having alone, `encode` and `decode`, each
system offers in its own form.
"""

from typing import NamedTuple

from tokjax.typing import Array, Bool, Float, Int

__all__ = ["Quantized", "Reconstructed"]


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


class Reconstructed(NamedTuple):
  """What a tokenizer makes of a batch and back again, for training.

  Attributes:
    output: what stands for the input: images in -1..1, channels last, or
      features.
    losses: scalars by name, already weighted: their sum is the loss.
    stats: scalars by name worth a line in a log.
  """

  output: Float[Array, "B ..."]
  losses: dict[str, Float[Array, ""]]
  stats: dict[str, Float[Array, ""]]

"""Codes of signs: lookup-free (LFQ) and binary spherical (BSQ) quantisation.

A code is one bit per channel. Its index is an int32 up to 31 channels, and
uint32 words above; `bit_indices` has the bit orders.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import UInt32

from tokjax.ops import bit_indices, estimators, similarity
from tokjax.ops.bit_indices import BitOrder
from tokjax.typing import Array, Float, Int

__all__ = [
  "BinaryCoded",
  "bsq_decode",
  "bsq_quantize",
  "lfq_decode",
  "lfq_quantize",
]


class BinaryCoded(NamedTuple):
  """What a quantiser by signs made of vectors.

  Attributes:
    codes: the signs, scaled, with the gradient that the quantiser documents.
    index: int32 up to 31 channels, and uint32 words on one more axis above.
  """

  codes: Float[Array, "*batch D"]
  index: Int[Array, "*batch"] | UInt32[Array, "*batch W"]


def lfq_quantize(
  x: Float[Array, "*batch D"],
  *,
  scale: float | Float[Array, ""] = 1.0,
  bit_order: BitOrder = "msb",
  soft_clamp: float | Float[Array, ""] | None = None,
) -> BinaryCoded:
  """Signs of the channels: scale where x > 0 and -scale elsewhere.

  The gradient is straight through, dz/dx = I. Nothing bounds the distance to
  the code: train with `code_entropy.bit_entropy_penalty` and a commitment
  loss, or clamp.

  Args:
    x: features, float32 inside.
    scale: size of a code's entries.
    bit_order: which channel is the highest bit of the index.
    soft_clamp: c of c tanh(x / c), done first, with its gradient; at least
      `scale`. None: no clamp.

  Returns:
    Codes in the dtype of x and their index.

  Raises:
    ValueError: if the bit order is unknown.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> coded = jax.jit(lfq_quantize)(jnp.array([0.3, 0.8, -1.2]))
    >>> coded.codes.tolist(), int(coded.index)
    ([1.0, 1.0, -1.0], 6)

  Source: Yu et al., 2024, "Language Model Beats Diffusion: Tokenizer is Key to
  Visual Generation" (MAGVIT-v2).
  """
  wide = x.astype(jnp.float32)
  if soft_clamp is not None:
    wide = jnp.tanh(wide / soft_clamp) * soft_clamp
  return _signs(wide, wide > 0, scale, bit_order, x.dtype)


def lfq_decode(
  index: Int[Array, "*batch"] | UInt32[Array, "*batch W"],
  *,
  num_bits: int,
  scale: float | Float[Array, ""] = 1.0,
  bit_order: BitOrder = "msb",
) -> Float[Array, "*batch D"]:
  """The codes that indices stand for.

  Args:
    index: from `lfq_quantize`. An int32 of -1 (padding) gives zeros.
    num_bits: D, channels of a code.
    scale: as when quantising.
    bit_order: as when quantising.

  Returns:
    float32 codes.

  Raises:
    ValueError: if the words are too few or many, or the bit order is unknown.
    TypeError: if more than 31 bits do not come in uint32 words.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> decode = jax.jit(lambda index: lfq_decode(index, num_bits=3))
    >>> decode(jnp.array([6, -1])).tolist()
    [[1.0, 1.0, -1.0], [0.0, 0.0, 0.0]]
  """
  bits = bit_indices.index_to_bits(
    index, num_bits=num_bits, bit_order=bit_order
  )
  codes = jnp.where(bits, jnp.float32(1), -1) * scale
  if num_bits > 31:
    return codes
  return jnp.where((index >= 0)[..., None], codes, 0)


def bsq_quantize(
  x: Float[Array, "*batch D"], *, bit_order: BitOrder = "msb"
) -> BinaryCoded:
  """Signs over sqrt(D): the nearest corner of the cube inside the unit sphere.

  x is scaled to length one first, u = x / |x| (0 stays 0), and the gradient is
  straight through to u: dz/dx = (I - u u^T) / |x|. |u - code|^2 = 2 - 2 sum
  |u_j| / sqrt(D), below 2. The logits of `code_entropy.bit_entropy_penalty`
  are 4 tau u / sqrt(D), with u from `similarity.safe_normalize`.

  Args:
    x: features, float32 inside.
    bit_order: which channel is the highest bit of the index.

  Returns:
    Codes in the dtype of x and their index.

  Raises:
    ValueError: if the bit order is unknown.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> coded = jax.jit(bsq_quantize)(jnp.array([0.3, -0.8, 1.2, 0.0]))
    >>> coded.codes.tolist(), int(coded.index)
    ([0.5, -0.5, 0.5, -0.5], 10)

  Source: Zhao, Xiong, Kraehenbuehl, 2024, "Image and Video Tokenization with
  Binary Spherical Quantization".
  """
  wide = x.astype(jnp.float32)
  unit = similarity.safe_normalize(wide)
  scale = 1 / math.sqrt(x.shape[-1])
  return _signs(unit, wide > 0, scale, bit_order, x.dtype)


def bsq_decode(
  index: Int[Array, "*batch"] | UInt32[Array, "*batch W"],
  *,
  num_bits: int,
  bit_order: BitOrder = "msb",
) -> Float[Array, "*batch D"]:
  """The unit vectors that indices stand for.

  Args:
    index: from `bsq_quantize`. An int32 of -1 (padding) gives zeros.
    num_bits: D, channels of a code.
    bit_order: as when quantising.

  Returns:
    float32 codes of length 1.

  Raises:
    ValueError: if the words are too few or many, or the bit order is unknown.
    TypeError: if more than 31 bits do not come in uint32 words.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> decode = jax.jit(lambda index: bsq_decode(index, num_bits=4))
    >>> decode(jnp.array(10)).tolist()
    [0.5, -0.5, 0.5, -0.5]
  """
  scale = 1 / math.sqrt(num_bits)
  return lfq_decode(index, num_bits=num_bits, scale=scale, bit_order=bit_order)


def _signs(continuous, bits, scale, bit_order, dtype):
  codes = jnp.where(bits, jnp.float32(1), -1) * scale
  codes = estimators.straight_through(continuous, codes).astype(dtype)
  index = bit_indices.bits_to_index(bits, bit_order=bit_order)
  return BinaryCoded(codes, index)

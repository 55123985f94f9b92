"""Bits as one number, as words and as a few small numbers.

Bit order "msb" puts the first channel in the highest bit (as
vector-quantize-pytorch and bsq-vit do), "lsb" in the lowest (Open-MAGVIT2):
110 is 6 or 3.
"""

from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt32

from tokjax import checks
from tokjax.typing import Array, Bool, Int

__all__ = [
  "BitOrder",
  "bits_to_index",
  "index_to_bits",
  "join_index",
  "split_index",
]

BitOrder = Literal["msb", "lsb"]


def bits_to_index(
  bits: Bool[Array, "*batch D"], *, bit_order: BitOrder = "msb"
) -> Int[Array, "*batch"] | UInt32[Array, "*batch W"]:
  """The number that bits write, or uint32 words of 32 bits each above 31.

  With words, channel j is in word j // 32, and "msb" and "lsb" say where in
  that word; what the last word has no bits for is 0. For files,
  `quantize.pack_bits(bits, num_bits=1)` packs them into bytes.

  Args:
    bits: one per channel.
    bit_order: which channel is the highest bit.

  Returns:
    int32 for D up to 31, else uint32 of width ceil(D / 32).

  Raises:
    ValueError: if the bit order is unknown.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> int(jax.jit(bits_to_index)(jnp.array([True, True, False])))
    6
  """
  checks.one_of(("msb", "lsb"), bit_order=bit_order)
  num_bits = bits.shape[-1]
  if num_bits <= 31:
    places = _places(num_bits, bit_order, bits.ndim, np.int32)
    return jnp.sum(bits.astype(jnp.int32) << places, axis=-1)
  padding = [(0, 0)] * (bits.ndim - 1) + [(0, -num_bits % 32)]
  words = jnp.pad(bits, padding).reshape(*bits.shape[:-1], -1, 32)
  places = _places(32, bit_order, words.ndim, np.uint32)
  return jnp.sum(words.astype(jnp.uint32) << places, axis=-1)


def index_to_bits(
  index: Int[Array, "*batch"] | UInt32[Array, "*batch W"],
  *,
  num_bits: int,
  bit_order: BitOrder = "msb",
) -> Bool[Array, "*batch D"]:
  """The bits that `bits_to_index` made a number or words of.

  Args:
    index: int32 up to 31 bits, uint32 words above.
    num_bits: D, bits to read.
    bit_order: as when packing.

  Returns:
    One bool per channel.

  Raises:
    ValueError: if the words are too few or many, or the bit order is unknown.
    TypeError: if more than 31 bits do not come in uint32 words.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> unpack = jax.jit(lambda index: index_to_bits(index, num_bits=3))
    >>> unpack(jnp.array(6)).tolist()
    [True, True, False]
  """
  checks.one_of(("msb", "lsb"), bit_order=bit_order)
  checks.in_range(1, 2**31 - 1, num_bits=num_bits)
  if num_bits <= 31:
    places = _places(num_bits, bit_order, index.ndim + 1, np.int32)
    return (index.astype(jnp.int32)[..., None] >> places) & 1 == 1
  checks.has_dtype(np.uint32, index=index)
  checks.same_size(index_words=index.shape[-1], num_words=-(-num_bits // 32))
  places = _places(32, bit_order, index.ndim + 1, np.uint32)
  bits = (index[..., None] >> places) & jnp.uint32(1) == 1  # [*batch, W, 32]
  return bits.reshape(*index.shape[:-1], -1)[..., :num_bits]


def split_index(
  index: Int[Array, "*batch"], bits: Sequence[int]
) -> Int[Array, "*batch G"]:
  """An index as sub-tokens of few bits each, the highest bits first.

  A language model then predicts 2^9 + 2^9 logits for 18 bits instead of 2^18.

  Args:
    index: int32, below 2^sum(bits); -1 (padding) gives -1 everywhere.
    bits: bits of every sub-token, in all at most 31; (9, 9) in Open-MAGVIT2.

  Returns:
    int32 sub-tokens, token i below 2^bits[i].

  Raises:
    ValueError: if the bits are not positive or too many.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> split = jax.jit(lambda index: split_index(index, (2, 4)))
    >>> split(jnp.array([0b10_0011, -1])).tolist()
    [[2, 3], [-1, -1]]

  Source: Luo et al., 2024, "Open-MAGVIT2" (asymmetric token factorization).
  """
  lowest, sizes = _parts(bits, index.ndim + 1)
  index = index.astype(jnp.int32)[..., None]
  return jnp.where(index >= 0, (index >> lowest) & (sizes - 1), -1)


def join_index(
  tokens: Int[Array, "*batch G"], bits: Sequence[int]
) -> Int[Array, "*batch"]:
  """The index that `split_index` took apart.

  Args:
    tokens: sub-tokens, the highest bits first.
    bits: bits of every sub-token.

  Returns:
    int32; -1 where a sub-token is negative.

  Raises:
    ValueError: if the bits are not one per token, not positive or too many.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> join = jax.jit(lambda tokens: join_index(tokens, (2, 4)))
    >>> join(jnp.array([[2, 3], [-1, -1]])).tolist()
    [35, -1]
  """
  checks.same_size(tokens_width=tokens.shape[-1], bits=len(bits))
  lowest, _ = _parts(bits, tokens.ndim)
  joined = jnp.sum(tokens.astype(jnp.int32) << lowest, axis=-1)
  return jnp.where(jnp.all(tokens >= 0, axis=-1), joined, -1)


def _places(num_bits, bit_order, ndim, dtype):
  places = np.arange(num_bits, dtype=dtype)
  places = places if bit_order == "lsb" else places[::-1]
  return places.reshape((1,) * (ndim - 1) + (-1,))


def _parts(bits, ndim):
  """Place of the lowest bit of each sub-token, and how many it can be."""
  if not bits or min(bits) < 1 or sum(bits) > 31:
    raise ValueError(
      f"bits must be positive and 31 at most in all, got {tuple(bits)}"
    )
  sizes = np.asarray(bits)
  lowest = sizes[::-1].cumsum()[::-1] - sizes
  shape = (1,) * (ndim - 1) + (-1,)
  return (
    lowest.astype(np.int32).reshape(shape),
    (2**sizes).astype(np.int32).reshape(shape),
  )

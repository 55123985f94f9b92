"""Finite scalar quantisation (FSQ): a few levels per channel, no codebook.

A code is one digit 0..L - 1 per channel; its index is the number those digits
write, the first channel counting least. Everything is float32 inside, and an
index is made of integers only, so that bfloat16 features lose no code.
"""

import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from tokjax import checks
from tokjax.ops import estimators
from tokjax.ops.estimators import Coded
from tokjax.typing import Array, Float, Int, Key

__all__ = [
  "FSQVariant",
  "fsq_decode",
  "fsq_quantize",
  "residual_fsq_decode",
  "residual_fsq_quantize",
]

# How a channel is bounded; see `fsq_quantize`.
FSQVariant = Literal["shifted", "symmetric"]
_MARGIN = 1e-3  # by which "shifted" reaches beyond its outermost levels


def fsq_quantize(
  z: Float[Array, "*batch D"],
  levels: Sequence[int],
  *,
  variant: FSQVariant = "shifted",
  noise_rate: float | Float[Array, ""] = 0.5,
  key: Key[Array, ""] | None = None,
) -> Coded:
  """Rounds each channel to one of its levels, within -1..1.

  "shifted", for a channel of L levels: h = 1.001 (L - 1) / 2, o = 1/2 for even
  L and 0 for odd, b = tanh(z + atanh(o / h)) h - o, code = round(b) / (L //
  2). So 0 is a code, and for even L the codes reach from -1 to 1 - 2 / L.
  "symmetric": the L codes are spread evenly from -1 to 1, and tanh(z) is
  rounded to the nearest. The gradient is that of the bounded value before
  rounding, here b / (L // 2).

  Args:
    z: features, one channel per entry of `levels`; any size is safe.
    levels: levels of every channel, a tuple under `jit`: at least 3 each (2
      for "symmetric"), with a product below 2^31. (8, 5, 5, 5) for 2^10 codes
      and (7, 5, 5, 5, 5) for 2^12 are the paper's.
    variant: how a channel is bounded.
    noise_rate: probability, per number, of noise instead of rounding, when
      there is a key; 0.5 is ours.
    key: PRNG key of noise dropout, for training: some codes are then the
      bounded value plus uniform noise of +-1/2 level, kept within the range
      of the codes. The index stays the rounded one. None: no noise.

  Returns:
    Codes in the dtype of z and their index.

  Raises:
    ValueError: if the levels are out of range or not one per channel, or the
      variant is unknown.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> quantize = jax.jit(lambda z: fsq_quantize(z, (8, 5, 5, 5)))
    >>> coded = quantize(jnp.array([0.3, -1.2, 2.0, 0.0]))
    >>> coded.codes.tolist(), int(coded.index)
    ([0.25, -1.0, 1.0, 0.0], 565)

  Source: Mentzer et al., 2023, "Finite Scalar Quantization: VQ-VAE Made
  Simple"; "symmetric" and the noise: Parker et al., 2024, "Scaling
  Transformers for Low-Bitrate High-Quality Speech Coding".
  vector-quantize-pytorch adds noise of +-1/2 to the rounded codes instead.
  """
  _check_levels(levels, variant)
  checks.same_size(z_width=z.shape[-1], levels=len(levels))
  wide = z.astype(jnp.float32)
  center, top = _center(levels, variant, z.ndim), _last(levels, z.ndim) - 1
  if variant == "shifted":
    exact = np.asarray(levels, np.float64)
    height = (exact - 1) * (1 + _MARGIN) / 2
    offset = np.where(exact % 2 == 0, 0.5, 0)
    height, offset, shift = (
      _last(x, z.ndim) for x in (height, offset, np.arctanh(offset / height))
    )
    bounded = jnp.tanh(wide + shift) * height - offset
    position = bounded + center  # in digits, -0.5..L - 0.5
    digit = jnp.round(bounded) + center
  else:
    position = (jnp.tanh(wide) + 1) * center
    digit = jnp.floor(position + 0.5)
  # Clipped as an integer: in range whatever z holds.
  digit = jnp.clip(digit.astype(jnp.int32), 0, top.astype(np.int32))
  value = digit.astype(jnp.float32)
  if key is not None:
    # Added to zeros, the draws are laid out over a mesh as z is.
    where, noise = (
      jnp.zeros_like(wide) + jax.random.uniform(k, z.shape)
      for k in jax.random.split(key)
    )
    noisy = jnp.clip(position + noise - 0.5, 0, top)
    value = jnp.where(where < noise_rate, noisy, value)
  codes = estimators.straight_through(
    _code(position, center), _code(value, center)
  )
  return Coded(codes.astype(z.dtype), _index(digit, levels))


def fsq_decode(
  index: Int[Array, "*batch"],
  levels: Sequence[int],
  *,
  variant: FSQVariant = "shifted",
) -> Float[Array, "*batch D"]:
  """The codes that indices stand for.

  Args:
    index: from `fsq_quantize`; -1 (padding) gives zeros.
    levels: as there.
    variant: as there.

  Returns:
    float32 codes.

  Raises:
    ValueError: if the levels are out of range or the variant is unknown.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> decode = jax.jit(lambda index: fsq_decode(index, (8, 5, 5, 5)))
    >>> decode(jnp.array([565, -1])).tolist()
    [[0.25, -1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
  """
  _check_levels(levels, variant)
  center = _center(levels, variant, index.ndim + 1)
  codes = _code(_digits(index, levels).astype(jnp.float32), center)
  return jnp.where((index >= 0)[..., None], codes, 0)


def residual_fsq_quantize(
  x: Float[Array, "*batch D"],
  levels: Sequence[int],
  *,
  num_stages: int,
  num_active: Int[Array, ""] | Int[Array, "*batch"] | None = None,
) -> Coded:
  """Symmetric FSQ in stages, each of what the stages before it left over.

  First x is bounded softly, c tanh(x / c) with c = L / (L - 1). Stage m = 0,
  1, .. divides the rest by s = L^-m, clips it to -1..1, rounds it to the
  nearest of L levels and multiplies back; a code is the sum over stages. After
  M of them the error per channel is at most L^(1 - M) / (L - 1). The gradient
  is that of the soft bound, once.

  Args:
    x: features, one channel per entry of `levels`.
    levels: levels of every channel and stage, at least 2 each, with a product
      below 2^31; a tuple under `jit`.
    num_stages: M, static, with L^(M - 1) at most 2^24, the digits of float32.
    num_active: stages to use, traced, one number or one per vector, for
      training with fewer of them; later ones get index -1. None uses all.

  Returns:
    Codes in the dtype of x, and int32 indices of the stages, [*batch, M].

  Raises:
    ValueError: if the levels are out of range or not one per channel, or the
      stages are too many.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> quantize = lambda x: residual_fsq_quantize(x, (3, 3), num_stages=2)
    >>> coded = jax.jit(quantize)(jnp.array([0.4, -0.9]))
    >>> coded.index.tolist(), [round(float(c), 4) for c in coded.codes]
    ([1, 8], [0.3333, -0.6667])

  Source: Zeghidour et al., 2021, "SoundStream" (residual stages) with FSQ;
  scales and soft bound as in vector-quantize-pytorch, whose gradient is M-fold
  as every stage passes its own.
  """
  _check_levels(levels, "symmetric")
  checks.same_size(x_width=x.shape[-1], levels=len(levels))
  most = 1 + int(24 / math.log2(max(levels)))
  checks.in_range(1, most, num_stages=num_stages)
  bound = _last(np.divide(levels, np.subtract(levels, 1)), x.ndim)
  bounded = jnp.tanh(x.astype(jnp.float32) * (1 / bound)) * bound
  center = _center(levels, "symmetric", x.ndim)

  def stage(rest, power):  # L^m, 1 / s
    power = power.reshape(center.shape)
    position = (jnp.clip(rest * power, -1, 1) + 1) * center
    digit = jnp.floor(position + 0.5)
    rest = rest - _code(digit, center) / power
    return rest, _index(digit.astype(jnp.int32), levels)

  powers = jnp.asarray(_powers(levels, num_stages))
  _, index = jax.lax.scan(stage, jax.lax.stop_gradient(bounded), powers)
  index = jnp.moveaxis(index, 0, -1)  # [*batch, M]
  if num_active is not None:
    active = jnp.broadcast_to(num_active, index.shape[:-1])[..., None]
    number = jnp.arange(num_stages).reshape((1,) * (x.ndim - 1) + (-1,))
    index = jnp.where(number < active, index, -1)
  codes = residual_fsq_decode(index, levels)
  codes = estimators.straight_through(bounded, codes)
  return Coded(codes.astype(x.dtype), index)


def residual_fsq_decode(
  index: Int[Array, "*batch M"], levels: Sequence[int]
) -> Float[Array, "*batch D"]:
  """The codes that the indices of all stages stand for, or of the first few.

  Args:
    index: from `residual_fsq_quantize`, all stages or a prefix; -1 adds
      nothing.
    levels: as there.

  Returns:
    float32 codes.

  Raises:
    ValueError: if the levels are out of range.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> decode = jax.jit(lambda index: residual_fsq_decode(index, (3, 3)))
    >>> [round(float(c), 4) for c in decode(jnp.array([1, 8]))]
    [0.3333, -0.6667]
  """
  _check_levels(levels, "symmetric")
  stages = fsq_decode(index, levels, variant="symmetric")  # [*batch, M, D]
  scales = 1 / _powers(levels, index.shape[-1])
  scales = scales.reshape((1,) * (index.ndim - 1) + scales.shape)
  return jnp.sum(stages * scales, axis=-2)


def _index(digit, levels):  # [..., D] -> [...]
  return jnp.sum(digit * _last(_bases(levels), digit.ndim), axis=-1)


def _digits(index, levels):  # [...] -> [..., D]
  ndim = index.ndim + 1
  bases = _last(_bases(levels), ndim)
  sizes = _last(np.asarray(levels, np.int32), ndim)
  return index.astype(jnp.int32)[..., None] // bases % sizes


def _bases(levels):
  return np.cumprod([1, *levels[:-1]], dtype=np.int64).astype(np.int32)


def _center(levels, variant, ndim):
  """The digit of code 0, and how many digits the code 1 lies above it."""
  exact = np.asarray(levels)
  return _last(exact // 2 if variant == "shifted" else (exact - 1) / 2, ndim)


def _code(digit, center):
  # Times, not over: XLA makes one of the other under `jit` only.
  return (digit - center) * (1 / center)


def _powers(levels, num_stages):  # [M, D], L^m
  exponent = np.arange(num_stages, dtype=np.float64)[:, None]
  return (np.asarray(levels, np.float64) ** exponent).astype(np.float32)


def _last(values, ndim):
  """Constants along the last of `ndim` axes; integers of 32 bits stay so."""
  values = np.asarray(values)
  values = values if values.dtype == np.int32 else values.astype(np.float32)
  return values.reshape((1,) * (ndim - 1) + (-1,))


def _check_levels(levels, variant):
  checks.one_of(("shifted", "symmetric"), variant=variant)
  lowest = 3 if variant == "shifted" else 2
  if not levels or min(levels) < lowest:
    raise ValueError(
      f"levels must be at least {lowest} each for variant {variant!r}, "
      f"got {tuple(levels)}"
    )
  if math.prod(levels) >= 2**31:
    raise ValueError(
      f"levels must have a product below 2^31, got {tuple(levels)}"
    )

"""Quantisation without a table: levels of channels, or their signs.

    config = LookupFreeConfig("fsq", levels=(8, 5, 5, 5), input_dim=256)
    quantizer = LookupFree(config, rngs=nnx.Rngs(0))
    found, _ = quantizer(features, (), train=True, key=key)

Three kinds, called as `VectorQuantizer` is; what they compute is in
`tokjax.ops`. No code can die, so there is no state.

- "fsq": each channel rounded to one of its levels; no loss of its own.
- "lfq": the signs; an entropy loss makes choices sure and codes frequent.
- "bsq": the signs of vectors of length one, with the same loss.

Sources: Mentzer et al., 2023, "Finite Scalar Quantization"; Yu et al., 2024,
"Language Model Beats Diffusion" (LFQ); Zhao, Xiong, Kraehenbuehl, 2024, "Image
and Video Tokenization with Binary Spherical Quantization". Weights of losses
as in lucidrains/vector-quantize-pytorch. Ours: projections have no bias.
"""

import dataclasses
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from tokjax import checks
from tokjax.ops import binary_codes, code_entropy, scalar_codes, similarity
from tokjax.ops.bit_indices import BitOrder
from tokjax.ops.scalar_codes import FSQVariant
from tokjax.tokenizers.measures import masked_mean, usage_stats
from tokjax.tokenizers.types import Quantized
from tokjax.typing import Array, Bool, Float, Int, Key

__all__ = ["LookupFree", "LookupFreeConfig"]

Kind = Literal["fsq", "lfq", "bsq"]
_MOST_COUNTED = 20  # bits of codes that are still counted one by one


@dataclasses.dataclass(unsafe_hash=True)
class LookupFreeConfig:
  """A quantizer of `levels` ("fsq") or `num_bits` ("lfq", "bsq") channels."""

  kind: Kind
  levels: tuple[int, ...] = ()  # of every channel, of "fsq"
  num_bits: int = 0  # channels of "lfq" and "bsq", at most 31
  input_dim: int | None = None  # D; projected to channels and back, if given
  variant: FSQVariant = "shifted"  # how "fsq" bounds a channel
  noise_rate: float = 0.0  # of numbers of "fsq" with noise instead of rounding
  bit_order: BitOrder = "msb"
  soft_clamp: float | None = None  # of "lfq": c tanh(x / c) first
  commitment_weight: float = 0.0  # of "lfq" and "bsq"
  entropy_weight: float = 0.1  # of "lfq" and "bsq"
  entropy_gamma: float = 1.0  # weight of the spread over codes
  entropy_temperature: float | None = None  # None: 0.01 for "lfq", 1 for "bsq"
  entropy_group: int = 9  # bits whose joint spread counts

  def build(self, rngs: nnx.Rngs) -> "LookupFree":
    """The quantizer of these settings."""
    return LookupFree(self, rngs=rngs)


class LookupFree(nnx.Module):
  """Codes that are a grid, and how features are fitted to it.

  Costs a few operations a channel, the projections, and in training with
  entropy 2 N 2^g FLOPs for each group of g bits.

  Attributes:
    config: its settings.
    project_in: [D, channels], or None without `input_dim`.
    project_out: [channels, D], or None.

  Args:
    config: settings.
    rngs: source of the projections.

  Raises:
    ValueError: for settings that contradict each other.

  Example:
    >>> config = LookupFreeConfig("fsq", levels=(8, 5, 5, 5))
    >>> quantizer = LookupFree(config, rngs=nnx.Rngs(0))
    >>> x = jnp.array([[0.3, -1.2, 2.0, 0.0]])
    >>> found, _ = jax.jit(quantizer)(x, ())
    >>> found.indices.tolist(), found.codes.tolist()
    ([565], [[0.25, -1.0, 1.0, 0.0]])
  """

  def __init__(self, config: LookupFreeConfig, *, rngs: nnx.Rngs):
    _check(config)
    self.config = config
    width = _channels(config)

    def matrix(*shape):
      if config.input_dim is None:
        return None
      init = jax.nn.initializers.lecun_normal()
      return nnx.Param(init(rngs.params(), shape))

    self.project_in = matrix(config.input_dim, width)
    self.project_out = matrix(width, config.input_dim)

  @property
  def num_codes(self) -> int:
    """What an index is below."""
    config = self.config
    if config.kind == "fsq":
      return math.prod(config.levels)
    return 2**config.num_bits

  @property
  def bits_per_vector(self) -> float:
    """log2 of the number of codes."""
    return math.log2(self.num_codes)

  def init_state(self, key: Key[Array, ""]) -> tuple[()]:
    """Nothing: `()`."""
    del key
    return ()

  def __call__(
    self,
    x: Float[Array, "*batch D"],
    state: tuple[()] = (),
    mask: Bool[Array, "*batch"] | None = None,
    *,
    train: bool = False,
    key: Key[Array, ""] | None = None,
    axis_name: str | None = None,
  ) -> tuple[Quantized, tuple[()]]:
    """Codes for vectors; the state is `()` before and after.

    Args:
      x: vectors, of width `input_dim` or one number a channel.
      state: `()`.
      mask: True where a vector counts; None means all. The others get index
        -1 and zeros, and do not change losses.
      train: static; False returns codes without gradient to x.
      key: for the noise of "fsq" in training.
      axis_name: mesh axis over which a `shard_map` cuts the batch; losses and
        statistics are those of the whole batch.

    Returns:
      indices [*batch], codes in the dtype of x, losses "commitment" and
      "entropy" as far as they have a weight, statistics up to 2^20 codes; and
      `()`.

    Raises:
      ValueError: if the width is wrong or a key is missing.
    """
    config = self.config
    width = config.input_dim or _channels(config)
    if x.shape[-1] != width:
      raise ValueError(f"x must have width {width}, got shape {x.shape}")
    noisy = train and config.noise_rate > 0
    if noisy and key is None:
      raise ValueError(
        "key must be given to train with these settings, got None"
      )
    if mask is None:
      mask = jnp.ones(x.shape[:-1], bool)
    # Zero, as NaN would spread through the products of gradients.
    y = jnp.where(mask[..., None], x.astype(jnp.float32), 0)
    if self.project_in is not None:
      y = y @ self.project_in[...].astype(jnp.float32)
    coded = self._quantize(y, key if noisy else None)
    index = jnp.where(mask, coded.index, -1)
    z = coded.codes if train else jax.lax.stop_gradient(coded.codes)
    stats = {}
    if self.bits_per_vector <= _MOST_COUNTED:
      stats = usage_stats(index, self.num_codes, axis_name)
    found = Quantized(
      index,
      self._outward(z, mask, x.dtype),
      mask,
      self._losses(y, coded.codes, mask, axis_name),
      stats,
    )
    return found, ()

  def lookup(
    self, indices: Int[Array, "*batch"], state: tuple[()] = ()
  ) -> Float[Array, "*batch D"]:
    """The codes of indices, as `__call__` returns them; zeros for -1."""
    del state
    config = self.config
    if config.kind == "fsq":
      z = scalar_codes.fsq_decode(
        indices, config.levels, variant=config.variant
      )
    else:
      decode = getattr(binary_codes, f"{config.kind}_decode")
      z = decode(
        indices, num_bits=config.num_bits, bit_order=config.bit_order
      )  # fmt: skip
    return self._outward(z, indices >= 0, z.dtype)

  def _quantize(self, y, key):
    config = self.config
    if config.kind == "fsq":
      return scalar_codes.fsq_quantize(
        y,
        config.levels,
        variant=config.variant,
        noise_rate=config.noise_rate,
        key=key,
      )
    if config.kind == "bsq":
      return binary_codes.bsq_quantize(y, bit_order=config.bit_order)
    return binary_codes.lfq_quantize(
      y, bit_order=config.bit_order, soft_clamp=config.soft_clamp
    )

  def _outward(self, z, mask, dtype):
    if self.project_out is not None:
      z = z @ self.project_out[...].astype(jnp.float32)
    return jnp.where(mask[..., None], z, 0).astype(dtype)

  def _losses(self, y, codes, mask, axis_name):
    config, losses = self.config, {}
    if config.kind == "fsq":
      return losses
    temperature, size = config.entropy_temperature, 1.0
    if config.kind == "bsq":
      y, size = similarity.safe_normalize(y), config.num_bits**-0.5
    elif config.soft_clamp is not None:
      y = jnp.tanh(y / config.soft_clamp) * config.soft_clamp
    if temperature is None:
      temperature = 0.01 if config.kind == "lfq" else 1.0
    if config.commitment_weight:
      error = jnp.square(y - jax.lax.stop_gradient(codes))
      loss = masked_mean(jnp.mean(error, axis=-1), mask, axis_name)
      losses["commitment"] = config.commitment_weight * loss
    if config.entropy_weight:
      found = code_entropy.bit_entropy_penalty(
        4 * size / temperature * y,
        mask,
        group_size=config.entropy_group,
        gamma=config.entropy_gamma,
        axis_name=axis_name,
      )
      losses["entropy"] = config.entropy_weight * found.penalty
    return losses


def _channels(config):
  return len(config.levels) if config.kind == "fsq" else config.num_bits


def _check(config):
  checks.one_of(get_args(Kind), kind=config.kind)
  checks.in_range(0, 1, noise_rate=config.noise_rate)
  if config.kind == "fsq":
    if config.num_bits or not config.levels:
      raise ValueError(
        'kind "fsq" takes levels and no num_bits, got levels'
        f" {config.levels} and num_bits {config.num_bits}"
      )
    return
  checks.in_range(1, 31, num_bits=config.num_bits)
  if config.levels or config.noise_rate:
    raise ValueError(
      f"levels and noise_rate are of kind 'fsq', got {config.levels} and"
      f" {config.noise_rate} for {config.kind!r}"
    )
  if config.kind == "bsq" and config.soft_clamp is not None:
    raise ValueError(
      "soft_clamp is of kind 'lfq': \"bsq\" bounds by length, got"
      f" {config.soft_clamp}"
    )
  if config.entropy_temperature is not None and config.entropy_temperature <= 0:
    raise ValueError(
      f"entropy_temperature must be positive, got {config.entropy_temperature}"
    )

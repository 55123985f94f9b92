"""The convolutional encoder and decoder of images that tokenizers share.

    encoder = ConvEncoder(ConvConfig(), rngs=nnx.Rngs(0))
    decoder = ConvDecoder(ConvConfig(), rngs=nnx.Rngs(1))
    z = encoder(images)  # [B, 16, 16, 256] of images [B, 256, 256, 3]
    images = decoder(z)

Each level halves the side: residual blocks, then a convolution of stride 2. The
decoder mirrors that with one more block a level and nearest neighbours before a
convolution. Two flavours of published code differ in details that their weights
depend on, and a decoder may be told of a map at each of its norms.

Sources: Esser, Rombach, Ommer, 2021, "Taming Transformers for High-Resolution
Image Synthesis" ("vqgan", from its code); Chang et al., 2022, "MaskGIT"
("maskgit", from the code of open-muse and 1d-tokenizer); the conditioned norm,
Zheng et al., 2022, "MoVQ: Modulating Quantized Vectors for High-Fidelity Image
Generation". Without dropout, which the published settings leave at 0.
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from tokjax import checks
from tokjax.ops import attention
from tokjax.typing import Array, Float

__all__ = ["SHAPES", "ConvConfig", "ConvDecoder", "ConvEncoder"]

Flavour = Literal["vqgan", "maskgit"]


@dataclasses.dataclass(unsafe_hash=True)
class ConvConfig:
  """An encoder, a decoder, or both: they mirror each other."""

  width: int = 128  # channels of a level with multiplier 1
  multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)  # levels, from the pixels on
  num_res_blocks: int = 2  # of a level; a decoder of "vqgan" has one more
  z_dim: int = 256  # channels of the map between encoder and decoder
  groups: int = 32  # of the norms, divides the channels of every level
  attention: bool = True  # at the lowest resolution; not for "maskgit"
  flavour: Flavour = "vqgan"
  legacy_shortcut: bool = False  # that of MaskGIT's weights, see `ConvEncoder`
  condition_dim: int = 0  # channels of the map at a decoder's norms; 0: none
  image_channels: int = 3

  @property
  def factor(self) -> int:
    """Side of an image over the side of its map."""
    return 2 ** (len(self.multipliers) - 1)


# Published shapes by name.
SHAPES = {
  "vqgan": ConvConfig(),
  "vqgan-enhanced": ConvConfig(width=256, num_res_blocks=4),
  "maskgit": ConvConfig(
    flavour="maskgit", attention=False, legacy_shortcut=True
  ),
}


class ConvEncoder(nnx.Module):
  """Images to a map of vectors.

  Computes in the dtype of its parameters; norms and softmax are float32. A
  residual block is x + conv(silu(norm(conv(silu(norm x))))), where a 1 x 1
  convolution of x takes its place if the channels change. The weights of
  MaskGIT hold another: with `legacy_shortcut` the block is h + W h, h being
  what is added elsewhere, and its input is not added.

  Cost: 18 C^2 FLOPs a pixel and convolution of C channels, so that the first
  levels dominate; attention 4 N^2 C for the N tokens of the map.

  Args:
    config: the shape.
    rngs: seeds the parameters.

  Raises:
    ValueError: for sizes that do not fit.

  Example:
    >>> config = ConvConfig(width=8, multipliers=(1, 1), num_res_blocks=1,
    ...                     z_dim=5, groups=4, attention=False)
    >>> encoder = jax.jit(lambda: ConvEncoder(config, rngs=nnx.Rngs(0)))()
    >>> jax.jit(encoder)(jnp.zeros((1, 8, 6, 3))).shape
    (1, 4, 3, 5)
  """

  def __init__(self, config: ConvConfig, *, rngs: nnx.Rngs):
    _check(config)
    self.config = config
    maskgit = config.flavour == "maskgit"
    widths = [config.width * m for m in config.multipliers]
    inputs, layers = config.width, []
    for level, outputs in enumerate(widths):
      last = level == len(widths) - 1
      for _ in range(config.num_res_blocks):
        layers += _res_block(config, 0, inputs, outputs, last, rngs)
        inputs = outputs
      if not last:
        layers.append(_Halve(config, inputs, rngs))
    self.conv_in = _conv(
      config.image_channels, config.width, rngs, use_bias=not maskgit
    )
    self.layers = nnx.List(layers + _middle(config, 0, inputs, rngs))
    self.norm_out = _Norm(config, 0, inputs, rngs)
    self.conv_out = _conv(inputs, config.z_dim, rngs, size=1 if maskgit else 3)

  def __call__(
    self, images: Float[Array, "B height width channels"]
  ) -> Float[Array, "B height2 width2 z"]:
    """The map of images, one vector for `factor` x `factor` pixels.

    Args:
      images: in -1..1, sides multiples of `config.factor`.

    Returns:
      In the dtype of the parameters.

    Raises:
      ValueError: if a side or the channels do not fit.
    """
    config = self.config
    height, width, channels = images.shape[1:]
    checks.divisible(config.factor, height=height, width=width)
    checks.same_size(channels=channels, image_channels=config.image_channels)
    x = self.conv_in(images.astype(self.conv_in.kernel.dtype))
    for layer in self.layers:
      x = layer(x, None)
    return self.conv_out(jax.nn.silu(self.norm_out(x, None)))


class ConvDecoder(nnx.Module):
  """A map of vectors to images; costs as `ConvEncoder`.

  With `condition_dim` each norm is followed by y * W c + V c, where c is a map
  that the call takes, at the resolution of y by nearest neighbours.

  Attributes:
    conv_out: the last layer, whose kernel adaptive weights look at.

  Args:
    config: the shape.
    rngs: seeds the parameters.

  Raises:
    ValueError: for sizes that do not fit.

  Example:
    >>> config = ConvConfig(width=8, multipliers=(1, 1), num_res_blocks=1,
    ...                     z_dim=5, groups=4, attention=False)
    >>> decoder = jax.jit(lambda: ConvDecoder(config, rngs=nnx.Rngs(0)))()
    >>> jax.jit(decoder)(jnp.zeros((1, 4, 3, 5))).shape
    (1, 8, 6, 3)
  """

  def __init__(self, config: ConvConfig, *, rngs: nnx.Rngs):
    _check(config)
    self.config = config
    condition = config.condition_dim
    widths = [config.width * m for m in config.multipliers]
    inputs = widths[-1]
    self.conv_in = _conv(config.z_dim, inputs, rngs)
    layers = _middle(config, condition, inputs, rngs)
    more = config.flavour == "vqgan"
    for level, outputs in reversed(list(enumerate(widths))):
      last = level == len(widths) - 1
      for _ in range(config.num_res_blocks + more):
        layers += _res_block(config, condition, inputs, outputs, last, rngs)
        inputs = outputs
      if level > 0:
        layers.append(_Double(inputs, rngs))
    self.layers = nnx.List(layers)
    self.norm_out = _Norm(config, condition, inputs, rngs)
    self.conv_out = _conv(inputs, config.image_channels, rngs)

  def __call__(
    self,
    z: Float[Array, "B height width z"],
    condition: Float[Array, "B height width c"] | None = None,
  ) -> Float[Array, "B height2 width2 channels"]:
    """Images of a map.

    Args:
      z: what the encoder made of images.
      condition: map of `condition_dim` channels, as large as z.

    Returns:
      In the dtype of the parameters, in -1..1 as far as it learned that.

    Raises:
      ValueError: if the channels do not fit, or the condition comes unasked
        or is missing.
    """
    config = self.config
    checks.same_size(channels=z.shape[-1], z_dim=config.z_dim)
    if (condition is None) != (config.condition_dim == 0):
      came = None if condition is None else condition.shape
      raise ValueError(
        f"condition must have {config.condition_dim} channels (0: None), got"
        f" {came}"
      )
    dtype = self.conv_in.kernel.dtype
    x = self.conv_in(z.astype(dtype))
    if condition is not None:
      condition = condition.astype(dtype)
    for layer in self.layers:
      x = layer(x, condition)
    return self.conv_out(jax.nn.silu(self.norm_out(x, condition)))


class _ResBlock(nnx.Module):
  """x + conv(silu(norm(conv(silu(norm x)))))."""

  def __init__(self, config, condition, inputs, outputs, rngs):
    bias = config.flavour == "vqgan"
    self.legacy_shortcut = config.legacy_shortcut
    self.norm_in = _Norm(config, condition, inputs, rngs)
    self.conv_in = _conv(inputs, outputs, rngs, use_bias=bias)
    self.norm_mid = _Norm(config, condition, outputs, rngs)
    self.conv_mid = _conv(outputs, outputs, rngs, use_bias=bias)
    source = outputs if config.legacy_shortcut else inputs
    self.shortcut = (
      _conv(source, outputs, rngs, size=1, use_bias=bias)
      if inputs != outputs
      else None
    )

  def __call__(self, x, condition):
    y = self.conv_in(jax.nn.silu(self.norm_in(x, condition)))
    y = self.conv_mid(jax.nn.silu(self.norm_mid(y, condition)))
    if self.shortcut is not None:
      x = self.shortcut(y if self.legacy_shortcut else x)
    return x + y


class _Attention(nnx.Module):
  """Attention of one head among the vectors of a map, and its input."""

  def __init__(self, config, condition, width, rngs):
    self.norm = _Norm(config, condition, width, rngs)
    self.query, self.key, self.value, self.out = (
      nnx.Linear(width, width, rngs=rngs) for _ in range(4)
    )

  def __call__(self, x, condition):
    y = self.norm(x, condition)
    y = y.reshape(len(y), -1, y.shape[-1])  # [B, N, C]
    heads = (f(y)[:, None] for f in (self.query, self.key, self.value))
    mixed = self.out(attention.attend(*heads)[:, 0])
    return x + mixed.reshape(x.shape)


class _Norm(nnx.Module):
  """Group norm in float32, scaled and shifted by a map if there is one."""

  def __init__(self, config, condition, width, rngs):
    self.norm = nnx.GroupNorm(
      width,
      num_groups=config.groups,
      epsilon=1e-6,
      dtype=jnp.float32,
      use_fast_variance=False,
      rngs=rngs,
    )
    self.scale, self.shift = (
      nnx.Linear(condition, width, rngs=rngs) if condition else None
      for _ in range(2)
    )

  def __call__(self, x, condition):
    y = self.norm(x).astype(x.dtype)
    if self.scale is None:
      return y
    times = y.shape[1] // condition.shape[1]
    scale, shift = self.scale(condition), self.shift(condition)
    return y * _repeat(scale, times) + _repeat(shift, times)


class _Halve(nnx.Module):
  """Half the side: a convolution of stride 2, or means of 2 x 2."""

  def __init__(self, config, width, rngs):
    learned = config.flavour == "vqgan"
    settings = {"strides": 2, "padding": "VALID"}
    self.conv = _conv(width, width, rngs, **settings) if learned else None

  def __call__(self, x, condition):
    del condition
    if self.conv is not None:
      return self.conv(jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0))))
    x = (x[:, ::2] + x[:, 1::2]) / 2
    return (x[:, :, ::2] + x[:, :, 1::2]) / 2


class _Double(nnx.Module):
  """Twice the side: nearest neighbours, then a convolution."""

  def __init__(self, width, rngs):
    self.conv = _conv(width, width, rngs)

  def __call__(self, x, condition):
    del condition
    return self.conv(_repeat(x, 2))


def _conv(inputs, outputs, rngs, size=3, **settings):
  return nnx.Conv(inputs, outputs, (size, size), rngs=rngs, **settings)


def _repeat(x, times):
  return x.repeat(times, axis=1).repeat(times, axis=2)


def _res_block(config, condition, inputs, outputs, lowest, rngs):
  """One residual block, with attention at the lowest resolution."""
  layers = [_ResBlock(config, condition, inputs, outputs, rngs)]
  if lowest and config.attention:
    layers.append(_Attention(config, condition, outputs, rngs))
  return layers


def _middle(config, condition, width, rngs):
  """What stands between encoder and decoder, at the lowest resolution."""
  number = 2 if config.flavour == "vqgan" else config.num_res_blocks
  layers = [
    _ResBlock(config, condition, width, width, rngs) for _ in range(number)
  ]
  if config.attention:
    layers.insert(1, _Attention(config, condition, width, rngs))
  return layers


def _check(config):
  checks.one_of(get_args(Flavour), flavour=config.flavour)
  checks.in_range(1, 1 << 20, width=config.width, z_dim=config.z_dim)
  checks.in_range(1, 16, levels=len(config.multipliers))
  checks.in_range(1, 1 << 10, num_res_blocks=config.num_res_blocks)
  checks.in_range(0, 1 << 20, condition_dim=config.condition_dim)
  for multiplier in (1, *config.multipliers):
    checks.divisible(config.groups, channels=config.width * multiplier)
  if config.flavour == "maskgit":
    checks.one_of((False,), attention=config.attention)

"""A discriminator of patches: which parts of an image look real.

    discriminator = Discriminator(DiscriminatorConfig(), rngs=nnx.Rngs(0))
    logits = discriminator(images)  # [B, 30, 30] of 256 x 256 pixels

`tokjax.tokenizers.adversarial` makes losses of the logits.

Source: Isola et al., 2017, "Image-to-Image Translation with Conditional
Adversarial Networks", as in the code of VQGAN (Esser, Rombach, Ommer, 2021),
which normalises over the batch. The default here is a group norm, ours: images
of a batch then cannot influence each other, which the gradient penalty R1
needs, and devices need not talk.
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from tokjax import checks
from tokjax.typing import Array, Float

__all__ = ["Discriminator", "DiscriminatorConfig"]

Norm = Literal["group", "batch"]


@dataclasses.dataclass(unsafe_hash=True)
class DiscriminatorConfig:
  """A stack of convolutions of 4 x 4; each logit sees 70 x 70 pixels."""

  width: int = 64  # channels of the first layer; doubled up to 8 times that
  num_layers: int = 3  # of stride 2
  norm: Norm = "group"  # "batch": statistics of the images of the call
  groups: int = 32  # of "group", divides all channels but the first layer's
  image_channels: int = 3


class Discriminator(nnx.Module):
  """Images to a map of logits, positive for what looks real.

  The first layer has no norm, the last two have stride 1. With norm "batch" the
  statistics are those of all images of the call, over all devices; there are no
  moving ones, as nothing is judged outside of training.

  Cost: 32 C C' FLOPs for an output of a layer of C to C' channels.

  Args:
    config: the shape.
    rngs: seeds the parameters: weights N(0, .02), scales N(1, .02).

  Raises:
    ValueError: for sizes that do not fit.

  Example:
    >>> config = DiscriminatorConfig(width=4, num_layers=2, groups=4)
    >>> model = jax.jit(lambda: Discriminator(config, rngs=nnx.Rngs(0)))()
    >>> jax.jit(model)(jnp.zeros((1, 32, 32, 3))).shape
    (1, 6, 6)
  """

  def __init__(self, config: DiscriminatorConfig, *, rngs: nnx.Rngs):
    _check(config)
    self.config = config
    widths = _widths(config)
    strides = [2] * config.num_layers + [1]
    self.convs = nnx.List(
      _conv(inputs, outputs, stride, rngs, use_bias=not number)
      for number, (inputs, outputs, stride) in enumerate(
        zip([config.image_channels, *widths], widths, strides, strict=False)
      )
    )
    self.scales = nnx.List(
      nnx.Param(1 + 0.02 * jax.random.normal(rngs.params(), (width,)))
      for width in widths[1:]
    )
    self.shifts = nnx.List(nnx.Param(jnp.zeros(width)) for width in widths[1:])
    self.conv_out = _conv(widths[-1], 1, 1, rngs)

  def __call__(
    self,
    images: Float[Array, "B height width channels"],
    *,
    axis_name: str | None = None,
  ) -> Float[Array, "B height2 width2"]:
    """How real each part of each image looks.

    Args:
      images: in -1..1.
      axis_name: mesh axis over which a `shard_map` cuts the batch, for norm
        "batch".

    Returns:
      Logits, float32; the convolutions compute in the dtype of the parameters.

    Raises:
      ValueError: if the images are too small for the layers, or have other
        channels.
    """
    config = self.config
    smallest = 2 ** (config.num_layers + 1) + 2**config.num_layers
    checks.same_size(
      channels=images.shape[-1], image_channels=config.image_channels
    )
    checks.in_range(smallest, 1 << 20, height=images.shape[1])
    checks.in_range(smallest, 1 << 20, width=images.shape[2])
    x = images.astype(self.conv_out.kernel.dtype)
    x = jax.nn.leaky_relu(self.convs[0](x), 0.2)
    layers = zip(list(self.convs)[1:], self.scales, self.shifts, strict=True)
    for conv, scale, shift in layers:
      y = _normalize(conv(x), config, axis_name)
      y = y * _row(scale) + _row(shift)
      x = jax.nn.leaky_relu(y, 0.2).astype(x.dtype)
    return self.conv_out(x)[..., 0].astype(jnp.float32)


def _row(x):
  return x[...].astype(jnp.float32)[None, None, None]


def _widths(config):
  powers = range(config.num_layers + 1)
  return [config.width * min(2**power, 8) for power in powers]


def _conv(inputs, outputs, stride, rngs, **settings):
  return nnx.Conv(
    inputs,
    outputs,
    (4, 4),
    strides=stride,
    padding=((1, 1), (1, 1)),
    kernel_init=nnx.initializers.normal(0.02),
    rngs=rngs,
    **settings,
  )


def _normalize(x, config, axis_name, epsilon=1e-5):
  """Mean 0 and variance 1, in float32, of a group or over the batch."""
  x = x.astype(jnp.float32)
  if config.norm == "batch":

    def mean(x):
      x = jnp.mean(x, axis=(0, 1, 2), keepdims=True)
      return x if axis_name is None else jax.lax.pmean(x, axis_name)

    x = x - jnp.broadcast_to(mean(x), x.shape)
    variance = mean(jnp.square(x))
    return x * jnp.broadcast_to(jax.lax.rsqrt(variance + epsilon), x.shape)
  y = x.reshape(*x.shape[:3], config.groups, -1)
  axes = (1, 2, 4)
  y = y - jnp.mean(y, axis=axes, keepdims=True)
  variance = jnp.mean(jnp.square(y), axis=axes, keepdims=True)
  return (y * jax.lax.rsqrt(variance + epsilon)).reshape(x.shape)


def _check(config):
  checks.one_of(get_args(Norm), norm=config.norm)
  checks.in_range(1, 1 << 20, width=config.width, groups=config.groups)
  checks.in_range(1, 8, num_layers=config.num_layers)
  if config.norm == "group":
    for channels in _widths(config)[1:]:
      checks.divisible(config.groups, channels=channels)

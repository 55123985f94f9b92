"""HieraTok: continuous tokens on several scales, read from coarse to fine.

The map of tokens that a vision transformer makes of an image is pooled into
maps of several sides; each becomes Gaussian latents. The decoder reads all of
them, every scale itself and what is coarser, and the pixels come from the
finest: it has global context in every layer, which detail never touches.

    config = HieraTokConfig(image_size=32, patch_size=4, sides=(1, 2, 4, 8))
    tokenizer = config.build(nnx.Rngs(0))
    latent = tokenizer.encode(images)         # Gaussian, [B, N, C]
    again = tokenizer.decode(latent.mean)

Sources: Chen et al., 2025, "HieraTok: Multi-Scale Visual Tokenizer Improves
Image Reconstruction and Generation": several scales of the encoder's map, and
attention that is causal over scales. There is no published code; ours, as
settings: the sides, pooling before or after the latents, where scale-causal
blocks stand, the positions (those of the finest map, pooled, plus one row a
scale), the weight of the divergence and whether scales or tokens count alike.
With one side it is a plain transformer VAE.
"""

import dataclasses
from typing import ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokjax import checks
from tokjax.ops import attention_masks, patches, resample
from tokjax.tokenizers import gaussian, transformer
from tokjax.tokenizers.gaussian import Gaussian
from tokjax.tokenizers.measures import pixel_loss
from tokjax.tokenizers.transformer import Transformer, TransformerConfig
from tokjax.tokenizers.types import Reconstructed
from tokjax.typing import Array, Float, Key

__all__ = ["HieraTok", "HieraTokConfig"]

Pool = Literal["tokens", "latents"]
Balance = Literal["scale", "token"]


def _base():
  return TransformerConfig(width=768, num_layers=12, num_heads=12)


@dataclasses.dataclass(unsafe_hash=True)
class HieraTokConfig:
  """A multi-scale tokenizer; sizes are ours, as none are published."""

  image_size: int = 256  # pixels a side
  patch_size: int = 16  # pixels a side
  sides: tuple[int, ...] = (1, 2, 4, 8, 16)  # of the maps, the last whole
  latent_dim: int = 32  # C
  encoder: TransformerConfig = dataclasses.field(default_factory=_base)
  decoder: TransformerConfig = dataclasses.field(default_factory=_base)
  num_scale_layers: int = 0  # scale-causal blocks of the encoder, after pooling
  pool: Pool = "tokens"  # "latents": the coarse are means of the finest
  kl_weight: float = 1e-4  # of the mean divergence of a coordinate
  kl_balance: Balance = "scale"  # means of scales, or of all tokens
  pixel_loss: str = "l1"  # or l2, mean over pixels

  def build(self, rngs: nnx.Rngs) -> "HieraTok":
    """The tokenizer with new parameters."""
    return HieraTok(self, rngs=rngs)

  @property
  def num_tokens(self) -> int:
    """N, latents of all scales."""
    return sum(side * side for side in self.sides)


class HieraTok(nnx.Module):
  """Encoder, Gaussian latents of all scales, scale-causal decoder.

  Cost in FLOPs of a forward pass: a transformer over P patches and one over N
  = sum of side^2 tokens, see `Transformer`; sides (1, 2, 4, 8, 16) have 341 for
  256 patches. The mask leaves 80 % of the pairs there, all of which are
  computed.

  Attributes:
    config: its settings.
    reads: images.

  Args:
    config: the shape.
    rngs: seeds the parameters.

  Raises:
    ValueError: for sizes that do not fit.

  Example:
    >>> small = TransformerConfig(width=8, num_layers=1, num_heads=2)
    >>> config = HieraTokConfig(8, 4, (1, 2), 3, small, small)
    >>> tokenizer = jax.jit(lambda: config.build(nnx.Rngs(0)))()
    >>> latent = jax.jit(tokenizer.encode)(jnp.zeros((1, 8, 8, 3)))
    >>> latent.mean.shape, jax.jit(tokenizer.decode)(latent.mean).shape
    ((1, 5, 3), (1, 8, 8, 3))
  """

  reads: ClassVar[tuple[str, ...]] = ("images",)

  def __init__(self, config: HieraTokConfig, *, rngs: nnx.Rngs):
    _check(config)
    self.config = config
    encoder, decoder = config.encoder, config.decoder
    pixels, side = config.patch_size**2 * 3, config.sides[-1]
    self.patches = transformer.linear(encoder, pixels, encoder.width, rngs)
    self.positions = transformer.table(side * side, encoder.width, rngs)
    self.encoder = Transformer(encoder, rngs=rngs)
    later = config.num_scale_layers
    shape = dataclasses.replace(encoder, num_layers=max(later, 1))
    self.encoder_places = (
      _Places(config, encoder.width, rngs) if later else None
    )
    self.scale_blocks = Transformer(shape, rngs=rngs) if later else None
    width = 2 * config.latent_dim
    self.to_latent = transformer.linear(encoder, encoder.width, width, rngs)
    self.from_latent = transformer.linear(
      decoder, config.latent_dim, decoder.width, rngs
    )
    self.decoder_places = _Places(config, decoder.width, rngs)
    self.decoder = Transformer(decoder, rngs=rngs)
    self.pixels = transformer.linear(decoder, decoder.width, pixels, rngs)

  def init_state(self, key: Key[Array, ""]) -> tuple[()]:
    """Nothing: latents are continuous."""
    del key
    return ()

  def __call__(
    self,
    images: Float[Array, "B height width 3"],
    state: tuple[()],
    *,
    train: bool = False,
    key: Key[Array, ""] | None = None,
    axis_name: str | None = None,
  ) -> tuple[Reconstructed, tuple[()]]:
    """Images from sampled latents in training, from their means otherwise.

    Args:
      images: in -1..1.
      state: ().
      train: static.
      key: for the samples, in training.
      axis_name: mesh axis over which a `shard_map` cuts the batch.

    Returns:
      Images with losses "pixels" and "kl", and the statistic "deviation", the
      mean standard deviation of the latents; ().

    Raises:
      ValueError: if a key is missing.
    """
    config = self.config
    if train and key is None:
      raise ValueError("key must be given to sample latents, got None")
    latent = self.encode(images)
    z = gaussian.sample(key, latent) if train else latent.mean
    output = self.decode(z)
    losses = {
      "pixels": pixel_loss(images, output, config.pixel_loss),
      "kl": config.kl_weight * self._divergence(latent),
    }
    stats = {"deviation": jnp.mean(jnp.exp(latent.log_variance / 2))}
    if axis_name is not None:
      losses, stats = jax.lax.pmean((losses, stats), axis_name)
    return Reconstructed(output, losses, stats), state

  def encode(self, images: Float[Array, "B height width 3"]) -> Gaussian:
    """Latents [B, N, C], coarse to fine; [B, P, C] if they are pooled later."""
    config = self.config
    checks.has_sides(config.image_size, images=images)
    x = patches.patchify(images, config.patch_size)
    x = self.patches(x.astype(self.patches.kernel[...].dtype))
    x = self.encoder(x + self.positions[...][None])
    if config.pool == "tokens":
      x = resample.pyramid(x, config.sides)
    if self.scale_blocks is not None:
      mask = attention_masks.scale_causal(config.sides)
      x = self.scale_blocks(x + self.encoder_places()[None], mask=mask)
    return gaussian.from_features(self.to_latent(x))

  def decode(
    self, z: Float[Array, "B N C"]
  ) -> Float[Array, "B height width 3"]:
    """Images in -1..1, not cut to that range, of what `encode` gives."""
    config = self.config
    last = config.sides[-1]
    x = self.decode_tokens(z)[:, -last * last :]
    return patches.unpatchify(self.pixels(x), (last, last), config.patch_size)

  def decode_tokens(self, z: Float[Array, "B N C"]) -> Float[Array, "B N2 D"]:
    """All tokens after the decoder, coarse to fine; `decode` reads the last."""
    config = self.config
    if config.pool == "latents":
      checks.same_size(latents=z.shape[1], places=config.sides[-1] ** 2)
      z = resample.pyramid(z, config.sides)
    checks.same_size(latents=z.shape[1], places=config.num_tokens)
    x = self.from_latent(z.astype(self.from_latent.kernel[...].dtype))
    mask = attention_masks.scale_causal(config.sides)
    return self.decoder(x + self.decoder_places()[None], mask=mask)

  def _divergence(self, latent):
    config = self.config
    if config.kl_balance == "token" or config.pool == "latents":
      return gaussian.kl_divergence(latent)
    ends = np.cumsum(np.square(config.sides))
    parts = zip((0, *ends[:-1]), ends, strict=True)
    each = [
      gaussian.kl_divergence(jax.tree.map(lambda x: x[:, a:b], latent))  # noqa: B023
      for a, b in parts
    ]
    return jnp.mean(jnp.stack(each))


class _Places(nnx.Module):
  """Where each token of the pyramid stands: place in the map, and scale."""

  def __init__(self, config, width, rngs):
    self.sides = config.sides
    self.positions = transformer.table(config.sides[-1] ** 2, width, rngs)
    self.scales = transformer.table(len(config.sides), width, rngs)

  def __call__(self):
    counts = np.square(self.sides)
    scales = jnp.repeat(
      self.scales[...], counts, axis=0, total_repeat_length=int(counts.sum())
    )
    return resample.pyramid(self.positions[...], self.sides) + scales


def _check(config):
  checks.one_of(get_args(Pool), pool=config.pool)
  checks.one_of(get_args(Balance), kl_balance=config.kl_balance)
  checks.one_of(("l1", "l2"), pixel_loss=config.pixel_loss)
  checks.divisible(config.patch_size, image_size=config.image_size)
  checks.in_range(1, 1 << 16, latent_dim=config.latent_dim)
  checks.in_range(0, 1 << 10, num_scale_layers=config.num_scale_layers)
  if list(config.sides) != sorted(set(config.sides)) or config.sides[0] < 1:
    raise ValueError(f"sides must ascend from 1 or more, got {config.sides}")
  checks.same_size(
    last_side=config.sides[-1], patches=config.image_size // config.patch_size
  )
  if config.num_scale_layers and config.pool == "latents":
    raise ValueError(
      'num_scale_layers must be 0 for pool "latents", which has one scale in '
      f"the encoder, got {config.num_scale_layers}"
    )

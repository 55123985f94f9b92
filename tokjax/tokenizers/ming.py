"""MingTok: one continuous row of latents to understand and to generate.

Three stages: a low-level encoder makes few numbers of each patch; a causal
semantic decoder makes of the latents so far what a language model reads, one
after the other; a pixel decoder makes the image of those.

    tokenizer = MingTokConfig().build(nnx.Rngs(0))
    z = tokenizer.encode(images)               # [B, N, 32]
    meaning = tokenizer.semantics(z)           # [B, N, 1024], causal
    again = tokenizer.decode(meaning)

What a language model generates are the latents, token after token: see
`tokjax.tokenizers.flow_head`.

Sources: Huang et al., 2025, "Ming-UniVision: Joint Image Understanding and
Generation with a Unified Continuous Tokenizer", and its code: both shortcuts
without parameters, the class token at the end, the finer grid of the pixel
decoder. Training code is not published: a frozen encoder's features and the
pixels are targets of masked latents; the share that is masked, the weights and
the cosine are ours, as settings.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from tokjax import checks
from tokjax.ops import attention_masks, patches, similarity
from tokjax.tokenizers import transformer
from tokjax.tokenizers.measures import masked_mean, pixel_loss
from tokjax.tokenizers.transformer import Cache, Transformer, TransformerConfig
from tokjax.tokenizers.types import Reconstructed
from tokjax.typing import Array, Bool, Float, Key

__all__ = ["MingTok", "MingTokConfig"]


def _shape(width, layers, heads):
  return TransformerConfig(width, layers, heads, activation="swiglu")


@dataclasses.dataclass(unsafe_hash=True)
class MingTokConfig:
  """The three stages; sizes are the published ones."""

  image_size: int = 512  # pixels a side
  patch_size: int = 32  # pixels a side of a latent
  latent_dim: int = 32  # C, divides the widths of the first two stages
  encoder: TransformerConfig = dataclasses.field(
    default_factory=lambda: _shape(768, 12, 12)
  )
  semantic: TransformerConfig = dataclasses.field(
    default_factory=lambda: _shape(1024, 24, 16)
  )
  pixel: TransformerConfig = dataclasses.field(
    default_factory=lambda: _shape(1024, 24, 16)
  )
  finer: int = 2  # patches a side of the pixel decoder for each latent
  feature_dim: int = 1024  # F, width of the frozen encoder's features
  causal: bool = True  # of the semantic decoder
  mask_rate: float = 0.3  # share of latents hidden in training
  semantic_weight: float = 1.0  # of 1 - cosine to the features
  pixel_weight: float = 1.0  # of the mean absolute error

  def build(self, rngs: nnx.Rngs) -> "MingTok":
    """The tokenizer with new parameters."""
    return MingTok(self, rngs=rngs)

  @property
  def side(self) -> int:
    """Latents a side."""
    return self.image_size // self.patch_size


class MingTok(nnx.Module):
  """Low-level encoder, causal semantic decoder, pixel decoder.

  Cost in FLOPs of a forward pass: transformers over N + 1, N and finer^2 N
  rows, see `Transformer`.

  Attributes:
    config: its settings.
    reads: images, and the features of a frozen encoder on the same grid.

  Args:
    config: the shape.
    rngs: seeds the parameters.

  Raises:
    ValueError: for sizes that do not fit.

  Example:
    >>> small = TransformerConfig(8, 1, 2, activation="swiglu")
    >>> config = MingTokConfig(8, 4, 4, small, small, small, feature_dim=6)
    >>> tokenizer = jax.jit(lambda: config.build(nnx.Rngs(0)))()
    >>> z = jax.jit(tokenizer.encode)(jnp.zeros((1, 8, 8, 3)))
    >>> meaning = jax.jit(tokenizer.semantics)(z)
    >>> z.shape, meaning.shape, jax.jit(tokenizer.decode)(meaning).shape
    ((1, 4, 4), (1, 4, 8), (1, 8, 8, 3))
  """

  reads: ClassVar[tuple[str, ...]] = ("images", "features")

  def __init__(self, config: MingTokConfig, *, rngs: nnx.Rngs):
    _check(config)
    self.config = config
    low, semantic, pixel = config.encoder, config.semantic, config.pixel
    number, dim = config.side**2, config.latent_dim
    inside = config.patch_size**2 * 3
    self.patches = transformer.linear(low, inside, low.width, rngs)
    self.positions = transformer.table(number + 1, low.width, rngs)
    self.class_token = transformer.table(1, low.width, rngs)
    self.encoder = Transformer(low, rngs=rngs)
    self.norm_latent = transformer.layer_norm(low, rngs)
    self.to_latent = transformer.linear(low, low.width, dim, rngs)
    self.from_latent = transformer.linear(semantic, dim, semantic.width, rngs)
    self.hidden_latent = transformer.table(1, semantic.width, rngs)
    self.places = transformer.table(number, semantic.width, rngs)
    self.semantic = Transformer(semantic, rngs=rngs)
    self.to_feature = transformer.linear(
      semantic, semantic.width, config.feature_dim, rngs
    )
    many = config.finer**2
    self.to_pixel = transformer.linear(
      pixel, semantic.width, many * pixel.width, rngs
    )
    self.pixel_positions = transformer.table(number * many, pixel.width, rngs)
    self.pixel = Transformer(pixel, rngs=rngs)
    self.pixels = transformer.linear(pixel, pixel.width, inside // many, rngs)

  def init_state(self, key: Key[Array, ""]) -> tuple[()]:
    """Nothing: latents are continuous."""
    del key
    return ()

  def __call__(
    self,
    images: Float[Array, "B height width 3"],
    features: Float[Array, "B N F"],
    state: tuple[()],
    *,
    train: bool = False,
    key: Key[Array, ""] | None = None,
    axis_name: str | None = None,
  ) -> tuple[Reconstructed, tuple[()]]:
    """Images from latents, in training from some of them only.

    Args:
      images: in -1..1.
      features: what the frozen encoder makes of the same patches.
      state: ().
      train: static; False hides nothing.
      key: for the hidden latents, in training.
      axis_name: mesh axis over which a `shard_map` cuts the batch.

    Returns:
      Images with losses "pixels" and "semantic" and the statistic "cosine";
      ().

    Raises:
      ValueError: if a key is missing, or shapes do not fit.
    """
    config = self.config
    z = self.encode(images)
    shape = (*z.shape[:2], config.feature_dim)
    if features.shape != shape:
      raise ValueError(
        f"features must have shape {shape}, got {features.shape}"
      )
    hidden = None
    if train:
      if key is None:
        raise ValueError("key must be given to hide latents, got None")
      hidden = jax.random.bernoulli(key, config.mask_rate, z.shape[:2])
    meaning = self.semantics(z, hidden)
    output = self.decode(meaning)
    near = similarity.cosine(self.to_feature(meaning), features)
    cosine = masked_mean(near, axis_name=axis_name)
    error = pixel_loss(images, output, "l1", axis_name)
    losses = {
      "pixels": config.pixel_weight * error,
      "semantic": config.semantic_weight * (1 - cosine),
    }
    return Reconstructed(output, losses, {"cosine": cosine}), state

  def encode(
    self, images: Float[Array, "B height width 3"]
  ) -> Float[Array, "B N C"]:
    """Latents in raster order: means of groups of channels, and a head."""
    config = self.config
    checks.has_sides(config.image_size, images=images)
    x = patches.patchify(images, config.patch_size)
    x = self.patches(x.astype(self.patches.kernel[...].dtype))
    last = jnp.zeros_like(x[:, :1]) + self.class_token[...][None]
    x = jnp.concatenate([x, last], axis=1) + self.positions[...][None]
    x = self.encoder(x)[:, :-1]
    groups = x.reshape(*x.shape[:2], config.latent_dim, -1)
    head = jax.nn.gelu(self.norm_latent(x), approximate=False)
    return jnp.mean(groups, axis=-1) + self.to_latent(head.astype(x.dtype))

  def semantics(
    self,
    z: Float[Array, "B N C"],
    hidden: Bool[Array, "B N"] | None = None,
  ) -> Float[Array, "B N D"]:
    """What a language model reads: row i depends on the latents up to i.

    Args:
      z: latents in raster order.
      hidden: True where a latent is not shown; None shows all.
    """
    config = self.config
    checks.same_size(latents=z.shape[1], places=config.side**2)
    x = self._raised(z)
    if hidden is not None:
      x = jnp.where(hidden[..., None], self.hidden_latent[...][None], x)
    mask = attention_masks.causal(z.shape[1]) if config.causal else None
    return self.semantic(x + self.places[...][None], mask=mask)

  def init_cache(self, batch_size: int) -> Cache:
    """For `semantics_step`."""
    return self.semantic.init_cache(batch_size, self.config.side**2)

  def semantics_step(
    self, z: Float[Array, "B 1 C"], cache: Cache
  ) -> tuple[Float[Array, "B 1 D"], Cache]:
    """The row of `semantics` of the next latent."""
    place = jax.lax.dynamic_index_in_dim(self.places[...], cache.length)
    return self.semantic.step(self._raised(z) + place[None], cache)

  def decode(
    self, meaning: Float[Array, "B N D"]
  ) -> Float[Array, "B height width 3"]:
    """Images in -1..1, not cut to that range, of what `semantics` gives."""
    config = self.config
    side, finer = config.side, config.finer
    x = self.to_pixel(meaning)
    x = patches.unpatchify(x, (side, side), finer)  # [B, finer grid, D]
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    x = self.pixel(x + self.pixel_positions[...][None])
    grid = (side * finer, side * finer)
    return patches.unpatchify(self.pixels(x), grid, config.patch_size // finer)

  def _raised(self, z):
    """Each channel repeated, and a linear layer."""
    z = z.astype(self.from_latent.kernel[...].dtype)
    wide = self.config.semantic.width // self.config.latent_dim
    return self.from_latent(z) + jnp.repeat(z, wide, axis=-1)


def _check(config):
  checks.divisible(config.patch_size, image_size=config.image_size)
  checks.in_range(1, config.patch_size, finer=config.finer)
  checks.divisible(config.finer, patch_size=config.patch_size)
  checks.in_range(1, 1 << 16, latent_dim=config.latent_dim)
  checks.divisible(config.latent_dim, encoder_width=config.encoder.width)
  checks.divisible(config.latent_dim, semantic_width=config.semantic.width)
  checks.in_range(0, 1, mask_rate=config.mask_rate)

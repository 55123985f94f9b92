"""TiTok: an image as a short row of tokens without places.

Learned queries stand beside the patches of an image in a transformer; what
comes out at the queries are the tokens, quantised. A second transformer reads
them beside as many copies of a mask token as there are patches, from which the
pixels are read.

    config = TiTokConfig(image_size=32, patch_size=4, num_tokens=64, ...)
    tokenizer = config.build(nnx.Rngs(0))
    state = tokenizer.init_state(key)
    found = tokenizer.encode(images, state)       # indices [B, K]
    again = tokenizer.decode(found.indices, state)

Sources: Yu et al., 2024, "An Image is Worth 32 Tokens for Reconstruction and
Generation". The layout of both sequences, the tables and their scale, norms
and codes of length one are those of the published code, without its slip of
reshaping tokens into channels. Pixels are read in one stage by a linear layer,
as its successor TA-TiTok reads them in one stage; the first TiTok predicts
codes of a frozen tokenizer before: `two_stage`.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx

from tokjax import checks
from tokjax.ops import patches
from tokjax.tokenizers import transformer
from tokjax.tokenizers.codebook import CodebookConfig, CodebookState
from tokjax.tokenizers.measures import pixel_loss
from tokjax.tokenizers.transformer import TransformerConfig
from tokjax.tokenizers.types import Quantized, Reconstructed
from tokjax.tokenizers.vector_quantizer import VectorQuantizer, VQConfig
from tokjax.typing import Array, Float, Int, Key

__all__ = ["SIZES", "TiTok", "TiTokConfig"]

SIZES = {  # published trunks
  "small": TransformerConfig(width=512, num_layers=8, num_heads=8),
  "base": TransformerConfig(width=768, num_layers=12, num_heads=12),
  "large": TransformerConfig(width=1024, num_layers=24, num_heads=16),
}


def _codes():
  book = CodebookConfig(num_codes=4096, dim=12, metric="cosine")
  return VQConfig(book)


@dataclasses.dataclass(unsafe_hash=True)
class TiTokConfig:
  """A one-dimensional tokenizer; defaults are the published B-128."""

  image_size: int = 256  # pixels a side
  patch_size: int = 16  # pixels a side, of both transformers
  num_tokens: int = 128  # K
  encoder: TransformerConfig = dataclasses.field(
    default_factory=lambda: SIZES["base"]
  )
  decoder: TransformerConfig = dataclasses.field(
    default_factory=lambda: SIZES["base"]
  )
  quantizer: VQConfig = dataclasses.field(default_factory=_codes)
  pixel_loss: str = "l2"  # or l1, mean over pixels

  def build(self, rngs: nnx.Rngs) -> "TiTok":
    """The tokenizer with new parameters."""
    return TiTok(self, rngs=rngs)

  @property
  def num_patches(self) -> int:
    """P, patches of an image."""
    return (self.image_size // self.patch_size) ** 2


class TiTok(nnx.Module):
  """Encoder, quantizer and decoder.

  Cost in FLOPs of a forward pass: two transformers over 1 + P + K rows, see
  `Transformer`, and 2 K V d for the codes.

  Attributes:
    config: its settings.
    reads: images.

  Args:
    config: the shape.
    rngs: seeds the parameters.

  Raises:
    ValueError: for sizes that do not fit.

  Example:
    >>> import jax
    >>> small = TransformerConfig(width=8, num_layers=1, num_heads=2)
    >>> book = CodebookConfig(num_codes=16, dim=4, metric="cosine")
    >>> config = TiTokConfig(8, 4, 3, small, small, VQConfig(book))
    >>> tokenizer = jax.jit(lambda: config.build(nnx.Rngs(0)))()
    >>> state = tokenizer.init_state(jax.random.key(0))
    >>> images = jnp.zeros((2, 8, 8, 3))
    >>> found = jax.jit(tokenizer.encode)(images, state)
    >>> jax.jit(tokenizer.decode)(found.indices, state).shape
    (2, 8, 8, 3)
  """

  reads: ClassVar[tuple[str, ...]] = ("images",)

  def __init__(self, config: TiTokConfig, *, rngs: nnx.Rngs):
    _check(config)
    self.config = config
    pixels = config.patch_size**2 * 3
    dim = config.quantizer.codebook.dim
    encoder, decoder = config.encoder, config.decoder
    self.patches = transformer.linear(encoder, pixels, encoder.width, rngs)
    self.encoder = _Trunk(config, encoder, encoder.width, rngs)
    # The queries; that of token i is at place i of the order of tokens.
    self.queries = transformer.table(config.num_tokens, encoder.width, rngs)
    self.to_code = transformer.linear(encoder, encoder.width, dim, rngs)
    self.quantizer = VectorQuantizer(config.quantizer, rngs=rngs)
    self.from_code = transformer.linear(decoder, dim, decoder.width, rngs)
    self.mask_token = transformer.table(1, decoder.width, rngs)
    self.decoder = _Trunk(config, decoder, decoder.width, rngs)
    self.pixels = transformer.linear(decoder, decoder.width, pixels, rngs)

  def init_state(self, key: Key[Array, ""]) -> CodebookState:
    """The codebook's state before the first step."""
    return self.quantizer.init_state(key)

  def __call__(
    self,
    images: Float[Array, "B height width 3"],
    state: CodebookState,
    *,
    train: bool = False,
    key: Key[Array, ""] | None = None,
    axis_name: str | None = None,
  ) -> tuple[Reconstructed, CodebookState]:
    """Images from all their tokens, with the losses; see `types`.

    Args:
      images: in -1..1.
      state: of the codebook.
      train: static; False leaves the state as it is.
      key: for what is random in the quantizer.
      axis_name: mesh axis over which a `shard_map` cuts the batch.

    Returns:
      Images with losses "pixels" and those of the quantizer; the state.
    """
    found, state = self.quantizer(
      self.vectors(images), state, train=train, key=key, axis_name=axis_name
    )
    output = self.decode_codes(found.codes)
    return self.judge(images, output, found, axis_name), state

  def encode(
    self, images: Float[Array, "B height width 3"], state: CodebookState
  ) -> Quantized:
    """The tokens of images, indices [B, K]."""
    return self.quantizer(self.vectors(images), state)[0]

  def decode(
    self,
    indices: Int[Array, "B k"],
    state: CodebookState,
    length: Int[Array, "..."] | int | None = None,
  ) -> Float[Array, "B height width 3"]:
    """Images of the first tokens.

    Args:
      indices: codes of the first k <= K tokens.
      state: of the codebook.
      length: how many of them count, of each image or of all; may be traced.
        The result is that of `indices[:, :length]`. None: all.

    Returns:
      Images in -1..1, not cut to that range.
    """
    return self.decode_codes(self.quantizer.lookup(indices, state), length)

  def vectors(
    self, images: Float[Array, "B height width 3"]
  ) -> Float[Array, "B K d"]:
    """The tokens before they are quantised."""
    config = self.config
    checks.has_sides(config.image_size, images=images)
    x = patches.patchify(images, config.patch_size)
    x = self.patches(x.astype(self.patches.kernel[...].dtype))
    queries = jnp.zeros_like(x[:, :1]) + self.queries[...][None]
    return self.to_code(self.encoder(x, queries)[:, 1 + config.num_patches :])

  def decode_codes(
    self,
    codes: Float[Array, "B k d"],
    length: Int[Array, "..."] | int | None = None,
  ) -> Float[Array, "B height width 3"]:
    """Images of code vectors; see `decode`."""
    size = self.config.patch_size
    side = self.config.image_size // size
    x = self.pixels(self.rows(codes, length))
    return patches.unpatchify(x, (side, side), size)

  def rows(
    self,
    codes: Float[Array, "B k d"],
    length: Int[Array, "..."] | int | None = None,
  ) -> Float[Array, "B P D"]:
    """What the decoder has at the patches, before pixels; see `decode`."""
    config = self.config
    checks.in_range(1, config.num_tokens, num_codes=codes.shape[1])
    x = self.from_code(codes.astype(self.from_code.kernel[...].dtype))
    blank = jnp.zeros_like(x[:, :1]) + self.mask_token[...][None]
    blank = jnp.repeat(blank, config.num_patches, axis=1)
    mask = None if length is None else self._readable(length, x.shape[1])
    return self.decoder(blank, x, mask)[:, 1 : 1 + config.num_patches]

  def judge(
    self,
    images: Float[Array, "B height width 3"],
    output: Float[Array, "B height width 3"],
    found: Quantized,
    axis_name: str | None = None,
  ) -> Reconstructed:
    """Joins the loss of pixels to those of the quantizer."""
    kind = self.config.pixel_loss
    loss = pixel_loss(images, output, kind, axis_name)
    return Reconstructed(output, {"pixels": loss, **found.losses}, found.stats)

  def _readable(self, length, num_tokens):
    """[1 or B, N, N]: all but the tokens from `length` on may be read."""
    first = 1 + self.config.num_patches
    length = jnp.atleast_1d(jnp.asarray(length))
    place = jnp.arange(first + num_tokens)
    mask = place[None] < first + length[:, None]
    shape = (len(length), first + num_tokens, first + num_tokens)
    return jnp.broadcast_to(mask[:, None], shape)


class _Trunk(nnx.Module):
  """[class token, patches, tokens] with their places, through the blocks."""

  def __init__(self, config, shape, width, rngs):
    self.class_token = transformer.table(1, width, rngs)
    self.positions = transformer.table(1 + config.num_patches, width, rngs)
    self.token_positions = transformer.table(config.num_tokens, width, rngs)
    self.norm_input = transformer.layer_norm(shape, rngs)
    self.blocks = transformer.Transformer(shape, rngs=rngs)

  def __call__(self, x, tokens, mask=None):
    first = jnp.zeros_like(x[:, :1]) + self.class_token[...][None]
    x = jnp.concatenate([first, x], axis=1) + self.positions[...][None]
    places = self.token_positions[: tokens.shape[1]]
    x = jnp.concatenate([x, tokens + places[None]], axis=1)
    return self.blocks(self.norm_input(x).astype(x.dtype), mask=mask)


def _check(config):
  checks.divisible(config.patch_size, image_size=config.image_size)
  checks.in_range(1, 1 << 16, num_tokens=config.num_tokens)
  checks.one_of(("l1", "l2"), pixel_loss=config.pixel_loss)

"""TokenFlow: one index for what a part of an image means and how it looks.

Two codebooks share their indices. A semantic branch reads features of a vision
encoder, a pixel branch the image; the code of a place is the one whose semantic
and pixel vectors together are nearest. Understanding reads the former,
generation the latter, and a language model one vocabulary.

    config = SIZES["siglip-so400m-384"]
    tokenizer = config.build(nnx.Rngs(0))
    state = tokenizer.init_state(key)
    found = tokenizer.encode(images, features, state)  # indices [B, 2227]
    codes = tokenizer.lookup(found.indices, state)     # [B, 27, 27, 40]
    images, features = tokenizer.decode(codes)

Codes are found over scales, coarse to fine, each for what the ones before left;
those of both parts have length one at every scale.

Sources: Qu et al., 2024, "TokenFlow: Unified Image Tokenizer for Multimodal
Understanding and Generation"; shapes, losses and weights are those of its code
(ByteFlow-AI/TokenFlow). Ours: the encoder stays outside (to train it, as
published, let its features keep their gradient: targets take none), and the
semantic decoder has no class token. The quantizer is in `dual_quantizer`.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from tokjax import checks
from tokjax.ops import resample, similarity
from tokjax.tokenizers import transformer
from tokjax.tokenizers.conv import SHAPES, ConvConfig, ConvDecoder, ConvEncoder
from tokjax.tokenizers.dual_quantizer import (
  DualConfig,
  DualQuantizer,
  DualState,
)
from tokjax.tokenizers.measures import masked_mean, pixel_loss
from tokjax.tokenizers.transformer import Transformer, TransformerConfig
from tokjax.tokenizers.types import Quantized, Reconstructed
from tokjax.typing import Array, Float, Int, Key

__all__ = ["SIZES", "TokenFlow", "TokenFlowConfig"]


@dataclasses.dataclass(unsafe_hash=True)
class TokenFlowConfig:
  """A TokenFlow tokenizer; defaults are those published at 256 pixels."""

  image_size: int = 256  # pixels a side; resized to what the grid asks for
  features_dim: int = 1152  # C, of the encoder's patches
  target_dim: int | None = None  # of what is restored; None: the features
  quantizer: DualConfig = dataclasses.field(default_factory=DualConfig)
  table_side: int | None = None  # of learned positions; None: the grid's
  encoder: ConvConfig = dataclasses.field(
    default_factory=lambda: SHAPES["vqgan"]
  )
  decoder: ConvConfig = dataclasses.field(
    default_factory=lambda: SHAPES["vqgan"]
  )
  semantic_decoder: TransformerConfig = dataclasses.field(
    default_factory=lambda: TransformerConfig(1152, 3, 12, norm_epsilon=1e-6)
  )
  pixel_weight: float = 1.0  # of the mean square error of pixels
  semantic_weight: float = 1.0  # of 1 - cosine to the features

  def build(self, rngs: nnx.Rngs) -> "TokenFlow":
    """The tokenizer with new parameters."""
    return TokenFlow(self, rngs=rngs)

  @property
  def grid(self) -> int:
    """g, side of the map of features and of the finest codes."""
    return self.quantizer.sides[-1]


_CLIP = TokenFlowConfig(
  image_size=224,
  features_dim=768,
  target_dim=512,
  quantizer=DualConfig(sides=(1, 2, 4, 6, 8, 10, 12, 14)),
  semantic_decoder=TransformerConfig(768, 3, 12, norm_epsilon=1e-6),
)
# Published shapes by the encoder whose features they read.
SIZES = {
  "clip-base-224": _CLIP,
  # The same weights at a higher resolution, with positions in between.
  "clip-base-256": dataclasses.replace(
    _CLIP,
    image_size=256,
    quantizer=DualConfig(sides=(1, 2, 4, 6, 8, 10, 12, 14, 16)),
    table_side=14,
  ),
  "vitamin-xlarge-256": TokenFlowConfig(),
  "siglip-so400m-384": TokenFlowConfig(
    image_size=384,  # the pixel branch sees 27 * 16 = 432
    quantizer=DualConfig(
      sides=(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 17, 22, 27),
    ),
  ),
}


class TokenFlow(nnx.Module):
  """Two branches, their common codes, and two decoders.

  Cost in FLOPs of a forward pass: encoder and decoder of pixels, see `conv`;
  the semantic decoder, see `Transformer`; 2 T K (d + d2) for the codes.

  Attributes:
    config: its settings.
    reads: images and features [B, N, C] of a vision encoder, N places of the
      last grid, row by row.

  Args:
    config: the shape.
    rngs: seeds the parameters.

  Raises:
    ValueError: for settings that contradict each other.

  Example:
    >>> conv = ConvConfig(4, (1, 1), num_res_blocks=1, z_dim=4, groups=2,
    ...                   attention=False)
    >>> from tokjax.tokenizers.codebook import CodebookConfig
    >>> book = CodebookConfig(16, 3, metric="cosine")
    >>> config = TokenFlowConfig(
    ...   8, 6, quantizer=DualConfig(book, book, sides=(1, 2, 4)),
    ...   encoder=conv, decoder=conv,
    ...   semantic_decoder=TransformerConfig(8, 1, 2))
    >>> tokenizer = jax.jit(lambda: config.build(nnx.Rngs(0)))()
    >>> state = tokenizer.init_state(jax.random.key(0))
    >>> inputs = jnp.ones((2, 8, 8, 3)), jnp.ones((2, 16, 6))
    >>> found = jax.jit(tokenizer.encode)(*inputs, state)
    >>> found.indices.shape, found.codes.shape
    ((2, 21), (2, 4, 4, 6))
  """

  reads: ClassVar[tuple[str, ...]] = ("images", "features")

  def __init__(self, config: TokenFlowConfig, *, rngs: nnx.Rngs):
    _check(config)
    self.config = config
    of_decoder = config.semantic_decoder
    width = of_decoder.width
    side = config.table_side or config.grid
    dims = config.quantizer.dims
    self.quantizer = DualQuantizer(config.quantizer, rngs=rngs)

    def task(inputs, hidden, outputs):
      shapes = (inputs, hidden), (hidden, outputs)
      return nnx.List(
        transformer.linear(of_decoder, *shape, rngs) for shape in shapes
      )

    # The layers between features and codes: linear, tanh, linear.
    features = config.features_dim
    self.task_in = task(features, features, dims[0])
    self.semantic_in = transformer.linear(of_decoder, dims[0], width, rngs)
    self.positions = transformer.table(side * side, width, rngs)
    self.semantic_decoder = Transformer(of_decoder, rngs=rngs)
    self.task_out = task(width, width, config.target_dim or features)
    self.encoder = ConvEncoder(config.encoder, rngs=rngs)
    self.pixel_in = nnx.Linear(config.encoder.z_dim, dims[1], rngs=rngs)
    self.pixel_out = nnx.Linear(dims[1], config.decoder.z_dim, rngs=rngs)
    self.decoder = ConvDecoder(config.decoder, rngs=rngs)

  def init_state(self, key: Key[Array, ""]) -> DualState:
    """The codebooks' state before the first step."""
    return self.quantizer.init_state(key)

  def __call__(
    self,
    images: Float[Array, "B height width 3"],
    features: Float[Array, "B N C"],
    state: DualState,
    *,
    target: Float[Array, "B N C2"] | None = None,
    train: bool = False,
    key: Key[Array, ""] | None = None,
    axis_name: str | None = None,
  ) -> tuple[Reconstructed, DualState]:
    """Images from their codes, with the losses; in training the next state.

    Args:
      images: in -1..1.
      features: of the encoder; they get a gradient through the codes.
      state: of the codebooks.
      target: what the semantic decoder shall restore, without a gradient;
        None: the features.
      train: static; False leaves the state as it is and drops no scale.
      key: for the dropped scale and resets in training.
      axis_name: mesh axis over which a `shard_map` cuts the batch.

    Returns:
      Images with losses "pixels", "semantic", "commitment" and "codebook";
      the state.

    Raises:
      ValueError: if a size is wrong or a key is missing.
    """
    config = self.config
    target = features if target is None else target
    checks.same_size(
      width_of_target=target.shape[-1],
      target_dim=config.target_dim or config.features_dim,
    )
    found, state = self.quantizer(
      *self.branches(images, features), state, train=train, key=key,
      axis_name=axis_name,
    )  # fmt: skip
    output, restored = self.decode(found.codes)
    error = pixel_loss(images, output, "l2", axis_name)
    target = jax.lax.stop_gradient(target)
    cosine = similarity.cosine(target, restored)
    cosine = masked_mean(cosine, axis_name=axis_name)
    losses = {
      "pixels": config.pixel_weight * error,
      "semantic": config.semantic_weight * (1 - cosine),
      **found.losses,
    }
    return Reconstructed(output, losses, found.stats), state

  def encode(
    self,
    images: Float[Array, "B height width 3"],
    features: Float[Array, "B N C"],
    state: DualState,
  ) -> Quantized:
    """The codes of images, see `DualQuantizer`.

    A language model reads `codes` [B, g, g, d + d2], the sum over scales, to
    understand an image. To draw one it predicts `indices` [B, T] scale after
    scale and reads the quantizer's `next_inputs`.
    """
    return self.quantizer(*self.branches(images, features), state)[0]

  def branches(
    self,
    images: Float[Array, "B height width 3"],
    features: Float[Array, "B N C"],
  ) -> tuple[Float[Array, "B g g d"], Float[Array, "B g g d2"]]:
    """The semantic and the pixel map before they are quantised."""
    config = self.config
    side = config.grid
    checks.has_sides(config.image_size, images=images)
    checks.same_size(tokens_of_features=features.shape[1], grid=side * side)
    checks.same_size(
      width_of_features=features.shape[2], features_dim=config.features_dim
    )
    x = features.astype(self.task_in[0].kernel.dtype)
    semantic = self.task_in[1](jnp.tanh(self.task_in[0](x)))
    semantic = semantic.reshape(len(x), side, side, -1)
    x = _resized(images, side * config.encoder.factor)
    return semantic, self.pixel_in(self.encoder(x))

  def lookup(
    self, indices: Int[Array, "B T"], state: DualState
  ) -> Float[Array, "B g g d"]:
    """The sum of the codes of all scales; an index of -1 adds nothing."""
    return self.quantizer.lookup(indices, state)

  def decode(
    self, codes: Float[Array, "B g g d"]
  ) -> tuple[Float[Array, "B height width 3"], Float[Array, "B N C2"]]:
    """Images and features of codes; each reads its own part of them.

    Args:
      codes: of `encode` or `lookup`.
    """
    config = self.config
    checks.same_size(
      width_of_codes=codes.shape[-1],
      both_dims=sum(config.quantizer.dims),
    )
    semantic = codes[..., : config.quantizer.dims[0]]
    pixel = codes[..., config.quantizer.dims[0] :]
    x = semantic.reshape(len(codes), -1, semantic.shape[-1])  # [B, N, d]
    x = self.semantic_in(x.astype(self.semantic_in.kernel.dtype))
    x = self.semantic_decoder(x + self._positions().astype(x.dtype)[None])
    restored = self.task_out[1](jnp.tanh(self.task_out[0](x)))
    pixel = pixel.astype(self.pixel_out.kernel.dtype)
    images = self.decoder(self.pixel_out(pixel))
    return _resized(images, config.image_size), restored

  def _positions(self):
    """[N, D]: the table, on another grid by interpolation."""
    last = self.config.grid
    side = self.config.table_side or last
    table = self.positions[...].reshape(side, side, -1)
    matrix = resample.cubic_matrix(side, last)
    return resample.resample(table, matrix, matrix).reshape(last * last, -1)


def _resized(images, side):
  """Square images of another side, by cubic interpolation."""
  if images.shape[1] == side:
    return images
  matrix = resample.cubic_matrix(images.shape[1], side)
  return resample.resample(images, matrix, matrix)


def _check(config):
  checks.in_range(1, 1 << 16, image_size=config.image_size)
  checks.same_size(
    encoder_factor=config.encoder.factor, decoder_factor=config.decoder.factor
  )

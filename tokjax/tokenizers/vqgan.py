"""VQGAN: convolutions around one table of codes, a map of them for an image.

    config = SHAPES["maskgit"]
    tokenizer = config.build(nnx.Rngs(0))
    state = tokenizer.init_state(key)
    found = tokenizer.encode(images, state)  # indices [B, 16, 16] at 256 pixels
    again = tokenizer.decode(found.indices, state)

Many systems start from its frozen codes: the first stage of `two_stage`, and
most generators. The discriminator and the perceptual loss that its name and its
sharpness come from are settings of the run, see `tokjax.train.tokenizer_run`.

Sources: Esser, Rombach, Ommer, 2021, "Taming Transformers for High-Resolution
Image Synthesis"; Chang et al., 2022, "MaskGIT: Masked Generative Image
Transformer", whose encoder ends at the width of its codes. Ours: matrices
without biases between the trunk and the codes, where widths differ.
"""

import dataclasses
from typing import ClassVar, Literal, get_args

from flax import nnx

from tokjax import checks
from tokjax.tokenizers import conv
from tokjax.tokenizers.codebook import CodebookConfig, CodebookState
from tokjax.tokenizers.conv import ConvConfig, ConvDecoder, ConvEncoder
from tokjax.tokenizers.measures import pixel_loss
from tokjax.tokenizers.types import Quantized, Reconstructed
from tokjax.tokenizers.vector_quantizer import VectorQuantizer, VQConfig
from tokjax.typing import Array, Float, Int, Key

__all__ = ["SHAPES", "Vqgan", "VqganConfig"]

PixelLoss = Literal["l1", "l2"]


@dataclasses.dataclass(unsafe_hash=True)
class VqganConfig:
  """Trunk and codes; defaults are the published ones of factor 16."""

  trunk: ConvConfig = dataclasses.field(default_factory=ConvConfig)
  quantizer: VQConfig = dataclasses.field(
    default_factory=lambda: VQConfig(CodebookConfig(16384, 256), input_dim=256)
  )
  pixel_loss: PixelLoss = "l1"  # mean over pixels

  def build(self, rngs: nnx.Rngs) -> "Vqgan":
    """The tokenizer with new parameters."""
    return Vqgan(self, rngs=rngs)


# Published shapes by name.
SHAPES = {
  "vqgan": VqganConfig(),
  "maskgit": VqganConfig(
    conv.SHAPES["maskgit"], VQConfig(CodebookConfig(1024, 256))
  ),
}


class Vqgan(nnx.Module):
  """Encoder, quantizer and decoder.

  Cost in FLOPs of a forward pass: both trunks, see `conv`, and 2 N K d for the
  codes of the N places of the map.

  Attributes:
    config: its settings.
    reads: images, of any sides that the factor of the trunk divides.

  Args:
    config: the shape.
    rngs: seeds the parameters.

  Raises:
    ValueError: for sizes that do not fit.

  Example:
    >>> import jax
    >>> trunk = ConvConfig(width=4, multipliers=(1, 1), num_res_blocks=1,
    ...                    z_dim=6, groups=2, attention=False)
    >>> config = VqganConfig(trunk, VQConfig(CodebookConfig(16, 2), 6))
    >>> tokenizer = jax.jit(lambda: config.build(nnx.Rngs(0)))()
    >>> state = tokenizer.init_state(jax.random.key(0))
    >>> images = jax.numpy.zeros((2, 8, 6, 3))
    >>> found = jax.jit(tokenizer.encode)(images, state)
    >>> found.indices.shape
    (2, 4, 3)
    >>> jax.jit(tokenizer.decode)(found.indices, state).shape
    (2, 8, 6, 3)
  """

  reads: ClassVar[tuple[str, ...]] = ("images",)

  def __init__(self, config: VqganConfig, *, rngs: nnx.Rngs):
    checks.one_of(get_args(PixelLoss), pixel_loss=config.pixel_loss)
    quantizer = config.quantizer
    width = quantizer.input_dim or quantizer.num_heads * quantizer.codebook.dim
    checks.same_size(z_dim=config.trunk.z_dim, quantizer_width=width)
    self.config = config
    self.encoder = ConvEncoder(config.trunk, rngs=rngs)
    self.quantizer = VectorQuantizer(quantizer, rngs=rngs)
    self.decoder = ConvDecoder(config.trunk, rngs=rngs)

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
    """Images from their codes, with the losses; see `types`.

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
      self.encoder(images), state, train=train, key=key, axis_name=axis_name
    )
    output = self.decoder(found.codes)
    kind = self.config.pixel_loss
    pixels = pixel_loss(images, output, kind, axis_name)
    losses = {"pixels": pixels, **found.losses}
    return Reconstructed(output, losses, found.stats), state

  def encode(
    self, images: Float[Array, "B height width 3"], state: CodebookState
  ) -> Quantized:
    """The codes of images, indices [B, h, w]."""
    return self.quantizer(self.encoder(images), state)[0]

  def decode(
    self, indices: Int[Array, "B h w"], state: CodebookState
  ) -> Float[Array, "B height width 3"]:
    """Images of codes, not cut to -1..1."""
    return self.decoder(self.quantizer.lookup(indices, state))

"""ILLUME+: codes of what an encoder sees and codes of pixels, side by side.

The branch of features is that of `illume`; a branch of pixels has a codebook of
its own. The decoder of images reads both maps and is told of them at every norm
(DualViTok). Both rows of codes have their own ids in one vocabulary: `to_ids`,
`from_ids`.

    config = DualViTokConfig()
    tokenizer = config.build(nnx.Rngs(0))
    state = tokenizer.init_state(key)
    semantic, pixel = tokenizer.encode(images, features, state)
    images = tokenizer.decode(semantic.indices, pixel.indices, state)

Sources: Huang et al., 2025, "ILLUME+: Illuminating Unified MLLM with Dual
Visual Tokenization and Diffusion Refinement", and its code (ILLUME_plus):
trunks of four blocks, normalised targets, "simvq" of 32768 and 98304 codes of
width 32, the decoder of MoVQ of width 384, losses and rates. Ours: the width of
the trunks and the 256 features of an image; the pixel encoder is that of VQGAN;
the noise moves the codes of an image to other places of it, so that no image
sees another, and passes no gradient.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from tokjax import checks
from tokjax.ops import resample
from tokjax.tokenizers import language_ids
from tokjax.tokenizers.codebook import CodebookConfig, CodebookState
from tokjax.tokenizers.conv import ConvConfig, ConvDecoder, ConvEncoder
from tokjax.tokenizers.illume import Illume, IllumeConfig
from tokjax.tokenizers.measures import pixel_loss
from tokjax.tokenizers.transformer import TransformerConfig
from tokjax.tokenizers.types import Quantized, Reconstructed
from tokjax.tokenizers.vector_quantizer import VectorQuantizer, VQConfig
from tokjax.typing import Array, Float, Int, Key

__all__ = [
  "DualViTok",
  "DualViTokConfig",
  "DualViTokState",
  "from_ids",
  "to_ids",
]


def _simvq(num_codes):
  return VQConfig(CodebookConfig(num_codes, 32, learning="simvq"))


def _qwen():
  """What ILLUME+ reads: 256 tokens of width 3584, of 448 pixels."""
  trunk = TransformerConfig(1280, 4, 16)
  return IllumeConfig(3584, 256, trunk, _simvq(32768), normalize_target=True)


@dataclasses.dataclass(unsafe_hash=True)
class DualViTokConfig:
  """Two branches; the defaults are those of ILLUME+, see above."""

  image_size: int = 256  # pixels a side
  semantic: IllumeConfig = dataclasses.field(default_factory=_qwen)
  quantizer: VQConfig = dataclasses.field(  # of pixels
    default_factory=lambda: _simvq(98304)
  )
  encoder: ConvConfig = dataclasses.field(default_factory=ConvConfig)
  decoder: ConvConfig = dataclasses.field(
    default_factory=lambda: ConvConfig(width=384, condition_dim=64)
  )
  noise_rate: float = 0.1  # chance of an image to have its pixel codes moved
  noise_batch_rate: float = 0.1  # chance that all images of a step have
  pixel_weight: float = 1.0  # of the mean square error of pixels

  def build(self, rngs: nnx.Rngs) -> "DualViTok":
    """The tokenizer with new parameters."""
    return DualViTok(self, rngs=rngs)


class DualViTokState(NamedTuple):
  """State of the codebooks of both branches."""

  semantic: CodebookState
  pixel: CodebookState


class DualViTok(nnx.Module):
  """Codes of features and codes of pixels, and images of both.

  Cost in FLOPs of a forward pass: `Illume`, encoder and decoder of pixels, see
  `conv`, and 2 M K d for the codes of M places of the pixel map.

  Attributes:
    config: its settings.
    reads: images, and features [B, N, C] of a frozen encoder on a square grid.
    semantic: the branch of features.

  Args:
    config: the shape.
    rngs: seeds the parameters.

  Raises:
    ValueError: for settings that contradict each other.

  Example:
    >>> book = VQConfig(CodebookConfig(16, 2))
    >>> conv = ConvConfig(4, (1,), num_res_blocks=1, z_dim=4, groups=2,
    ...                   attention=False)
    >>> config = DualViTokConfig(
    ...   4, IllumeConfig(6, 4, TransformerConfig(8, 1, 2), book), book, conv,
    ...   dataclasses.replace(conv, condition_dim=4))
    >>> tokenizer = jax.jit(lambda: config.build(nnx.Rngs(0)))()
    >>> state = tokenizer.init_state(jax.random.key(0))
    >>> inputs = jnp.ones((2, 4, 4, 3)), jnp.ones((2, 4, 6))
    >>> semantic, pixel = jax.eval_shape(tokenizer.encode, *inputs, state)
    >>> semantic.indices.shape, pixel.indices.shape
    ((2, 4), (2, 16))
  """

  reads: ClassVar[tuple[str, ...]] = ("images", "features")

  def __init__(self, config: DualViTokConfig, *, rngs: nnx.Rngs):
    _check(config)
    self.config = config
    dim = config.quantizer.codebook.dim
    both = dim + config.semantic.quantizer.codebook.dim
    self.semantic = Illume(config.semantic, rngs=rngs)
    self.encoder = ConvEncoder(config.encoder, rngs=rngs)
    self.to_code = nnx.Linear(config.encoder.z_dim, dim, rngs=rngs)
    self.quantizer = VectorQuantizer(config.quantizer, rngs=rngs)
    self.from_codes = nnx.Linear(both, config.decoder.z_dim, rngs=rngs)
    self.decoder = ConvDecoder(config.decoder, rngs=rngs)

  def init_state(self, key: Key[Array, ""]) -> DualViTokState:
    """The codebooks' states before the first step."""
    keys = jax.random.split(key)
    return DualViTokState(
      self.semantic.init_state(keys[0]), self.quantizer.init_state(keys[1])
    )

  def __call__(
    self,
    images: Float[Array, "B height width 3"],
    features: Float[Array, "B N C"],
    state: DualViTokState,
    *,
    train: bool = False,
    key: Key[Array, ""] | None = None,
    axis_name: str | None = None,
  ) -> tuple[Reconstructed, DualViTokState]:
    """Images from both rows of codes; in training the next state.

    Args:
      images: in -1..1.
      features: of a frozen encoder.
      state: of the codebooks.
      train: static; False leaves the state as it is, and codes in place.
      key: for the noise, and what is random in the quantizers.
      axis_name: mesh axis over which a `shard_map` cuts the batch; give each
        device its own key.

    Returns:
      Images with losses "pixels", "semantic" and, with "semantic_" or
      "pixel_" before their names, those of the quantizers; the state.

    Raises:
      ValueError: if a size is wrong or a key is missing.
    """
    config = self.config
    noisy = train and (config.noise_rate or config.noise_batch_rate)
    if noisy and key is None:
      raise ValueError("key must be given to train with noise, got None")
    keys = [None] * 3 if key is None else jax.random.split(key, 3)
    settings = {"train": train, "axis_name": axis_name}
    found, semantic = self.semantic.quantizer(
      self.semantic.vectors(features), state.semantic, key=keys[0], **settings
    )
    restored = self.semantic.decode_codes(found.codes)
    of_features = self.semantic.judge(features, restored, found, axis_name)
    pixels, pixel = self.quantizer(
      self.vectors(images), state.pixel, key=keys[1], **settings
    )
    codes = self._noised(keys[2], pixels.codes) if noisy else pixels.codes
    output = self.decode_codes(found.codes, codes)
    error = pixel_loss(images, output, "l2", axis_name)
    losses = {
      "pixels": config.pixel_weight * error,
      "semantic": of_features.losses["semantic"],
      **_named("semantic", found.losses),
      **_named("pixel", pixels.losses),
    }
    stats = _named("semantic", found.stats) | _named("pixel", pixels.stats)
    state = DualViTokState(semantic, pixel)
    return Reconstructed(output, losses, stats), state

  def encode(
    self,
    images: Float[Array, "B height width 3"],
    features: Float[Array, "B N C"],
    state: DualViTokState,
  ) -> tuple[Quantized, Quantized]:
    """Codes of features, indices [B, N], and of pixels, row by row, [B, M]."""
    semantic = self.semantic.encode(features, state.semantic)
    return semantic, self.quantizer(self.vectors(images), state.pixel)[0]

  def decode(
    self,
    semantic: Int[Array, "B N"],
    pixel: Int[Array, "B M"],
    state: DualViTokState,
  ) -> Float[Array, "B height width 3"]:
    """Images of both rows of codes, not cut to -1..1."""
    return self.decode_codes(
      self.semantic.quantizer.lookup(semantic, state.semantic),
      self.quantizer.lookup(pixel, state.pixel),
    )

  def vectors(
    self, images: Float[Array, "B height width 3"]
  ) -> Float[Array, "B M d"]:
    """What is quantised of the pixels."""
    size = self.config.image_size
    checks.has_sides(size, images=images)
    x = self.to_code(self.encoder(images))
    return x.reshape(len(x), -1, x.shape[-1])

  def decode_codes(
    self, semantic: Float[Array, "B N d"], pixel: Float[Array, "B M d2"]
  ) -> Float[Array, "B height width 3"]:
    """Images of code vectors; the map of features is stretched to pixels'."""
    small = _side(self.config.semantic)
    large = self.config.image_size // self.config.encoder.factor
    semantic = semantic.reshape(len(semantic), small, small, -1)
    matrix = resample.cubic_matrix(small, large)
    semantic = resample.resample(semantic, matrix, matrix)
    pixel = pixel.reshape(len(pixel), large, large, -1)
    both = jnp.concatenate([semantic, pixel], axis=-1)
    both = both.astype(self.from_codes.kernel.dtype)
    return self.decoder(self.from_codes(both), both)

  def _noised(self, key, codes):
    """Some images with their codes at other places, so that all read both."""
    config = self.config
    one_key, all_key, place_key = jax.random.split(key, 3)
    zeros = jnp.zeros_like(codes[..., 0], jnp.float32)  # [B, M], as codes lie
    draw = jax.random.uniform(one_key, (len(codes), 1))
    moved = (draw < config.noise_rate) | jax.random.bernoulli(
      all_key, config.noise_batch_rate
    )
    order = jnp.argsort(zeros + jax.random.uniform(place_key, zeros.shape))
    other = jnp.take_along_axis(
      jax.lax.stop_gradient(codes), order[..., None], axis=1
    )
    return jnp.where(moved[..., None], other, codes)


def to_ids(
  semantic: Int[Array, "B N"],
  pixel: Int[Array, "B M"],
  *,
  num_semantic: int,
  num_pixel: int,
  offset: int,
) -> Int[Array, "B L"]:
  """Ids in the vocabulary of a language model: codes of features, then pixels.

  Args:
    semantic: indices of features.
    pixel: indices of pixels.
    num_semantic: how many codes the former have; those of pixels come behind.
    num_pixel: how many codes the latter have.
    offset: size of the vocabulary of text, before them.

  Returns:
    int32 [B, N + M].

  Example:
    >>> one, two = jnp.array([[3]]), jnp.array([[5]])
    >>> to_ids(one, two, num_semantic=4, num_pixel=8, offset=100).tolist()
    [[103, 109]]
  """
  rows = (
    (semantic, num_semantic, offset),
    (pixel, num_pixel, offset + num_semantic),
  )
  ids = [
    language_ids.to_language(row[..., None], num_codes=number, offset=start)
    for row, number, start in rows
  ]
  return jnp.concatenate(ids, axis=1)


def from_ids(
  ids: Int[Array, "B L"],
  *,
  num_tokens: int,
  num_semantic: int,
  num_pixel: int,
  offset: int,
) -> tuple[Int[Array, "B N"], Int[Array, "B M"]]:
  """The indices that `to_ids` made ids of; -1 for an id of another range.

  Args:
    ids: of an image.
    num_tokens: N, how many codes of features come first.
    num_semantic: as there.
    num_pixel: as there.
    offset: as there.

  Raises:
    ValueError: if there are fewer ids.

  Example:
    >>> rows = from_ids(jnp.array([[103, 109, 50]]), num_tokens=1,
    ...                 num_semantic=4, num_pixel=8, offset=100)
    >>> [row.tolist() for row in rows]
    [[[3]], [[5, -1]]]
  """
  checks.in_range(0, ids.shape[1], num_tokens=num_tokens)
  rows = (
    (ids[:, :num_tokens], num_semantic, offset),
    (ids[:, num_tokens:], num_pixel, offset + num_semantic),
  )
  semantic, pixel = (
    language_ids.from_language(row, num_codes=number, offset=start)[..., 0]
    for row, number, start in rows
  )
  return semantic, pixel


def _named(branch, numbers):
  return {f"{branch}_{name}": x for name, x in numbers.items()}


def _side(config):
  return int(config.num_tokens**0.5 + 0.5)


def _check(config):
  checks.one_of((None,), input_dim=config.quantizer.input_dim)
  checks.one_of((1,), num_heads=config.quantizer.num_heads)
  checks.in_range(
    0, 1, noise_rate=config.noise_rate, noise_batch_rate=config.noise_batch_rate
  )
  checks.divisible(config.encoder.factor, image_size=config.image_size)
  checks.same_size(
    encoder_factor=config.encoder.factor, decoder_factor=config.decoder.factor
  )
  checks.same_size(
    num_tokens=config.semantic.num_tokens, square=_side(config.semantic) ** 2
  )
  checks.same_size(
    condition_dim=config.decoder.condition_dim,
    both_codes=config.quantizer.codebook.dim
    + config.semantic.quantizer.codebook.dim,
  )

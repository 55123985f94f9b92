"""ILLUME: an image as codes of what a frozen encoder sees in it.

Features are quantised and features are restored, never pixels: the codes hold
meaning, and a generator outside renders images from them.

    config = IllumeConfig(features_dim=1152, num_tokens=256)
    tokenizer = config.build(nnx.Rngs(0))
    state = tokenizer.init_state(key)
    found = tokenizer.encode(features, state)      # indices [B, 256]
    features = tokenizer.decode(found.indices, state)

Sources: Wang et al., 2024, "ILLUME: Illuminating Your LLMs to See, Draw, and
Self-Enhance": quantised features, and their cosine as loss. Its code is not
public: trunks of four blocks and a codebook of kind "simvq" are taken from its
successor (see `illume_plus`); ours are learned positions before the blocks
that decode, and the number of codes, of the usual order.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from tokjax import checks
from tokjax.ops import similarity
from tokjax.tokenizers import transformer
from tokjax.tokenizers.codebook import CodebookConfig, CodebookState
from tokjax.tokenizers.measures import masked_mean
from tokjax.tokenizers.transformer import Transformer, TransformerConfig
from tokjax.tokenizers.types import Quantized, Reconstructed
from tokjax.tokenizers.vector_quantizer import VectorQuantizer, VQConfig
from tokjax.typing import Array, Bool, Float, Int, Key

__all__ = ["Illume", "IllumeConfig"]


@dataclasses.dataclass(unsafe_hash=True)
class IllumeConfig:
  """A tokenizer of features."""

  features_dim: int = 1152  # C
  num_tokens: int = 256  # N, for the learned positions
  trunk: TransformerConfig = dataclasses.field(  # before codes, and behind
    default_factory=lambda: TransformerConfig(1152, 4, 16)
  )
  quantizer: VQConfig = dataclasses.field(
    default_factory=lambda: VQConfig(
      CodebookConfig(16384, 32, learning="simvq")
    )
  )
  normalize_target: bool = False  # restore features of mean 0 and variance 1
  semantic_weight: float = 1.0  # of 1 - cosine to the features

  def build(self, rngs: nnx.Rngs) -> "Illume":
    """The tokenizer with new parameters."""
    return Illume(self, rngs=rngs)


class Illume(nnx.Module):
  """Features to codes to features.

  Cost in FLOPs of a forward pass: two transformers over N tokens, see
  `Transformer`, and 2 N K d for the codes.

  Attributes:
    config: its settings.
    reads: features [B, N, C] of a frozen encoder.

  Args:
    config: the shape.
    rngs: seeds the parameters.

  Raises:
    ValueError: for settings that contradict each other.

  Example:
    >>> config = IllumeConfig(
    ...   6, 9, TransformerConfig(8, 1, 2), VQConfig(CodebookConfig(16, 4)))
    >>> tokenizer = jax.jit(lambda: config.build(nnx.Rngs(0)))()
    >>> state = tokenizer.init_state(jax.random.key(0))
    >>> found = jax.jit(tokenizer.encode)(jnp.ones((2, 9, 6)), state)
    >>> found.indices.shape
    (2, 9)
  """

  reads: ClassVar[tuple[str, ...]] = ("features",)

  def __init__(self, config: IllumeConfig, *, rngs: nnx.Rngs):
    _check(config)
    self.config = config
    trunk, features = config.trunk, config.features_dim
    dim = config.quantizer.codebook.dim

    def dense(inputs, outputs):
      return transformer.linear(trunk, inputs, outputs, rngs)

    self.features_in = dense(features, trunk.width)
    self.encoder = Transformer(trunk, rngs=rngs)
    self.to_code = dense(trunk.width, dim)
    self.quantizer = VectorQuantizer(config.quantizer, rngs=rngs)
    self.from_code = dense(dim, trunk.width)
    self.positions = transformer.table(config.num_tokens, trunk.width, rngs)
    self.decoder = Transformer(trunk, rngs=rngs)
    self.features_out = dense(trunk.width, features)

  def init_state(self, key: Key[Array, ""]) -> CodebookState:
    """The codebook's state before the first step."""
    return self.quantizer.init_state(key)

  def __call__(
    self,
    features: Float[Array, "B N C"],
    state: CodebookState,
    mask: Bool[Array, "B N"] | None = None,
    *,
    train: bool = False,
    key: Key[Array, ""] | None = None,
    axis_name: str | None = None,
  ) -> tuple[Reconstructed, CodebookState]:
    """Features from their codes, with the losses; in training the next state.

    Args:
      features: of a frozen encoder; as targets they take no gradient.
      state: of the codebook.
      mask: True where a feature counts; None means all.
      train: static; False leaves the state as it is.
      key: for what is random in the quantizer.
      axis_name: mesh axis over which a `shard_map` cuts the batch.

    Returns:
      Features with losses "semantic" and those of the quantizer; the state.
    """
    found, state = self.quantizer(
      self.vectors(features, mask), state, mask, train=train, key=key,
      axis_name=axis_name,
    )  # fmt: skip
    output = self.decode_codes(found.codes, mask)
    return self.judge(features, output, found, axis_name), state

  def encode(
    self,
    features: Float[Array, "B N C"],
    state: CodebookState,
    mask: Bool[Array, "B N"] | None = None,
  ) -> Quantized:
    """The codes of features, indices [B, N]."""
    return self.quantizer(self.vectors(features, mask), state, mask)[0]

  def decode(
    self, indices: Int[Array, "B N"], state: CodebookState
  ) -> Float[Array, "B N C"]:
    """Features of codes; where the index is -1 there is none, and zeros."""
    codes = self.quantizer.lookup(indices, state)
    return self.decode_codes(codes, indices >= 0)

  def vectors(
    self,
    features: Float[Array, "B N C"],
    mask: Bool[Array, "B N"] | None = None,
  ) -> Float[Array, "B N d"]:
    """What is quantised."""
    config = self.config
    checks.same_size(
      width_of_features=features.shape[2], features_dim=config.features_dim
    )
    x = features.astype(self.features_in.kernel.dtype)
    if mask is not None:
      x = jnp.where(mask[..., None], x, 0)
    return self.to_code(self.encoder(self.features_in(x), mask=_keys(mask)))

  def decode_codes(
    self,
    codes: Float[Array, "B N d"],
    mask: Bool[Array, "B N"] | None = None,
  ) -> Float[Array, "B N C"]:
    """Features of code vectors; zeros where the mask is False."""
    checks.same_size(tokens=codes.shape[1], num_tokens=self.config.num_tokens)
    x = self.from_code(codes.astype(self.from_code.kernel.dtype))
    x = x + self.positions[...][None].astype(x.dtype)
    output = self.features_out(self.decoder(x, mask=_keys(mask)))
    return output if mask is None else jnp.where(mask[..., None], output, 0)

  def judge(
    self,
    features: Float[Array, "B N C"],
    output: Float[Array, "B N C"],
    found: Quantized,
    axis_name: str | None = None,
  ) -> Reconstructed:
    """Joins the loss of features to those of the quantizer."""
    target = jax.lax.stop_gradient(features).astype(jnp.float32)
    target = jnp.where(found.mask[..., None], target, 0)
    if self.config.normalize_target:
      target = jax.nn.standardize(target, axis=-1, epsilon=1e-6)
    cosine = similarity.cosine(target, output)
    cosine = masked_mean(cosine, found.mask, axis_name)
    losses = {"semantic": self.config.semantic_weight * (1 - cosine)}
    return Reconstructed(output, {**losses, **found.losses}, found.stats)


def _keys(mask):
  """[B, N, N]: every token may read those that count."""
  if mask is None:
    return None
  return jnp.broadcast_to(mask[:, None], (*mask.shape, mask.shape[-1]))


def _check(config):
  checks.in_range(1, 1 << 20, num_tokens=config.num_tokens)
  quantizer = config.quantizer
  checks.one_of((None,), input_dim=quantizer.input_dim)
  checks.one_of((1,), num_heads=quantizer.num_heads)

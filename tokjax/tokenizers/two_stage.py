"""One-dimensional tokenizers in two stages: another's codes first, then pixels.

Stage "proxy" trains encoder, codes and decoder to name, at every patch, the
code that a frozen VQGAN has there: an easier target than pixels. Stage "pixels"
fixes what writes tokens and trains what reads them: the decoder, and the
VQGAN's own decoder behind it, which gets the mean of the VQGAN's codes under
the predicted distribution.

    config = TwoStageConfig(proxy=vqgan.SHAPES["maskgit"])
    tokenizer = config.build(nnx.Rngs(0))
    state = tokenizer.init_state(key)
    tokenizer, state = tokenizer.with_proxy(trained_vqgan, its_state, state)
    found, state = tokenizer(images, state, train=True, key=key)
    images = tokenizer.decode(indices[:, :16], state)

An optimiser with weight decay must be told what is frozen: `OptimizerConfig`
with `frozen=FROZEN[stage]`.

Sources: Yu et al., 2024, "An Image is Worth 32 Tokens for Reconstruction and
Generation", both stages from its code; Miwa et al., 2025, "One-D-Piece", which
drops tails in both. `lengths="all"` is TiTok. Ours: in the second stage the
codebook does not move, also where it is one of moving means.
"""

import dataclasses
import math
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from tokjax import checks
from tokjax.tokenizers import transformer, vqgan
from tokjax.tokenizers.codebook import CodebookState
from tokjax.tokenizers.measures import masked_mean, pixel_loss
from tokjax.tokenizers.one_d_piece import (
  OneDPiece,
  OneDPieceConfig,
  length_stats,
)
from tokjax.tokenizers.types import Quantized, Reconstructed
from tokjax.tokenizers.vqgan import Vqgan, VqganConfig
from tokjax.typing import Array, Float, Int, Key

__all__ = ["FROZEN", "TwoStage", "TwoStageConfig", "TwoStageState"]

Stage = Literal["proxy", "pixels"]

# What no step of a stage changes, as patterns of paths of parameters.
FROZEN = {
  "proxy": ("(^|/)proxy/",),
  "pixels": ("(^|/)(patches|encoder|queries|to_code|quantizer)(/|$)",),
}


@dataclasses.dataclass(unsafe_hash=True)
class TwoStageConfig(OneDPieceConfig):
  """A One-D-Piece over the codes of a VQGAN; the defaults are published."""

  proxy: VqganConfig = dataclasses.field(
    default_factory=lambda: vqgan.SHAPES["maskgit"]
  )
  stage: Stage = "proxy"

  def build(self, rngs: nnx.Rngs) -> "TwoStage":
    """The tokenizer with new parameters."""
    return TwoStage(self, rngs=rngs)


class TwoStageState(NamedTuple):
  """State of both codebooks."""

  tokens: CodebookState
  proxy: CodebookState


class TwoStage(OneDPiece):
  """A One-D-Piece that reads pixels through the decoder of a VQGAN.

  Cost in FLOPs beside `TiTok`: 2 P D (2 D + V) + 2 P V d for P patches, and
  the encoder of the VQGAN in stage "proxy", its decoder in stage "pixels".

  Attributes:
    proxy: the VQGAN; random until `with_proxy`.

  Args:
    config: the shape.
    rngs: seeds the parameters.

  Raises:
    ValueError: for sizes that do not fit.

  Example:
    >>> from tokjax.tokenizers.codebook import CodebookConfig
    >>> from tokjax.tokenizers.conv import ConvConfig
    >>> from tokjax.tokenizers.transformer import TransformerConfig
    >>> from tokjax.tokenizers.vector_quantizer import VQConfig
    >>> trunk = ConvConfig(4, (1, 1), num_res_blocks=1, z_dim=2, groups=2,
    ...                    attention=False)
    >>> book = VQConfig(CodebookConfig(16, 2))
    >>> small = TransformerConfig(width=8, num_layers=1, num_heads=2)
    >>> config = TwoStageConfig(8, 2, 6, small, small, book,
    ...                         proxy=VqganConfig(trunk, book))
    >>> tokenizer = jax.jit(lambda: config.build(nnx.Rngs(0)))()
    >>> state = tokenizer.init_state(jax.random.key(0))
    >>> images = jnp.zeros((2, 8, 8, 3))
    >>> found = jax.jit(tokenizer.encode)(images, state)
    >>> jax.jit(tokenizer.decode)(found.indices[:, :2], state).shape
    (2, 8, 8, 3)
  """

  def __init__(self, config: TwoStageConfig, *, rngs: nnx.Rngs):
    checks.one_of(get_args(Stage), stage=config.stage)
    factor = config.proxy.trunk.factor
    checks.same_size(patch_size=config.patch_size, proxy_factor=factor)
    checks.one_of((1,), proxy_heads=config.proxy.quantizer.num_heads)
    super().__init__(config, rngs=rngs)
    decoder = config.decoder
    self.proxy = Vqgan(config.proxy, rngs=rngs)
    num_codes = self.proxy.quantizer.num_codes
    wide = 2 * decoder.width
    # In place of TiTok's layer to pixels.
    self.pixels = nnx.List(
      [
        transformer.linear(decoder, decoder.width, wide, rngs),
        transformer.linear(decoder, wide, num_codes, rngs),
      ]
    )

  def init_state(self, key: Key[Array, ""]) -> TwoStageState:
    """The codebooks' states before the first step."""
    keys = jax.random.split(key)
    return TwoStageState(
      super().init_state(keys[0]), self.proxy.init_state(keys[1])
    )

  def with_proxy(
    self, proxy: Vqgan, proxy_state: CodebookState, state: TwoStageState
  ) -> tuple["TwoStage", TwoStageState]:
    """The tokenizer with a trained VQGAN, and the state that goes with it.

    Raises:
      ValueError: if the VQGAN has another shape.
    """
    if proxy.config != self.config.proxy:
      raise ValueError(
        f"proxy must be of {self.config.proxy}, got {proxy.config}"
      )
    made = jax.tree.map(lambda x: x, self)
    made.proxy = proxy
    return made, state._replace(proxy=proxy_state)

  def __call__(
    self,
    images: Float[Array, "B height width 3"],
    state: TwoStageState,
    *,
    train: bool = False,
    key: Key[Array, ""] | None = None,
    axis_name: str | None = None,
  ) -> tuple[Reconstructed, TwoStageState]:
    """The losses of the stage; in training the next state.

    Args:
      images: in -1..1.
      state: of the codebooks; that of the VQGAN never changes.
      train: static; False drops nothing and leaves the state as it is.
      key: for the length and the quantizer, in training.
      axis_name: mesh axis over which a `shard_map` cuts the batch.

    Returns:
      In stage "proxy" the expected codes [B, P, d] as output, losses "proxy"
      (cross-entropy, nats a patch) and those of the quantizer, and the
      statistic "agreement", the share of patches whose likeliest code is the
      VQGAN's. In stage "pixels" images and loss "pixels". The state.

    Raises:
      ValueError: if a key is missing.
    """
    length, key = self.draw_length(key, images.shape[0], train)
    if self.config.stage == "pixels":
      found = jax.lax.stop_gradient(self.encode(images, state))
      output = self._images(self.logits(found.codes, length), state)
      kind = self.config.pixel_loss
      losses = {"pixels": pixel_loss(images, output, kind, axis_name)}
      stats = found.stats
    else:
      target = jax.lax.stop_gradient(self.proxy).encode(images, state.proxy)
      found, tokens = self.quantizer(
        self.vectors(images),
        state.tokens,
        train=train,
        key=key,
        axis_name=axis_name,
      )
      logits = self.logits(found.codes, length)
      output = self._expected(logits, state)
      state = state._replace(tokens=tokens)
      losses, stats = _named(logits, target.indices, axis_name)
      losses, stats = losses | found.losses, stats | found.stats
    stats = stats | length_stats(length)
    return Reconstructed(output, losses, stats), state

  def encode(
    self, images: Float[Array, "B height width 3"], state: TwoStageState
  ) -> Quantized:
    """The tokens of images, indices [B, K]."""
    return super().encode(images, state.tokens)

  def decode(
    self,
    indices: Int[Array, "B k"],
    state: TwoStageState,
    length: Int[Array, "..."] | int | None = None,
  ) -> Float[Array, "B height width 3"]:
    """Images of the first tokens, as `TiTok.decode`."""
    codes = self.quantizer.lookup(indices, state.tokens)
    return self._images(self.logits(codes, length), state)

  def logits(
    self,
    codes: Float[Array, "B k d"],
    length: Int[Array, "..."] | int | None = None,
  ) -> Float[Array, "B P V"]:
    """Of each code of the VQGAN at each patch, row by row, float32."""
    first, second = self.pixels
    hidden = jnp.tanh(first(self.rows(codes, length)))
    return second(hidden).astype(jnp.float32)

  def _expected(self, logits, state):
    """[B, P, d]: the VQGAN's codes, weighed by their probabilities."""
    every = jnp.arange(logits.shape[-1])
    table = self.proxy.quantizer.lookup(every, state.proxy)
    weights = jax.nn.softmax(logits, axis=-1)
    return weights @ jax.lax.stop_gradient(table)

  def _images(self, logits, state):
    codes = self._expected(logits, state)
    side = math.isqrt(codes.shape[1])
    codes = codes.reshape(len(codes), side, side, codes.shape[-1])
    return self.proxy.decoder(codes)


def _named(logits, target, axis_name):
  """Cross-entropy and agreement with indices [B, h, w]."""
  target = target.reshape(len(target), -1)
  log = jax.nn.log_softmax(logits, axis=-1)
  picked = jnp.take_along_axis(log, target[..., None], axis=-1)[..., 0]
  right = (jnp.argmax(logits, axis=-1) == target).astype(jnp.float32)
  return (
    {"proxy": masked_mean(-picked, axis_name=axis_name)},
    {"agreement": masked_mean(right, axis_name=axis_name)},
  )

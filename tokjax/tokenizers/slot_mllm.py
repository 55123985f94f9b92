"""Slot-MLLM: an image as slots, each of one thing, each of residual codes.

    config = SIZES["base"]
    model = config.build(nnx.Rngs(0))
    state = model.init_state(key)
    found, state = model(features, state, train=True)         # continuous slots
    model.config = dataclasses.replace(config, stage="tokenizer")
    found, state = model(features, state, train=True, key=key)
    indices = model.encode(features, state).indices           # [B, 32, 4]
    ids = to_language(indices, num_codes=8192, offset=32000, order="vectors")

Learned slots compete for the features of a frozen encoder (see
`slot_attention`), so that each holds another part of the image. Before, they
read each other in order, as the queries of SEED, whose weights the published
model starts from; what competes is not causal. Stage "slots"
trains them to describe the image; stage "tokenizer" replaces each by a sum of
codes, coarse to fine, and blocks learn to restore it.

The published decoder is a diffusion model that makes pixels of slots, through
four more blocks. In their place stands `feature_decoder`, a transformer that
makes the features that were read, so that this trains without one: its loss
has the weights of the diffusion loss, 1 and .1.

Sources: Chi et al., 2025, "Slot-MLLM: Object-Centric Visual Tokenization for
Multimodal LLM", and its code (KU-AGI/Slot-MLLM). Not here: the losses that
need a language model or a generator (captions, image-text contrast, CLIP
embedding). Inferred: the order in which a language model reads the codes, an
argument of `to_language`; `freeze_slots`; the width of the MLP of the slots.
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from tokjax import checks
from tokjax.ops import attention_masks, similarity
from tokjax.tokenizers.codebook import CodebookConfig, CodebookState
from tokjax.tokenizers.measures import masked_mean
from tokjax.tokenizers.q_former import QFormer, QFormerConfig, Queried
from tokjax.tokenizers.residual_quantizer import ResidualQuantizer, RVQConfig
from tokjax.tokenizers.slot_attention import SlotAttentionConfig
from tokjax.tokenizers.transformer import (
  Transformer,
  TransformerConfig,
  layer_norm,
  linear,
  table,
)
from tokjax.tokenizers.types import Quantized, Reconstructed
from tokjax.typing import Array, Bool, Float, Int, Key

__all__ = ["SIZES", "SlotMLLM", "SlotMLLMConfig"]

Stage = Literal["slots", "tokenizer"]
Loss = Literal["cosine", "square"]


@dataclasses.dataclass(unsafe_hash=True)
class SlotMLLMConfig:
  """A tokenizer of slots."""

  q_former: QFormerConfig  # with `slots`
  quantizer: RVQConfig  # of narrow codes, projected in and out
  num_features: int  # N, tokens of the encoder
  feature_dim: int  # C of the encoder
  num_decoder_layers: int = 4  # blocks that restore slots from codes
  num_decoder_heads: int = 16  # of all blocks but those of the Q-Former
  num_feature_layers: int = 4  # blocks of the feature decoder
  causal: bool = True  # self-attention to slots before only
  stage: Stage = "slots"
  freeze_slots: bool = True  # no gradient to slots in stage "tokenizer"
  restore_loss: Loss = "cosine"  # of restored slots to slots
  feature_loss: Loss = "cosine"  # of decoded features to features
  code_weight: float = 1.0  # of the losses of the quantizer
  restore_weight: float = 1.0
  feature_weight: float = 1.0  # in stage "slots"
  coded_feature_weight: float = 0.1  # in stage "tokenizer"

  def build(self, rngs: nnx.Rngs) -> "SlotMLLM":
    """The module; see `SlotMLLM`."""
    return SlotMLLM(self, rngs=rngs)


class SlotMLLM(nnx.Module):
  """Slots, their codes, and the way back to features.

  Costs a `QFormer` with slots, blocks over S slots, and the feature decoder
  over N tokens.

  Args:
    config: settings.
    rngs: seeds the parameters.

  Raises:
    ValueError: for settings that cannot be.

  Example:
    >>> slots = SlotAttentionConfig(8, 6)
    >>> config = SlotMLLMConfig(
    ...   QFormerConfig(8, 2, 2, num_queries=3, context_dim=6, slots=slots),
    ...   RVQConfig(CodebookConfig(5, 4), num_stages=2),
    ...   num_features=9, feature_dim=7, num_decoder_heads=2)
    >>> model = jax.eval_shape(lambda: config.build(nnx.Rngs(0)))
    >>> state = jax.eval_shape(model.init_state, jax.random.key(1))
    >>> x = jnp.ones((1, 9, 7))
    >>> jax.eval_shape(SlotMLLM.encode, model, x, state).indices.shape
    (1, 3, 2)
  """

  reads = ("features",)

  def __init__(self, config: SlotMLLMConfig, *, rngs: nnx.Rngs):
    _check(config)
    self.config = config
    former = config.q_former
    width, dim = former.width, config.quantizer.codebook.dim
    blocks = TransformerConfig(
      width, config.num_decoder_layers, config.num_decoder_heads,
      former.mlp_ratio, norm_output=False, norm_epsilon=1e-6,
    )  # fmt: skip
    decoder = dataclasses.replace(
      blocks, num_layers=config.num_feature_layers, context_dim=width,
      norm_output=True,
    )  # fmt: skip
    of_features = dataclasses.replace(blocks, width=config.feature_dim)

    def dense(inputs, outputs):
      return linear(blocks, inputs, outputs, rngs)

    self.norm_features = layer_norm(of_features, rngs)
    inner = former.context_dim
    self.features_in = nnx.List(
      [
        dense(config.feature_dim, config.feature_dim),
        dense(config.feature_dim, inner),
      ]
    )
    self.q_former = QFormer(former, rngs=rngs)
    self.code_in = dense(width, dim)
    self.quantizer = ResidualQuantizer(config.quantizer, rngs=rngs)
    self.code_out = dense(dim, width)
    self.positions = table(former.num_queries, width, rngs)
    self.blocks = Transformer(blocks, rngs=rngs)
    self.feature_positions = table(config.num_features, width, rngs)
    self.feature_decoder = Transformer(decoder, rngs=rngs)
    self.feature_out = dense(width, config.feature_dim)

  def init_state(self, key: Key[Array, ""]) -> CodebookState:
    """The states of all codebooks before the first step."""
    return self.quantizer.init_state(key)

  def __call__(
    self,
    features: Float[Array, "B N C"],
    state: CodebookState,
    *,
    mask: Bool[Array, "B N"] | None = None,
    train: bool = False,
    key: Key[Array, ""] | None = None,
    axis_name: str | None = None,
  ) -> tuple[Reconstructed, CodebookState]:
    """The losses of the stage; in training also the next state.

    Args:
      features: of a frozen encoder.
      state: of the codebooks.
      mask: True where a feature counts; None means all. An image without any
        does not count.
      train: static; False leaves the state as it is.
      key: in training for dropout in the Q-Former where it learns (None:
        without), and for resets and dropout of the quantizer.
      axis_name: mesh axis over which a `shard_map` cuts the batch.

    Returns:
      The features as decoded from slots, or from restored slots. Losses
      "features"; in stage "tokenizer" also "restore" and those of the
      quantizer.

    Raises:
      ValueError: if the number or width of the features is wrong.
    """
    config = self.config
    checks.same_size(
      features=features.shape[1], num_features=config.num_features
    )
    if mask is not None:
      features = jnp.where(mask[..., None], features, 0)
    coded = config.stage == "tokenizer"
    fixed = coded and config.freeze_slots
    keys = [None] * 2 if key is None else jax.random.split(key)
    learns = train and not fixed
    slots = self.slots(features, mask, key=keys[0] if learns else None).queries
    if fixed:
      slots = jax.lax.stop_gradient(slots)
    valid = jnp.ones_like(features[..., 0], bool) if mask is None else mask
    rows = jnp.any(valid, axis=-1, keepdims=True)
    rows = jnp.broadcast_to(rows, slots.shape[:2])  # [B, S]
    losses, stats, used = {}, {}, slots
    if coded:
      found, state = self.quantizer(
        self.code_in(slots), state, rows, train=train, key=keys[1],
        axis_name=axis_name,
      )  # fmt: skip
      used = self._restored(found.codes)
      losses = {n: config.code_weight * x for n, x in found.losses.items()}
      target = jax.lax.stop_gradient(slots)
      error = masked_mean(
        _error(used, target, config.restore_loss), rows, axis_name
      )
      losses["restore"] = config.restore_weight * error
      stats = {**found.stats, "restore": error}
    output = self._features_of(used)
    error = _error(output, features, config.feature_loss)
    error = masked_mean(error, valid, axis_name)
    weight = config.coded_feature_weight if coded else config.feature_weight
    losses["features"] = weight * error
    return Reconstructed(output, losses, {**stats, "features": error}), state

  def slots(
    self,
    features: Float[Array, "B N C"],
    mask: Bool[Array, "B N"] | None = None,
    *,
    key: Key[Array, ""] | None = None,
  ) -> Queried:
    """The continuous slots, and which features each took.

    Args:
      features: of a frozen encoder.
      mask: True where a feature counts; None means all.
      key: for dropout; None leaves it out.
    """
    if mask is not None:
      features = jnp.where(mask[..., None], features, 0)
    first, second = self.features_in
    x = self.norm_features(features).astype(first.kernel[...].dtype)
    x = second(jax.nn.relu(first(x)))
    causal = None
    if self.config.causal:
      causal = attention_masks.causal(self.config.q_former.num_queries)
    return self.q_former.read(x, mask, mask=causal, key=key)

  def encode(
    self,
    features: Float[Array, "B N C"],
    state: CodebookState,
    mask: Bool[Array, "B N"] | None = None,
  ) -> Quantized:
    """Codes of images, indices [B, S, M].

    Args:
      features: of a frozen encoder.
      state: of the codebooks.
      mask: True where a feature counts; an image without any has indices -1.
    """
    slots = self.slots(features, mask).queries
    rows = None
    if mask is not None:
      rows = jnp.any(mask, axis=-1, keepdims=True)
      rows = jnp.broadcast_to(rows, slots.shape[:2])
    return self.quantizer(self.code_in(slots), state, rows)[0]

  def decode(
    self,
    indices: Int[Array, "B S M"],
    state: CodebookState,
    *,
    num_levels: int | None = None,
  ) -> Float[Array, "B S D"]:
    """The slots restored from codes.

    Args:
      indices: of all slots.
      state: of the codebooks.
      num_levels: only so many first levels count; None means all.
    """
    codes = self.quantizer.lookup(indices, state, num_active=num_levels)
    return self._restored(codes)

  def decode_features(
    self, slots: Float[Array, "B S D"]
  ) -> Float[Array, "B N C"]:
    """The features that slots describe.

    Args:
      slots: continuous ones, or restored ones of `decode`.
    """
    return self._features_of(slots)

  def _restored(self, codes):
    up = self.code_out(codes)
    return self.blocks(up + self.positions[...].astype(up.dtype)[None])

  def _features_of(self, slots):
    start = self.feature_positions[...].astype(slots.dtype)[None]
    # Laid out over devices as the slots are.
    start = start + jnp.zeros_like(slots[:, :1, :1])
    return self.feature_out(self.feature_decoder(start, slots))


def _error(x, y, loss):
  """Per vector, float32."""
  if loss == "cosine":
    return 1 - similarity.cosine(x, y)
  error = x.astype(jnp.float32) - y.astype(jnp.float32)
  return jnp.mean(jnp.square(error), axis=-1)


def _check(config):
  checks.one_of(get_args(Stage), stage=config.stage)
  checks.one_of(get_args(Loss), restore_loss=config.restore_loss)
  checks.one_of(get_args(Loss), feature_loss=config.feature_loss)
  checks.in_range(
    1, 1 << 20, num_features=config.num_features, feature_dim=config.feature_dim
  )
  if config.q_former.slots is None:
    raise ValueError("q_former must have slots, got None")


def _published(**slots):
  """32 slots of 4 codes, from DINOv2's 16 x 16 patches of width 1024."""
  return SlotMLLMConfig(
    QFormerConfig(
      slots=SlotAttentionConfig(768, 1408, 12, norm_inputs=False, **slots)
    ),
    RVQConfig(
      CodebookConfig(8192, 32, learning="ema", reset="batch"),
      num_stages=4,
      shared=True,
    ),
    num_features=256,
    feature_dim=1024,
  )


SIZES = {
  "base": _published(compete="heads_slots", scale_by="num_slots"),
  "morph": _published(
    norm="one_plus",
    num_iterations=1,
    update="replace",
    norm_slots=False,
    mlp_ratio=0.0,
  ),
}

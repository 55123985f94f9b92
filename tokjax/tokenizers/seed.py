"""SEED: an image as 32 discrete tokens in an order, for a language model.

    config = SIZES["seed2"]
    model = config.build(nnx.Rngs(0))
    state = model.init_state(key)
    found, state = model(features, state, other=texts, train=True)    # stage 1
    model.config = dataclasses.replace(config, stage="tokenizer")
    found, state = model(features, state, train=True)                 # stage 2
    indices = model.encode(features, state).indices                   # [B, 32]
    ids = to_language(indices[..., None], num_codes=8192, offset=32000)

Queries read the features of a frozen encoder under a causal mask: token i
depends on no later one, as the words of a sentence. Stage "contrastive"
teaches the last query, which sees all others, to find the text of the image;
stage "tokenizer" replaces the queries by codes and learns to restore them, and
to make of them the embedding that a frozen image generator takes.

Sources: Ge et al., 2023, "Planting a SEED of Vision in Large Language Model"
and "Making LLaMA SEE and Draw with SEED Tokenizer"; sizes, weights of losses
and the two separate stacks of blocks behind the codes from published code
(AILab-CVC/SEED), which has its weights on the two terms of the codebook loss
the other way round (`legacy`). Ours: the temperature is learned as its
logarithm, so that it stays positive; text comes as an embedding [B, E], not
through the Q-Former; the published first stage starts from BLIP-2.
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from tokjax import checks
from tokjax.ops import attention_masks, similarity
from tokjax.ops.contrastive import contrastive_loss
from tokjax.tokenizers.codebook import CodebookConfig, CodebookState
from tokjax.tokenizers.measures import masked_mean
from tokjax.tokenizers.q_former import QFormer, QFormerConfig
from tokjax.tokenizers.transformer import (
  Transformer,
  TransformerConfig,
  linear,
  table,
)
from tokjax.tokenizers.types import Quantized, Reconstructed
from tokjax.tokenizers.vector_quantizer import VectorQuantizer, VQConfig
from tokjax.typing import Array, Bool, Float, Int, Key

__all__ = ["SIZES", "Seed", "SeedConfig"]

Stage = Literal["contrastive", "tokenizer"]


@dataclasses.dataclass(unsafe_hash=True)
class SeedConfig:
  """A SEED tokenizer; the defaults are those of the second version."""

  q_former: QFormerConfig = dataclasses.field(default_factory=QFormerConfig)
  codebook: CodebookConfig = dataclasses.field(
    default_factory=lambda: CodebookConfig(num_codes=8192, dim=32)
  )
  num_decoder_layers: int = 4  # blocks that restore the queries
  num_embed_layers: int = 4  # blocks before the reverse Q-Former
  # Makes what a generator takes; None: no generator.
  reverse: QFormerConfig | None = dataclasses.field(
    default_factory=lambda: QFormerConfig(num_queries=1, context_dim=768)
  )
  embed_dim: int = 1024  # width of what a generator takes
  other_dim: int = 768  # width of the text embedding of stage 1
  projection_dim: int = 256  # where image and text meet
  stage: Stage = "contrastive"
  temperature: float = 0.07  # at the start
  label_smoothing: float = 0.1
  legacy: bool = False  # commitment 1, codebook .25 instead of .25 and 1
  code_weight: float = 5.0  # of the losses of the quantizer
  restore_weight: float = 2.0  # of 1 - cosine to the queries
  embed_weight: float = 0.5  # of the square error to the generator's input

  def build(self, rngs: nnx.Rngs) -> "Seed":
    """The module; see `Seed`."""
    return Seed(self, rngs=rngs)


class Seed(nnx.Module):
  """Causal queries, their codes, and the way back.

  Costs a `QFormer` and `num_decoder_layers` blocks over Q tokens; far less
  than the encoder before.

  Args:
    config: settings.
    rngs: seeds the parameters.

  Raises:
    ValueError: for sizes that do not fit.

  Example:
    >>> config = SeedConfig(
    ...   QFormerConfig(8, 2, 2, num_queries=3, context_dim=6),
    ...   CodebookConfig(5, 4), num_decoder_layers=1, reverse=None,
    ...   stage="tokenizer")
    >>> model = jax.jit(lambda: config.build(nnx.Rngs(0)))()
    >>> state = model.init_state(jax.random.key(1))
    >>> found = jax.jit(model.encode)(jnp.ones((1, 9, 6)), state)
    >>> found.indices.shape
    (1, 3)
  """

  reads = ("features",)

  def __init__(self, config: SeedConfig, *, rngs: nnx.Rngs):
    _check(config)
    self.config = config
    width, dim = config.q_former.width, config.codebook.dim
    blocks = TransformerConfig(
      width, config.num_decoder_layers, config.q_former.num_heads,
      config.q_former.mlp_ratio, norm_output=False, norm_epsilon=1e-6,
    )  # fmt: skip
    num_queries = config.q_former.num_queries

    def dense(inputs, outputs):
      return linear(blocks, inputs, outputs, rngs)

    self.q_former = QFormer(config.q_former, rngs=rngs)
    self.project = dense(width, config.projection_dim)
    self.project_other = dense(config.other_dim, config.projection_dim)
    self.log_temperature = nnx.Param(jnp.log(jnp.float32(config.temperature)))
    self.task_in = nnx.List([dense(width, width), dense(width, dim)])
    self.quantizer = VectorQuantizer(_quantizer(config), rngs=rngs)
    self.task_out = nnx.List([dense(dim, width), dense(width, width)])
    self.positions = table(num_queries, width, rngs)
    self.blocks = Transformer(blocks, rngs=rngs)
    embeds = config.reverse is not None
    of_embed = dataclasses.replace(blocks, num_layers=config.num_embed_layers)
    self.embed_positions = table(num_queries, width, rngs) if embeds else None
    self.embed_blocks = Transformer(of_embed, rngs=rngs) if embeds else None
    self.reverse = QFormer(config.reverse, rngs=rngs) if embeds else None
    self.embed_out = (
      dense(config.reverse.width, config.embed_dim) if embeds else None
    )

  def init_state(self, key: Key[Array, ""]) -> CodebookState:
    """The codebook's state before the first step."""
    return self.quantizer.init_state(key)

  def __call__(
    self,
    features: Float[Array, "B N C"],
    state: CodebookState,
    *,
    other: Float[Array, "B E"] | None = None,
    embedding: Float[Array, "B R G"] | None = None,
    mask: Bool[Array, "B N"] | None = None,
    train: bool = False,
    key: Key[Array, ""] | None = None,
    axis_name: str | None = None,
  ) -> tuple[Reconstructed, CodebookState]:
    """The losses of the stage; in training also the next state.

    In stage "tokenizer" the Q-Former gets no gradient at all.

    Args:
      features: of a frozen encoder.
      state: of the codebook.
      other: embedding of the text of each image, or of another view of it;
        for stage "contrastive".
      embedding: what the generator takes for each image, one vector per
        query of `reverse`; None leaves its loss out.
      mask: True where a feature counts; None means all. An image without any
        does not count.
      train: static; False leaves the state as it is.
      key: for dropout in stage "contrastive" (None: without), and for resets
        of the codebook.
      axis_name: mesh axis over which a `shard_map` cuts the batch.

    Returns:
      The queries as `output`, in stage "tokenizer" those restored from codes.
      Losses "contrastive"; or those of the quantizer, "restore" and "embed".

    Raises:
      ValueError: if `other` is missing, or an embedding comes unasked.
    """
    config = self.config
    if config.stage == "contrastive":
      return self._contrast(features, other, mask, train, key, axis_name), state
    if embedding is not None and self.reverse is None:
      raise ValueError("embedding needs config.reverse, got None")
    queries = jax.lax.stop_gradient(self.queries(features, mask))
    rows = _rows(queries, mask)
    found, state = self.quantizer(
      self._codes_of(queries), state, rows, train=train, key=key,
      axis_name=axis_name,
    )  # fmt: skip
    up = self._raised(found.codes)
    restored = self._restored(up)
    cosine = similarity.cosine(restored, queries)
    cosine = masked_mean(cosine, rows, axis_name)
    losses = {n: config.code_weight * x for n, x in found.losses.items()}
    losses["restore"] = config.restore_weight * (1 - cosine)
    if embedding is not None:
      embedding = jnp.where(rows[:, :1, None], embedding, 0)
      error = self._embedding(up).astype(jnp.float32) - embedding
      error = jnp.mean(jnp.square(error), axis=(1, 2))
      error = masked_mean(error, rows[:, 0], axis_name)
      losses["embed"] = config.embed_weight * error
    stats = {**found.stats, "cosine": cosine}
    return Reconstructed(restored, losses, stats), state

  def queries(
    self,
    features: Float[Array, "B N C"],
    mask: Bool[Array, "B N"] | None = None,
    *,
    key: Key[Array, ""] | None = None,
  ) -> Float[Array, "B Q D"]:
    """The continuous tokens, each of what it and those before it see.

    Args:
      features: of a frozen encoder.
      mask: True where a feature counts; None means all.
      key: for dropout; None leaves it out.
    """
    causal = attention_masks.causal(self.config.q_former.num_queries)
    return self.q_former(features, mask, mask=causal, key=key)

  def projected(self, queries: Float[Array, "B Q D"]) -> Float[Array, "B P"]:
    """What is compared with text: the last query, of length one, float32.

    Args:
      queries: continuous ones, or restored ones of `decode`.
    """
    last = self.project(queries[:, -1]).astype(jnp.float32)
    return similarity.safe_normalize(last)

  def encode(
    self,
    features: Float[Array, "B N C"],
    state: CodebookState,
    mask: Bool[Array, "B N"] | None = None,
  ) -> Quantized:
    """Codes of images, indices [B, Q].

    Args:
      features: of a frozen encoder.
      state: of the codebook.
      mask: True where a feature counts; an image without any has indices -1.
    """
    queries = self.queries(features, mask)
    rows = _rows(queries, mask)
    return self.quantizer(self._codes_of(queries), state, rows)[0]

  def decode(
    self, indices: Int[Array, "B Q"], state: CodebookState
  ) -> Float[Array, "B Q D"]:
    """The queries restored from codes.

    Args:
      indices: of all Q codes.
      state: of the codebook.
    """
    return self._restored(self._raised(self.quantizer.lookup(indices, state)))

  def embed(
    self, indices: Int[Array, "B Q"], state: CodebookState
  ) -> Float[Array, "B R G"]:
    """What the generator takes, from codes.

    Args:
      indices: of all Q codes.
      state: of the codebook.

    Raises:
      ValueError: without `reverse` in the config.
    """
    if self.reverse is None:
      raise ValueError("embed needs config.reverse, got None")
    up = self._raised(self.quantizer.lookup(indices, state))
    return self._embedding(up)

  def _contrast(self, features, other, mask, train, key, axis_name):
    if other is None:
      raise ValueError('other must be given in stage "contrastive", got None')
    queries = self.queries(features, mask, key=key if train else None)
    rows = _rows(queries, mask)[:, 0]
    other = jnp.where(rows[:, None], other, 0)
    temperature = jnp.exp(self.log_temperature[...].astype(jnp.float32))
    loss = contrastive_loss(
      self.projected(queries),
      self.project_other(other),
      rows,
      temperature=temperature,
      label_smoothing=self.config.label_smoothing,
      axis_name=axis_name,
    )
    stats = {"temperature": temperature}
    return Reconstructed(queries, {"contrastive": loss}, stats)

  def _codes_of(self, queries):
    """[B, Q, D] -> [B, Q, d]."""
    first, second = self.task_in
    return second(jnp.tanh(first(queries)))

  def _raised(self, codes):
    """[B, Q, d] -> [B, Q, D]."""
    first, second = self.task_out
    return second(jnp.tanh(first(codes)))

  def _restored(self, up):
    return self.blocks(up + self.positions[...].astype(up.dtype)[None])

  def _embedding(self, up):
    up = self.embed_blocks(
      up + self.embed_positions[...].astype(up.dtype)[None]
    )
    return self.embed_out(self.reverse(up))


def _rows(queries, mask):
  """[B, Q]: the queries of images that have a feature."""
  if mask is None:
    return jnp.ones_like(queries[..., 0], bool)
  rows = jnp.any(mask, axis=-1, keepdims=True)
  return jnp.broadcast_to(rows, queries.shape[:2])


def _quantizer(config):
  weights = (1.0, 0.25) if config.legacy else (0.25, 1.0)
  return VQConfig(
    config.codebook, commitment_weight=weights[0], codebook_weight=weights[1]
  )


def _check(config):
  checks.one_of(get_args(Stage), stage=config.stage)
  checks.in_range(0, 1, label_smoothing=config.label_smoothing)
  if config.temperature <= 0:
    raise ValueError(f"temperature must be positive, got {config.temperature}")
  if config.q_former.slots is not None:
    raise ValueError("q_former must read by cross-attention, got slots")
  if config.reverse is not None:
    checks.same_size(
      context_dim_of_reverse=config.reverse.context_dim,
      width_of_q_former=config.q_former.width,
    )


# Of the published models. The first one makes the states of a text encoder;
# their width is that of the generator and not recorded (768 is inferred).
SIZES = {
  "seed1": SeedConfig(
    reverse=QFormerConfig(num_queries=77, context_dim=768),
    embed_dim=768,
    legacy=True,
  ),
  "seed2": SeedConfig(legacy=True),
}

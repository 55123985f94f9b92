"""A decoder-only language model that reads rows it may not change.

    config = GlyphLanguageModelConfig(len(table), width=table.shape[1])
    model = config.build(nnx.Rngs(0))
    logits = model(ids, table)                            # [B, N, V]
    loss = model.negative_log_likelihood(ids, table)      # [B, N - 1], nats

The table is an argument, no parameter: an optimiser of the model has neither
a gradient nor a state for it, and no weight decay reaches it. The head is a
matrix of its own, trained, without bias. With `embedding="trainable"` the
model is its own control: the same, but rows that start random and are trained.

Source: Bochkov, 2025, "Emergent Semantics Beyond Token Embeddings: Transformer
LMs with Frozen Visual Unicode Representations": width 1024, 16 layers of 32
heads, rotary positions, GELU, layer norm. Base of the rotary positions, where
the norms stand, width of the MLP and the start of the weights are ours.
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from tokjax import checks
from tokjax.ops import attention, attention_masks, rope, rows
from tokjax.tokenizers import transformer, unicode_glyphs
from tokjax.tokenizers.transformer import TransformerConfig
from tokjax.tokenizers.unicode_glyphs import GlyphEmbedding
from tokjax.typing import Array, Bool, Float, Int

__all__ = ["GlyphLanguageModel", "GlyphLanguageModelConfig"]

Embedding = Literal["frozen", "trainable"]
Positions = Literal["rotary", "learned"]
Table = Float[Array, "V D"] | GlyphEmbedding | None


@dataclasses.dataclass(unsafe_hash=True)
class GlyphLanguageModelConfig:
  """Shape of the model; the defaults are published but where said."""

  vocabulary_size: int  # V
  width: int = 1024  # D
  num_layers: int = 16
  num_heads: int = 32
  mlp_ratio: float = 4.0  # ours
  embedding: Embedding = "frozen"  # given with each call, or learned
  embedding_scale: float = 1.0  # of the rows; sqrt(width) is an option of ours
  positions: Positions = "rotary"
  rotary_base: float = 10000.0  # ours
  max_length: int = 1024  # most tokens, where positions are learned
  init_scale: float = 0.02  # of the weights; ours

  def build(self, rngs: nnx.Rngs) -> "GlyphLanguageModel":
    """The model with fresh parameters."""
    return GlyphLanguageModel(self, rngs=rngs)


class GlyphLanguageModel(nnx.Module):
  """Rows of a table, a causal transformer, logits of the next token.

  Args:
    config: the shape.
    rngs: seeds the parameters.

  Raises:
    ValueError: for sizes that do not fit.

  Example:
    >>> config = GlyphLanguageModelConfig(5, width=8, num_layers=1, num_heads=2)
    >>> model = jax.jit(lambda: config.build(nnx.Rngs(0)))()
    >>> ids = jnp.array([[3, 1, 4]])
    >>> jax.jit(model)(ids, jnp.ones((5, 8))).shape
    (1, 3, 5)

  Cost in FLOPs of a forward pass over N tokens: that of `Transformer`, and
  2 N D V for the head, whose logits take 4 N V bytes.
  """

  def __init__(self, config: GlyphLanguageModelConfig, *, rngs: nnx.Rngs):
    _check(config)
    self.config = config
    shape = TransformerConfig(
      config.width,
      config.num_layers,
      config.num_heads,
      config.mlp_ratio,
      init_scale=config.init_scale,
    )
    learned = config.positions == "learned"
    self.positions = (
      transformer.table(config.max_length, config.width, rngs)
      if learned
      else None
    )
    self.blocks = (
      transformer.Transformer(shape, rngs=rngs)
      if learned
      else _RotaryTransformer(shape, config.rotary_base, rngs=rngs)
    )
    self.embedding = (
      transformer.table(config.vocabulary_size, config.width, rngs)
      if config.embedding == "trainable"
      else None
    )
    self.head = nnx.Linear(
      config.width,
      config.vocabulary_size,
      use_bias=False,
      kernel_init=nnx.initializers.truncated_normal(config.init_scale),
      rngs=rngs,
    )

  def __call__(
    self,
    ids: Int[Array, "B N"],
    table: Table = None,
    mask: Bool[Array, "B N"] | None = None,
  ) -> Float[Array, "B N V"]:
    """Logits of the token that follows each.

    Args:
      ids: tokens, rows of the table; negative ones read as zeros.
      table: the frozen rows; None exactly if the model trains its own.
      mask: True where there is a token; others are read by nobody.

    Returns:
      float32. No gradient goes to the table.

    Raises:
      ValueError: if a table is missing or comes unasked, has another size, or
        there are more tokens than learned positions.
    """
    config = self.config
    dtype = self.head.kernel[...].dtype
    x = self._rows(ids, table).astype(dtype) * config.embedding_scale
    num_tokens = ids.shape[1]
    if self.positions is not None:
      checks.in_range(0, config.max_length, number_of_ids=num_tokens)
      x = x + self.positions[...][None, :num_tokens]
    reads = jnp.asarray(attention_masks.causal(num_tokens))
    if mask is not None:
      reads = reads[None] & mask[:, None]
    x = self.blocks(x, mask=reads)
    return jnp.matmul(
      x, self.head.kernel[...], preferred_element_type=jnp.float32
    )

  def negative_log_likelihood(
    self,
    ids: Int[Array, "B N"],
    table: Table = None,
    mask: Bool[Array, "B N"] | None = None,
  ) -> Float[Array, "B N-1"]:
    """-log p of each token but the first, given those before it.

    Args:
      ids: tokens.
      table: as in the call.
      mask: as in the call.

    Returns:
      Nats, float32; 0 where the mask is False. Divide their sum by log 2 and
      the number of bytes of the text to compare tokenizers.
    """
    logits = self(ids, table, mask)[:, :-1]
    following = jnp.maximum(ids[:, 1:], 0)[..., None]
    chosen = jnp.take_along_axis(logits, following, axis=-1)[..., 0]
    found = jax.nn.logsumexp(logits, axis=-1) - chosen
    return found if mask is None else jnp.where(mask[:, 1:], found, 0)

  def _rows(self, ids, table):
    if (table is None) != (self.embedding is not None):
      raise ValueError(
        f"table must be given exactly if the embedding is frozen; it is "
        f"{self.config.embedding!r}, got {type(table).__name__}"
      )
    if self.embedding is not None:
      return rows.take_rows(self.embedding[...], ids)
    packed = isinstance(table, GlyphEmbedding)
    num_rows = (table.packed if packed else table).shape[0]
    width = (table.projection if packed else table).shape[1]
    checks.same_size(
      rows_of_table=num_rows, vocabulary_size=self.config.vocabulary_size
    )
    checks.same_size(width_of_table=width, width=self.config.width)
    return unicode_glyphs.embed(table, ids)


class _RotaryTransformer(transformer.Transformer):
  """The transformer of tokenizers, its queries and keys turned."""

  def __init__(self, config, base, *, rngs):
    super().__init__(config, rngs=rngs)
    keys = jax.random.split(rngs.params(), config.num_layers)
    self.blocks = jax.vmap(
      lambda key: _RotaryBlock(config, base, rngs=nnx.Rngs(key))
    )(keys)


class _RotaryBlock(transformer.Block):
  def __init__(self, config, base, *, rngs):
    super().__init__(config, rngs=rngs)
    self.attention = _RotaryAttention(config, base, rngs=rngs)


class _RotaryAttention(transformer.Attention):
  def __init__(self, config, base, *, rngs):
    super().__init__(config, config.width, rngs=rngs)
    self.base = base

  def __call__(self, x, context, mask=None):
    q, k, v = self.heads(x, context)
    q, k = rope.rotate(q, base=self.base), rope.rotate(k, base=self.base)
    return self.join(attention.attend(q, k, v, mask))


def _check(config):
  checks.one_of(get_args(Embedding), embedding=config.embedding)
  checks.one_of(get_args(Positions), positions=config.positions)
  checks.in_range(2, 1 << 20, vocabulary_size=config.vocabulary_size)
  checks.in_range(1, 1 << 20, max_length=config.max_length)
  checks.in_range(1, 1 << 10, num_heads=config.num_heads)
  checks.divisible(config.num_heads, width=config.width)
  if config.positions == "rotary":
    checks.divisible(2, width_of_head=config.width // config.num_heads)

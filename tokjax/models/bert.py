"""BERT, MiniLM and DistilBERT encoders: token ids in, hidden states out.

One module covers the three: post-norm transformer blocks with learned
positions and exact (erf) GELU. MiniLM is a narrow BERT; DistilBERT is a BERT
without segment embeddings. Weights come from `tokjax.models.weights`.

The module is a plain pytree: hand it to `jax.jit`, `jax.grad`, optax, orbax.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tokjax import checks
from tokjax.ops.rows import take_rows
from tokjax.typing import Array, Bool, Float, Int, Key

__all__ = [
  "Bert",
  "BertConfig",
  "Block",
  "Layers",
  "attend",
  "gelu",
  "join",
  "split",
]

# What a block keeps: a function of `jax.checkpoint_policies`.
Policy = Callable[..., Any]


@dataclasses.dataclass(unsafe_hash=True)
class BertConfig:
  """Shape of the encoder; the defaults are those of MiniLM-L6-H384."""

  vocab_size: int = 30522  # rows of the word table
  width: int = 384  # hidden width h
  num_layers: int = 6  # blocks
  num_heads: int = 12  # attention heads; must divide width
  mlp_width: int = 1536  # width between the two linear layers of a block
  max_positions: int = 512  # longest sequence
  num_segments: int = 2  # rows of the segment table; 0 for DistilBERT
  norm_epsilon: float = 1e-12  # added to the variance in layer norm
  dropout_rate: float = 0.1  # of embeddings and block outputs, with a key
  attention_dropout_rate: float = 0.1  # of attention weights, with a key
  init_scale: float = 0.02  # standard deviation of the initial weights


class Bert(nnx.Module):
  """A stack of post-norm transformer blocks over word embeddings.

  x = norm(word[ids] + position + segment), then in each block
  x = norm(x + attention(x)) and x = norm(x + W2 gelu(W1 x)).

  Computes in the dtype of its parameters; layer norm and softmax are float32.
  Products of float32 have the platform's default precision, which on TPU is
  below float32: `jax.default_matmul_precision("highest")` raises it.
  Cast the module for bfloat16:
  `jax.tree.map(lambda p: p.astype(jnp.bfloat16), bert)`.

  Cost per token and layer: 8 h^2 + 4 h mlp_width + 4 L h FLOPs (forward).

  Args:
    config: the shape.
    rngs: seeds the parameters.

  Raises:
    ValueError: if `num_heads` does not divide `width`.

  Example:
    >>> config = BertConfig(vocab_size=99, width=8, num_layers=2, num_heads=2,
    ...                     mlp_width=16, max_positions=10)
    >>> bert = jax.jit(lambda: Bert(config, rngs=nnx.Rngs(0)))()
    >>> ids = jnp.array([[2, 7, 3, 0]])
    >>> jax.jit(bert)(ids, ids > 0).shape
    (1, 4, 8)

  Source:
    Devlin et al. 2019, BERT; Wang et al. 2020, MiniLM; Sanh et al. 2019,
    DistilBERT. Without the pooler and the language-model head.
  """

  def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
    checks.divisible(config.num_heads, width=config.width)
    self.config = config

    def table(rows):
      return nnx.Embed(
        rows, config.width, embedding_init=_normal(config), rngs=rngs
      )

    self.words = table(config.vocab_size)
    self.positions = table(config.max_positions)
    self.segments = table(config.num_segments) if config.num_segments else None
    self.norm = _layer_norm(config, rngs)
    self.dropout = nnx.Dropout(config.dropout_rate)
    keys = jax.random.split(rngs.params(), config.num_layers)
    # Every parameter of the blocks has a leading axis of num_layers.
    self.blocks = jax.vmap(lambda key: Block(config, rngs=nnx.Rngs(key)))(keys)

  def __call__(
    self,
    ids: Int[Array, "B N"],
    attention_mask: Bool[Array, "B N"] | None = None,
    segments: Int[Array, "B N"] | None = None,
    *,
    key: Key[Array, ""] | None = None,
    remat: Policy | None = None,
  ) -> Float[Array, "B N h"]:
    """Last hidden state of every position.

    Args:
      ids: token ids in 0..vocab_size-1; position i of a row gets position
        embedding i, padding included.
      attention_mask: True where a token may be attended to; None for all. A
        masked position still gets an output, computed from the unmasked ones
        (what ColBERT's [MASK] tokens need). A row without any valid token
        gives finite numbers without meaning.
      segments: segment ids; None for segment 0 everywhere.
      key: draws the dropout masks; None is deterministic (no dropout).
      remat: what each block keeps for the backward pass beside its input, of
        `jax.checkpoint_policies`; it computes the rest once more. None keeps
        all it needs.

    Returns:
      Hidden states in the dtype of the parameters.

    Raises:
      ValueError: if the axes disagree, N exceeds `max_positions`, or segments
        are given to an encoder that has none.
    """
    x = self._embed(ids, attention_mask, segments)  # [B, N, h]
    if key is not None:
      key, drop = jax.random.split(key)
      x = self.dropout(x, deterministic=False, rngs=drop)
    return _run(self.blocks, self.config, x, attention_mask, key, remat)

  def _embed(self, ids, attention_mask, segments):
    checks.has_rank(2, ids=ids)
    batch, length = ids.shape
    if length > self.config.max_positions:
      raise ValueError(
        f"ids must have at most max_positions={self.config.max_positions} "
        f"tokens, got {length}"
      )
    for name, array in (
      ("attention_mask", attention_mask),
      ("segments", segments),
    ):
      if array is not None and array.shape != ids.shape:
        raise ValueError(
          f"{name} must have the shape of ids {ids.shape}, got {array.shape}"
        )
    if segments is not None and self.segments is None:
      raise ValueError("segments must be None: this encoder has no segments")
    x = take_rows(self.words.embedding[...], ids)
    x = x + self.positions.embedding[:length][None]
    if segments is not None:
      x = x + take_rows(self.segments.embedding[...], segments)
    elif self.segments is not None:
      x = x + self.segments.embedding[0][None, None]
    return self.norm(x).astype(x.dtype)


class Layers(nnx.Module):
  """The upper blocks of an encoder: hidden states in, hidden states out.

  What is trained where the blocks below are frozen; see `split`.

  Attributes:
    config: shape of the encoder these are the last `num_layers` blocks of.
    blocks: their parameters, with a leading axis of `num_layers`.

  Args:
    config: the shape; `num_layers` counts these blocks only.
    blocks: a stacked `Block`.
  """

  def __init__(self, config: BertConfig, blocks: "Block"):
    self.config = config
    self.blocks = blocks

  def __call__(
    self,
    x: Float[Array, "B N h"],
    attention_mask: Bool[Array, "B N"] | None = None,
    *,
    key: Key[Array, ""] | None = None,
    remat: Policy | None = None,
  ) -> Float[Array, "B N h"]:
    """Last hidden states from those that the blocks below gave.

    Args:
      x: hidden states, any float dtype; computed in that of the parameters.
      attention_mask: as in `Bert`.
      key: as in `Bert`.
      remat: as in `Bert`.

    Returns:
      Hidden states in the dtype of the parameters.
    """
    x = x.astype(self.blocks.qkv.kernel[...].dtype)
    return _run(self.blocks, self.config, x, attention_mask, key, remat)


def split(encoder: Bert, num_lower: int) -> tuple[Bert, Layers]:
  """An encoder as its embeddings and lower blocks, and the blocks above.

  `upper(lower(ids, mask), mask)` is `encoder(ids, mask)`.

  Args:
    encoder: the whole; not changed, and its arrays are not copied twice.
    num_lower: blocks that stay with the embeddings, 0..num_layers.

  Returns:
    Lower part and upper part.

  Raises:
    ValueError: if `num_lower` is out of range.

  Example:
    >>> config = BertConfig(vocab_size=9, width=8, num_layers=3, num_heads=2,
    ...                     mlp_width=16, max_positions=4)
    >>> lower, upper = jax.eval_shape(  # shapes only, nothing is computed
    ...     lambda: split(Bert(config, rngs=nnx.Rngs(0)), 2))
    >>> lower.config.num_layers, upper.config.num_layers
    (2, 1)
  """
  checks.in_range(0, encoder.config.num_layers, num_lower=num_lower)
  lower = _with_blocks(
    encoder, jax.tree.map(lambda x: x[:num_lower], encoder.blocks)
  )
  blocks = jax.tree.map(lambda x: x[num_lower:], encoder.blocks)
  count = encoder.config.num_layers - num_lower
  config = dataclasses.replace(encoder.config, num_layers=count)
  return lower, Layers(config, blocks)


def join(lower: Bert, upper: Layers) -> Bert:
  """The encoder that `split` took apart, whatever became of its parts.

  Args:
    lower: embeddings and lower blocks.
    upper: the blocks above.

  Returns:
    A new encoder.

  Example:
    >>> config = BertConfig(vocab_size=9, width=8, num_layers=3, num_heads=2,
    ...                     mlp_width=16, max_positions=4)
    >>> whole = jax.eval_shape(  # shapes only, nothing is computed
    ...     lambda: join(*split(Bert(config, rngs=nnx.Rngs(0)), 1)))
    >>> whole.config == config
    True
  """
  blocks = jax.tree.map(
    lambda a, b: jnp.concatenate([a, b]), lower.blocks, upper.blocks
  )
  return _with_blocks(lower, blocks)


class Block(nnx.Module):
  """Attention and MLP, each added to its input and normalised after."""

  def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
    self.config = config

    def linear(inputs, outputs):
      return nnx.Linear(inputs, outputs, kernel_init=_normal(config), rngs=rngs)

    # One matmul for queries, keys and values, side by side in that order.
    self.qkv = linear(config.width, 3 * config.width)
    self.out = linear(config.width, config.width)
    self.norm_attention = _layer_norm(config, rngs)
    self.up = linear(config.width, config.mlp_width)
    self.down = linear(config.mlp_width, config.width)
    self.norm_mlp = _layer_norm(config, rngs)
    self.dropout = nnx.Dropout(config.dropout_rate)
    self.dropout_attention = nnx.Dropout(config.attention_dropout_rate)

  def __call__(self, x, attention_mask, *, key=None):
    config, dtype = self.config, x.dtype
    keys = (None,) * 3 if key is None else jax.random.split(key, 3)
    batch, length, width = x.shape

    with jax.named_scope("attention"):
      qkv = self.qkv(x).reshape(batch, length, 3, config.num_heads, -1)
      q, k, v = (qkv[:, :, i] for i in range(3))  # each [B, N, H, d]
      drop = functools.partial(
        self.dropout_attention, deterministic=key is None, rngs=keys[0]
      )
      mixed = attend(q, k, v, attention_mask, dropout=drop)
      mixed = self.out(mixed.reshape(batch, length, width))
      mixed = self.dropout(mixed, deterministic=key is None, rngs=keys[1])
      x = self.norm_attention(x + mixed).astype(dtype)
    with jax.named_scope("mlp"):
      hidden = gelu(self.up(x))
      mixed = self.down(hidden)
      mixed = self.dropout(mixed, deterministic=key is None, rngs=keys[2])
      return self.norm_mlp(x + mixed).astype(dtype)


def attend(
  q: Float[Array, "B N H d"],
  k: Float[Array, "B N H d"],
  v: Float[Array, "B N H d"],
  attention_mask: Bool[Array, "B N"] | None = None,
  *,
  dropout: Callable[[Array], Array] | None = None,
) -> Float[Array, "B N H d"]:
  """softmax(q k^T / sqrt(d)) v over the unmasked keys, softmax in float32.

  Products of whole batches of heads, [B, H, N, d] against [B, H, d, N], and
  the division by the softmax's sum after the second product, where there are
  d numbers per token to divide and not N: measured fastest on a CPU.

  Args:
    q: queries.
    k: keys.
    v: values.
    attention_mask: True where a key may be attended to; None for all. A row
      without any gives the mean of its values.
    dropout: applied to the attention weights; None for nothing.

  Returns:
    The mixed values in the dtype of `v`.
  """
  q, v = (x.transpose(0, 2, 1, 3) for x in (q, v))  # [B, H, N, d]
  k = k.transpose(0, 2, 3, 1)  # [B, H, d, N]
  logits = jnp.matmul(q, k, preferred_element_type=jnp.float32)  # [B, H, N, N]
  logits = logits * q.shape[-1] ** -0.5
  if attention_mask is not None:
    # Finite, so that a row without keys stays free of NaN.
    logits = jnp.where(
      attention_mask[:, None, None, :], logits, jnp.finfo(jnp.float32).min
    )
  largest = jnp.max(logits, axis=-1, keepdims=True)
  weights = jnp.exp(logits - jax.lax.stop_gradient(largest))
  total = jnp.sum(weights, axis=-1, keepdims=True)
  if dropout is not None:
    weights = dropout(weights)
  mixed = jnp.matmul(
    weights.astype(v.dtype), v, preferred_element_type=jnp.float32
  )
  return (mixed / total).astype(v.dtype).transpose(0, 2, 1, 3)


def gelu(x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
  """x Phi(x) with the exact error function, in float32.

  Written with erf: `jax.nn.gelu` uses erfc, which is exact in relative terms
  for very negative x and costs three times as much on a CPU.
  """
  wide = x.astype(jnp.float32)
  return (wide * 0.5 * (1 + jax.lax.erf(wide * 2**-0.5))).astype(x.dtype)


def _run(blocks, config, x, attention_mask, key, remat):
  """Applies stacked blocks, one after the other."""
  keys = None if key is None else jax.random.split(key, config.num_layers)

  def step(x, layer):
    block, key = layer
    return block(x, attention_mask, key=key), None

  if remat is not None:
    # In a scan the compiler cannot undo it by sharing with the forward pass.
    step = jax.checkpoint(step, policy=remat, prevent_cse=False)
  return jax.lax.scan(step, x, (blocks, keys))[0]


def _with_blocks(encoder, blocks):
  """A copy of an encoder with other blocks."""
  copy = jax.tree.map(lambda x: x, encoder)
  count = jax.tree.leaves(blocks)[0].shape[0]
  copy.config = dataclasses.replace(encoder.config, num_layers=count)
  copy.blocks = blocks
  return copy


def _normal(config):
  return nnx.initializers.normal(config.init_scale)


def _layer_norm(config, rngs):
  # dtype float32 normalises in float32 whatever comes in.
  return nnx.LayerNorm(
    config.width,
    epsilon=config.norm_epsilon,
    dtype=jnp.float32,
    use_fast_variance=False,
    rngs=rngs,
  )

"""Q-Former: learned queries that read the features of an image.

    config = QFormerConfig(width=768, num_layers=12, num_heads=12)
    model = QFormer(config, rngs=nnx.Rngs(0))
    y = model(features)                                          # [B, Q, D]
    y = model(features, mask=attention_masks.causal(32))         # SEED

The queries attend to each other under a mask of the caller, and in every
second layer to the features; with `slots` they compete for the features
instead of choosing each for itself (see `slot_attention`).

Sources: Li et al., 2023, "BLIP-2", whose blocks are those of BERT, norms after
the sums; causal queries, Ge et al., 2023, "Planting a SEED of Vision in Large
Language Model"; slots, Chi et al., 2025, "Slot-MLLM", in whose code the slots
go through the same output layer, sum and norm as what is read. Without the
text that BLIP-2 sends through the same self-attention.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokjax import checks
from tokjax.tokenizers.slot_attention import SlotAttention, SlotAttentionConfig
from tokjax.tokenizers.transformer import (
  Attention,
  Mlp,
  TransformerConfig,
  layer_norm,
  linear,
)
from tokjax.typing import Array, Bool, Float, Key

__all__ = ["QFormer", "QFormerConfig", "Queried"]


@dataclasses.dataclass(unsafe_hash=True)
class QFormerConfig:
  """A Q-Former; the defaults are those of BLIP-2 and SEED."""

  width: int = 768  # D
  num_layers: int = 12  # L, divides by `read_every`
  num_heads: int = 12  # H, divides the width
  num_queries: int = 32  # Q
  context_dim: int = 1408  # C of the features
  read_every: int = 2  # features are read in layers 0, read_every, ...
  mlp_ratio: float = 4.0  # hidden width of the MLP over the width
  dropout_rate: float = 0.1  # after embedding and sublayers, given a key
  norm_epsilon: float = 1e-12
  init_scale: float = 0.02  # of the weights and queries
  slots: SlotAttentionConfig | None = None  # in the place of cross-attention


class Queried(NamedTuple):
  """What queries became and what they read.

  Attributes:
    queries: after the last layer.
    attention: share of each feature that a slot has, in the last layer that
      reads; None without slots.
  """

  queries: Float[Array, "B Q D"]
  attention: Float[Array, "B Q N"] | None


class QFormer(nnx.Module):
  """x = norm(x + attention x); x = norm(x + read x); x = norm(x + mlp x).

  Computes in the dtype of its parameters; norms and softmax are float32.

  Cost in FLOPs for Q queries and N features: in each layer 8 Q D^2 + 4 Q^2 D
  for attention and 4 Q D F for an MLP of hidden width F; in each layer that
  reads 4 Q D^2 + 4 N C D + 4 N Q D more.

  Args:
    config: the shape.
    rngs: seeds the parameters.

  Raises:
    ValueError: for sizes that do not fit.

  Example:
    >>> config = QFormerConfig(8, 2, 2, num_queries=3, context_dim=6)
    >>> model = jax.jit(lambda: QFormer(config, rngs=nnx.Rngs(0)))()
    >>> jax.jit(model)(jnp.ones((1, 5, 6))).shape
    (1, 3, 8)
  """

  def __init__(self, config: QFormerConfig, *, rngs: nnx.Rngs):
    _check(config)
    self.config = config
    shape = config.num_queries, config.width
    start = jax.random.normal(rngs.params(), shape)
    self.queries = nnx.Param(config.init_scale * start)
    self.norm = layer_norm(_blocks(config), rngs)
    self.dropout = nnx.Dropout(config.dropout_rate)
    groups = config.num_layers // config.read_every
    keys = jax.random.split(rngs.params(), (groups, config.read_every))

    def block(key, reads):
      return _Block(config, reads, rngs=nnx.Rngs(key))

    # A group is one layer that reads and those that do not; every parameter
    # has a leading axis of groups, and of the others in a group.
    self.readers = jax.vmap(lambda key: block(key, True))(keys[:, 0])
    others = jax.vmap(jax.vmap(lambda key: block(key, False)))
    more = config.read_every > 1
    self.others = others(keys[:, 1:]) if more else None

  def __call__(
    self,
    context: Float[Array, "B N C"],
    context_mask: Bool[Array, "B N"] | None = None,
    *,
    mask: Bool[Array, "Q Q"] | np.ndarray | None = None,
    key: Key[Array, ""] | None = None,
  ) -> Float[Array, "B Q D"]:
    """The queries after the last layer; arguments as of `read`."""
    return self.read(context, context_mask, mask=mask, key=key).queries

  def read(
    self,
    context: Float[Array, "B N C"],
    context_mask: Bool[Array, "B N"] | None = None,
    *,
    mask: Bool[Array, "Q Q"] | np.ndarray | None = None,
    key: Key[Array, ""] | None = None,
  ) -> Queried:
    """What the queries find in the features.

    Args:
      context: the features.
      context_mask: True where a feature counts; None means all. The others
        are not read.
      mask: True where query i may read query j; None means everywhere.
      key: for dropout; None leaves it out.

    Returns:
      Queries in the dtype of the parameters.

    Raises:
      ValueError: if the width of the features is wrong.
    """
    config = self.config
    checks.same_size(
      width_of_context=context.shape[-1], context_dim=config.context_dim
    )
    dtype = self.queries[...].dtype
    context = context.astype(dtype)
    if context_mask is not None:
      context = jnp.where(context_mask[..., None], context, 0)
    # Laid out over devices as the features are.
    x = self.queries[...][None] + jnp.zeros_like(context[:, :1, :1])
    groups = config.num_layers // config.read_every
    keys = [None, None]
    if key is not None:
      key, embedding_key = jax.random.split(key)
      keys = jax.random.split(key, (groups, config.read_every))
      keys = [keys[:, 0], keys[:, 1:]]
      x = self.dropout(self.norm(x), deterministic=False, rngs=embedding_key)
    else:
      x = self.norm(x)

    def step(x, layers):
      reader, others, key, other_keys = layers
      x, attention = reader(x, mask, context, context_mask, key)
      if others is not None:
        x, _ = jax.lax.scan(
          lambda x, layer: layer[0](x, mask, key=layer[1]),
          x,
          (others, other_keys),
        )
      return x, attention

    x, attention = jax.lax.scan(
      step, x.astype(dtype), (self.readers, self.others, *keys)
    )
    return Queried(x, None if attention is None else attention[-1])


class _Block(nnx.Module):
  """One layer, with or without reading features."""

  def __init__(self, config, reads, *, rngs):
    blocks = _blocks(config)
    self.attention = Attention(blocks, config.width, rngs=rngs)
    self.norm_attention = layer_norm(blocks, rngs)
    cross, slots = reads and config.slots is None, reads and config.slots
    context = config.context_dim
    self.cross = Attention(blocks, context, rngs=rngs) if cross else None
    self.slots = SlotAttention(config.slots, rngs=rngs) if slots else None
    width = config.width
    self.slots_out = linear(blocks, width, width, rngs) if slots else None
    self.norm_read = layer_norm(blocks, rngs) if reads else None
    self.mlp = Mlp(blocks, rngs=rngs)
    self.norm_mlp = layer_norm(blocks, rngs)
    self.dropout = nnx.Dropout(config.dropout_rate)

  def __call__(self, x, mask, context=None, context_mask=None, key=None):
    """[B, Q, D] -> [B, Q, D], and the attention of slots or None."""
    keys = [None] * 3 if key is None else jax.random.split(key, 3)
    attention = None
    with jax.named_scope("attention"):
      y = self._drop(self.attention(x, x, mask), keys[0])
      x = self.norm_attention(x + y).astype(x.dtype)
    if self.cross is not None:
      with jax.named_scope("read"):
        if context_mask is not None:
          shape = *x.shape[:2], context.shape[1]
          context_mask = jnp.broadcast_to(context_mask[:, None], shape)
        y = self._drop(self.cross(x, context, context_mask), keys[1])
        x = self.norm_read(x + y).astype(x.dtype)
    elif self.slots is not None:
      with jax.named_scope("read"):
        y, attention = self.slots(x, context, context_mask)
        y = self._drop(self.slots_out(y), keys[1])
        x = self.norm_read(x + y).astype(x.dtype)
    with jax.named_scope("mlp"):
      y = self._drop(self.mlp(x), keys[2])
      return self.norm_mlp(x + y).astype(x.dtype), attention

  def _drop(self, x, key):
    return self.dropout(x, deterministic=key is None, rngs=key)


def _blocks(config):
  return TransformerConfig(
    width=config.width,
    num_layers=config.num_layers,
    num_heads=config.num_heads,
    mlp_ratio=config.mlp_ratio,
    norm_epsilon=config.norm_epsilon,
    init_scale=config.init_scale,
  )


def _check(config):
  checks.in_range(
    1, 1 << 20, width=config.width, num_layers=config.num_layers,
    num_heads=config.num_heads, num_queries=config.num_queries,
    context_dim=config.context_dim, read_every=config.read_every,
  )  # fmt: skip
  checks.in_range(0, 1, dropout_rate=config.dropout_rate)
  checks.divisible(config.num_heads, width=config.width)
  checks.divisible(config.read_every, num_layers=config.num_layers)
  if config.slots is not None:
    checks.same_size(width_of_slots=config.slots.width, width=config.width)
    checks.same_size(
      input_dim_of_slots=config.slots.input_dim, context_dim=config.context_dim
    )

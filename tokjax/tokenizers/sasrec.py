"""SASRec: who chose these items in this order, what comes next?

    model = Sasrec(SasrecConfig(num_items=12_101), rngs=nnx.Rngs(0))
    loss = next_item_loss(model, history, target, key=key)
    collaborative = model.item_embeddings()  # frozen, for other tokenizers

Here it makes the collaborative half of item tokenizers such as `setrec`: one
vector an item, of who chose it and nothing of what it is.

Source: Kang and McAuley, 2018, "Self-Attentive Sequential Recommendation":
causal attention over item embeddings and learned positions, the same
embeddings to score with, width 64 and 2 layers as in the code of SETRec. Ours:
the loss is the cross-entropy over all items instead of one sampled negative;
the blocks are those of `tokjax.tokenizers.transformer` (norms before, GELU);
dropout at the embeddings only.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from tokjax import checks
from tokjax.ops import attention_masks
from tokjax.ops.rows import take_rows
from tokjax.tokenizers.measures import masked_mean
from tokjax.tokenizers.transformer import Transformer, TransformerConfig, table
from tokjax.typing import Array, Bool, Float, Int, Key

__all__ = ["Sasrec", "SasrecConfig", "next_item_loss"]


@dataclasses.dataclass(unsafe_hash=True)
class SasrecConfig:
  """The model and its catalogue."""

  num_items: int  # m
  width: int = 64  # D
  num_layers: int = 2
  num_heads: int = 2
  history: int = 50  # N, items read
  mlp_ratio: float = 1.0  # as published
  dropout_rate: float = 0.2  # of the embeddings, where a key is given

  def build(self, rngs: nnx.Rngs) -> "Sasrec":
    """The model of these settings."""
    return Sasrec(self, rngs=rngs)


class Sasrec(nnx.Module):
  """Hidden states that point at the embedding of the next item.

  Attributes:
    config: its settings.
    items: the embeddings, [m, D].
    positions: [N, D], the last row for the latest item.
    transformer: causal.

  Args:
    config: settings.
    rngs: source of the first parameters.

  Raises:
    ValueError: for sizes out of range.

  Example:
    >>> config = SasrecConfig(9, width=8, num_layers=1, history=4)
    >>> model = jax.jit(lambda: Sasrec(config, rngs=nnx.Rngs(0)))()
    >>> jax.jit(model)(jnp.array([[-1, -1, 3, 7]])).shape
    (1, 4, 8)
  """

  def __init__(self, config: SasrecConfig, *, rngs: nnx.Rngs):
    checks.in_range(1, 1 << 30, num_items=config.num_items)
    checks.in_range(1, 1 << 20, history=config.history)
    checks.in_range(0, 0.99, dropout_rate=config.dropout_rate)
    self.config = config
    self.items = table(config.num_items, config.width, rngs)
    self.positions = table(config.history, config.width, rngs)
    self.transformer = Transformer(
      TransformerConfig(
        config.width,
        config.num_layers,
        config.num_heads,
        mlp_ratio=config.mlp_ratio,
      ),
      rngs=rngs,
    )
    self.dropout = nnx.Dropout(config.dropout_rate)

  def __call__(
    self, history: Int[Array, "B N"], *, key: Key[Array, ""] | None = None
  ) -> Float[Array, "B N D"]:
    """What follows each item of the history.

    Args:
      history: items, oldest first, -1 in front of short ones.
      key: for dropout; None drops nothing.

    Returns:
      Hidden states, whose inner products with `items` are the scores.

    Raises:
      ValueError: for another length than that of the config.
    """
    checks.same_size(
      history=history.shape[1], history_of_config=self.config.history
    )
    x = take_rows(self.items[...], history) + self.positions[...][None]
    x = self.dropout(x, deterministic=key is None, rngs=key)
    mask = jnp.asarray(attention_masks.causal(history.shape[1]))[None]
    mask = mask & (history >= 0)[:, None]
    return self.transformer(x, mask=mask)

  def item_embeddings(
    self, known: Bool[Array, " m"] | None = None
  ) -> Float[Array, "m D"]:
    """The embeddings without a gradient, as other tokenizers take them.

    Args:
      known: True where an item was in the training; the others get zeros, as
        nothing was learned of them. None: all.
    """
    items = jax.lax.stop_gradient(self.items[...])
    return items if known is None else jnp.where(known[:, None], items, 0)


def next_item_loss(
  model: Sasrec,
  history: Int[Array, "B N"],
  target: Int[Array, "B N"],
  known: Bool[Array, " m"] | None = None,
  *,
  key: Key[Array, ""] | None = None,
) -> Float[Array, ""]:
  """Cross-entropy of the next items among all, over all places of histories.

  Args:
    model: of the catalogue.
    history: items, -1 in front, as `tokjax.data.interactions.next_items`.
    target: what follows each; -1 does not count.
    known: True where an item may be the answer; None: all.
    key: for dropout.

  Returns:
    A float32 mean.

  Example:
    >>> config = SasrecConfig(9, width=8, num_layers=1, history=2)
    >>> model = jax.jit(lambda: Sasrec(config, rngs=nnx.Rngs(0)))()
    >>> history, target = jnp.array([[-1, 3]]), jnp.array([[-1, 7]])
    >>> jax.jit(next_item_loss)(model, history, target).shape
    ()

  Cost: 6 B N m D FLOPs for the scores with their gradient; they take 4 B N m
  bytes.
  """
  scores = jnp.matmul(
    model(history, key=key),
    model.items[...].T,
    preferred_element_type=jnp.float32,
  )
  if known is not None:
    scores = jnp.where(known[None, None], scores, -jnp.inf)
  place = jnp.maximum(target, 0)[..., None]
  picked = jnp.take_along_axis(scores, place, axis=-1)[..., 0]
  mask = target >= 0
  # A place that is no target may point at an item that is not known.
  picked = jnp.where(mask, picked, 0)
  return masked_mean(jax.nn.logsumexp(scores, axis=-1) - picked, mask)

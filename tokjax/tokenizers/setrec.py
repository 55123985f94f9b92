"""SETRec: an item is a set of vectors, and all of the next one come at once.

    config = SetRecConfig(cf_dim=64, feature_dim=384, num_semantic=4)
    model = config.build(nnx.Rngs(0))
    catalogue = model.catalogue(cf, features)           # [n, m, D]
    answers = model(model.histories(catalogue, history), history >= 0)
    weights = set_weights(config, 0.5)
    found = item_sets.set_top_k(answers, catalogue, weights, k=10)

The set holds one collaborative token (a linear map of a frozen embedding of
`sasrec`) and `num_semantic` tokens of an auto-encoder of frozen features of
the item's text. The order within a set means nothing: all its tokens share a
position and none reads another. Learned queries, one for each slot, stand
behind the history and are answered in one pass, without beams or codes.

Source: Lin et al., 2025, "Order-agnostic Identifier for Large Language
Model-based Generative Recommendation", and its code: the tokenizers,
positions, sparse mask, queries, grounding by inner products, loss. Different
here: a small transformer trained from nothing stands for the language model,
with learned vectors (`num_instruction`, `num_response`) for the texts around
the history and a table for positions. `set_positions` and `set_mask` cover
the encoder-decoder form too; the model is decoder-only. In published code the
T5 decoder's mask is added as 1 and 0, so that queries do read each other,
and beta is chosen on the test set: neither is repeated.
"""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from tokjax import checks
from tokjax.ops import item_sets
from tokjax.ops.rows import take_rows
from tokjax.tokenizers.measures import masked_mean
from tokjax.tokenizers.transformer import Transformer, TransformerConfig, table
from tokjax.typing import Array, Bool, Float, Int

__all__ = [
  "SetLosses",
  "SetRec",
  "SetRecConfig",
  "set_weights",
]


@dataclasses.dataclass(unsafe_hash=True)
class SetRecConfig:
  """Tokens of items and the transformer that reads them."""

  cf_dim: int = 64  # width of collaborative embeddings; 0: no such token
  feature_dim: int = 384  # F, width of the features of a text
  num_semantic: int = 4  # semantic tokens of an item; 4 with T5, 6 with Qwen
  hidden: tuple[int, ...] = (512, 256, 128)  # of the encoder; decoder mirrored
  width: int = 64  # D
  num_layers: int = 2
  num_heads: int = 2
  mlp_ratio: float = 4.0
  history: int = 50  # items read
  num_instruction: int = 1  # learned vectors for the text before (ours)
  num_response: int = 1  # and behind the history (ours)
  reconstruction_weight: float = 0.7  # alpha; .7 on Toys with T5

  @property
  def set_size(self) -> int:
    """Tokens of an item, n; as many queries."""
    return (self.cf_dim > 0) + self.num_semantic

  def build(self, rngs: nnx.Rngs) -> "SetRec":
    """The model of these settings."""
    return SetRec(self, rngs=rngs)


def set_weights(config: SetRecConfig, beta: float) -> Float[Array, " n"]:
  """Weights of the slots: 1 - beta collaborative, beta each semantic.

  Args:
    config: which slots there are; one kind alone weighs 1.
    beta: 0..1, chosen on validation data.

  Example:
    >>> set_weights(SetRecConfig(num_semantic=2), 0.25).tolist()
    [0.75, 0.25, 0.25]
  """
  checks.in_range(0, 1, beta=beta)
  if not config.cf_dim or not config.num_semantic:
    return jnp.ones(config.set_size)
  return jnp.array([1 - beta] + [beta] * config.num_semantic, jnp.float32)


class SetLosses(NamedTuple):
  """Parts of the loss, already weighted: their sum is trained.

  Attributes:
    ranking: see `item_sets.set_loss`.
    reconstruction: of the features of history items, mean over occurrences.
  """

  ranking: Float[Array, ""]
  reconstruction: Float[Array, ""]


class SetRec(nnx.Module):
  """The tokenizers of items and the transformer over sets.

  Attributes:
    config: its settings.
    cf: linear map of collaborative embeddings, or None.
    encoder: linear layers from features to semantic tokens.
    decoder: and back.
    texts: learned vectors before and behind the history.
    queries: one for each slot.
    positions: one row for each position.
    transformer: reads under `item_sets.set_mask`.

  Args:
    config: settings.
    rngs: source of the first parameters.

  Raises:
    ValueError: for settings that leave no token or are out of range.

  Example:
    >>> config = SetRecConfig(cf_dim=3, feature_dim=5, num_semantic=2,
    ...                       hidden=(4,), width=8, num_layers=1, history=2)
    >>> model = jax.jit(lambda: config.build(nnx.Rngs(0)))()
    >>> catalogue = model.catalogue(jnp.ones((6, 3)), jnp.ones((6, 5)))
    >>> history = jnp.array([[-1, 4]])
    >>> tokens = model.histories(catalogue, history)
    >>> jax.jit(model)(tokens, history >= 0).shape
    (3, 1, 8)
  """

  def __init__(self, config: SetRecConfig, *, rngs: nnx.Rngs):
    _check(config)
    self.config = config
    width, size = config.width, config.set_size
    map_cf = functools.partial(nnx.Linear, config.cf_dim, width, rngs=rngs)
    self.cf = map_cf() if config.cf_dim else None
    ends = config.num_semantic * width
    widths = (config.feature_dim, *config.hidden, ends)
    if not config.num_semantic:
      widths = ()
    self.encoder = _layers(widths, rngs)
    self.decoder = _layers(widths[::-1], rngs)

    def learned(rows):
      draw = jax.random.normal(rngs.params(), (rows, width))
      return nnx.Param(0.02 * draw)

    self.texts = learned(config.num_instruction + config.num_response)
    self.queries = learned(size)
    self.positions = table(
      int(item_sets.set_positions(**self._sizes).max()) + 1, width, rngs
    )
    self.transformer = Transformer(
      TransformerConfig(
        width, config.num_layers, config.num_heads, mlp_ratio=config.mlp_ratio
      ),
      rngs=rngs,
    )

  def tokens(
    self,
    cf: Float[Array, "*items C"] | None,
    features: Float[Array, "*items F"] | None,
  ) -> Float[Array, "*items n D"]:
    """The set of each item, the collaborative token first.

    Args:
      cf: frozen collaborative embeddings; None without that token.
      features: frozen features; None without semantic tokens.

    Raises:
      ValueError: if one is missing.
    """
    parts = []
    if self.cf is not None:
      _given(cf=cf)
      parts.append(self.cf(cf)[..., None, :])
    if self.config.num_semantic:
      _given(features=features)
      latent = _through(self.encoder, features)
      parts.append(latent.reshape(*latent.shape[:-1], -1, self.config.width))
    return jnp.concatenate(parts, axis=-2)

  def catalogue(
    self, cf: Float[Array, "m C"] | None, features: Float[Array, "m F"] | None
  ) -> Float[Array, "n m D"]:
    """The sets of all items by slot, as scores take them."""
    return self.tokens(cf, features).swapaxes(0, 1)

  def histories(
    self, catalogue: Float[Array, "n m D"], history: Int[Array, "B H"]
  ) -> Float[Array, "B H n D"]:
    """The sets of the items of histories; zeros for -1."""
    return jax.vmap(take_rows, (0, None), 2)(catalogue, history)

  def __call__(
    self, tokens: Float[Array, "B H n D"], mask: Bool[Array, "B H"]
  ) -> Float[Array, "n B D"]:
    """What the queries become, all slots of the next item in one pass.

    Args:
      tokens: sets of the history, oldest first, the latest at the end.
      mask: True where there is an item.

    Raises:
      ValueError: for another history or set size than that of the config.
    """
    config, sizes = self.config, self._sizes
    checks.same_size(tokens=tokens.shape[1], history=config.history)
    checks.same_size(tokens_of_item=tokens.shape[2], slots=config.set_size)
    batch = tokens.shape[0]
    tokens = jnp.where(mask[..., None, None], tokens, 0)
    parts = jnp.split(self.texts[...], [config.num_instruction])
    around = [*parts, self.queries[...]]
    # Made from the tokens, they are sharded alike.
    like = tokens[:, :1, 0] * 0  # [B, 1, D]
    before, behind, queries = (
      like + x[None].astype(like.dtype) for x in around
    )
    flat = tokens.reshape(batch, -1, config.width)
    x = jnp.concatenate([before, flat, behind, queries], axis=1)
    positions = self.positions[...][item_sets.set_positions(**sizes)]
    x = x + positions[None].astype(x.dtype)
    real = jnp.broadcast_to(mask[..., None], (*mask.shape, config.set_size))
    real = real.reshape(batch, -1)
    real = jnp.pad(
      real,
      ((0, 0), (before.shape[1], behind.shape[1] + queries.shape[1])),
      constant_values=True,
    )
    allowed = jnp.asarray(item_sets.set_mask(**sizes))[None] & real[:, None]
    x = self.transformer(x, mask=allowed)
    return x[:, -config.set_size :].swapaxes(0, 1)

  def losses(
    self,
    cf: Float[Array, "m C"] | None,
    features: Float[Array, "m F"] | None,
    history: Int[Array, "B H"],
    target: Int[Array, " B"],
    mask: Bool[Array, " m"] | None = None,
  ) -> SetLosses:
    """What is trained; all items are tokenized anew, with their gradient.

    Args:
      cf: frozen collaborative embeddings of all items, or None.
      features: frozen features of all items, or None.
      history: items, -1 in front.
      target: what came next.
      mask: True where an item may be the answer; None: all.
    """
    catalogue = self.catalogue(cf, features)
    answers = self(self.histories(catalogue, history), history >= 0)
    ranking = item_sets.set_loss(answers, catalogue, target, mask)
    if not self.config.num_semantic:
      return SetLosses(ranking, jnp.zeros_like(ranking))
    first = self.config.set_size - self.config.num_semantic
    semantic = catalogue[first:].swapaxes(0, 1)
    rebuilt = _through(self.decoder, semantic.reshape(semantic.shape[0], -1))
    error = rebuilt.astype(jnp.float32) - features.astype(jnp.float32)
    error = jnp.mean(jnp.square(error), axis=-1)  # [m]
    error = take_rows(error[:, None], history)[..., 0]
    loss = masked_mean(error, history >= 0)
    return SetLosses(ranking, self.config.reconstruction_weight * loss)

  @property
  def _sizes(self):
    config = self.config
    return {
      "num_instruction": config.num_instruction,
      "num_items": config.history,
      "set_size": config.set_size,
      "num_response": config.num_response,
      "num_queries": config.set_size,
    }


def _layers(widths, rngs):
  init = nnx.initializers.xavier_normal()
  return nnx.List(
    nnx.Linear(inputs, outputs, kernel_init=init, rngs=rngs)
    for inputs, outputs in itertools.pairwise(widths)
  )


def _through(layers, x):
  """Linear layers with ReLU between."""
  for number, layer in enumerate(layers):
    x = layer(jax.nn.relu(x) if number else x)
  return x


def _given(**inputs):
  for name, value in inputs.items():
    if value is None:
      raise ValueError(f"{name} must be given for its tokens, got None")


def _check(config):
  checks.in_range(0, 1 << 20, cf_dim=config.cf_dim)
  checks.in_range(0, 1 << 10, num_semantic=config.num_semantic)
  checks.in_range(1, 1 << 20, history=config.history)
  checks.in_range(
    0, float("inf"), reconstruction_weight=config.reconstruction_weight
  )
  if config.num_semantic:
    checks.in_range(1, 1 << 20, feature_dim=config.feature_dim)
  if not config.set_size:
    raise ValueError("num_semantic must be positive without cf_dim, got 0")

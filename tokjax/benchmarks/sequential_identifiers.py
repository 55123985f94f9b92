"""Items as sequences of codes, emitted one after the other: the baseline.

What SETRec is compared with: the codes of an item are residual k-means of its
features and a last one that tells items of equal codes apart; the same
transformer reads the codes of a history and emits those of the next item, each
after the ones before it, by a beam over the codes that items have. Keys and
values of the history and of the beams are kept, not computed again.

Source: Rajput et al., 2023, "Recommender Systems with Generative Retrieval"
(TIGER). Ours: k-means instead of a trained RQ-VAE, a decoder-only transformer
of the sizes of SETRec, no user token.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokjax.ops import attention, attention_masks
from tokjax.ops.rows import take_rows
from tokjax.tokenizers.codebook import CodebookConfig
from tokjax.tokenizers.residual_quantizer import ResidualQuantizer, RVQConfig
from tokjax.tokenizers.transformer import Transformer, TransformerConfig, table
from tokjax.typing import Array, Float, Int

__all__ = ["Sequential", "SequentialConfig", "Trie", "item_codes", "trie"]


@dataclasses.dataclass(unsafe_hash=True)
class SequentialConfig:
  """The transformer over codes."""

  num_codes: int  # of each place
  num_places: int  # codes of an item, n
  width: int = 64
  num_layers: int = 2
  num_heads: int = 2
  history: int = 50  # items read

  def build(self, rngs: nnx.Rngs) -> "Sequential":
    """The model of these settings."""
    return Sequential(self, rngs=rngs)


class Trie(NamedTuple):
  """Which codes may follow which.

  Attributes:
    child: [nodes, K], the node behind each code, -1 where no item goes on;
      node 0 is the root.
    item: [nodes], the item of a leaf, -1 elsewhere.
  """

  child: Int[Array, "nodes K"]
  item: Int[Array, " nodes"]


def item_codes(
  features: np.ndarray, *, num_codes: int, num_places: int, seed: int = 0
) -> np.ndarray:
  """Residual k-means, and a last code that counts items of equal codes.

  Args:
    features: [m, F].
    num_codes: K, of each table.
    num_places: n; n - 1 tables.
    seed: of the k-means.

  Returns:
    int32 [m, n], no two rows equal. The last may exceed K.
  """
  book = CodebookConfig(num_codes, features.shape[1], learning="ema")
  quantizer = ResidualQuantizer(
    RVQConfig(book, num_places - 1), rngs=nnx.Rngs(seed)
  )
  x = jnp.asarray(features)
  state = quantizer.init_from_data(jax.random.key(seed), x)
  found, _ = jax.jit(quantizer)(x, state)
  codes = np.asarray(found.indices)
  seen, last = {}, []
  for row in map(tuple, codes.tolist()):
    seen[row] = seen.get(row, -1) + 1
    last.append(seen[row])
  return np.concatenate([codes, np.array(last)[:, None]], 1).astype(np.int32)


def trie(codes: np.ndarray, mask: np.ndarray, *, num_codes: int) -> Trie:
  """The codes of the items that may be found.

  Args:
    codes: [m, n].
    mask: bool [m], which may be found.
    num_codes: of each place.
  """
  nodes = {(): 0}
  edges, leaves = [], []
  for item in np.flatnonzero(mask).tolist():
    path = tuple(codes[item].tolist())
    for end in range(1, len(path) + 1):
      if path[:end] not in nodes:
        nodes[path[:end]] = len(nodes)
        edges.append((nodes[path[: end - 1]], path[end - 1], nodes[path[:end]]))
    leaves.append((nodes[path], item))
  child = np.full((len(nodes), num_codes), -1, np.int32)
  item = np.full(len(nodes), -1, np.int32)
  for node, code, below in edges:
    child[node, code] = below
  for node, one in leaves:
    item[node] = one
  return Trie(jnp.asarray(child), jnp.asarray(item))


class Sequential(nnx.Module):
  """Reads codes, emits codes.

  Attributes:
    config: its settings.
    codes: embeddings, [n K, D].
    start: what the first code is emitted after.
    positions: of the history and the codes of the answer.
    transformer: causal.
    out: [n, D, K].

  Args:
    config: settings.
    rngs: source of the first parameters.
  """

  def __init__(self, config: SequentialConfig, *, rngs: nnx.Rngs):
    self.config = config
    places, width = config.num_places, config.width
    self.codes = table(places * config.num_codes, width, rngs)
    self.start = table(1, width, rngs)
    self.positions = table((config.history + 1) * places, width, rngs)
    self.transformer = Transformer(
      TransformerConfig(width, config.num_layers, config.num_heads), rngs=rngs
    )
    draw = jax.random.normal(rngs.params(), (places, width, config.num_codes))
    self.out = nnx.Param(0.02 * draw)

  def loss(
    self,
    codes: Int[Array, "m n"],
    history: Int[Array, "B H"],
    target: Int[Array, " B"],
  ) -> Float[Array, ""]:
    """Mean cross-entropy of the codes of the target, each after the others.

    Args:
      codes: of all items.
      history: items, -1 in front.
      target: the next item.
    """
    answer = codes[target]  # [B, n]
    before = self._embed(answer)[:, :-1]
    x = jnp.concatenate([self._history(codes, history), before], axis=1)
    start = jnp.broadcast_to(self.start[...][None], (len(x), 1, x.shape[-1]))
    cut = history.shape[1] * self.config.num_places
    x = jnp.concatenate([x[:, :cut], start, x[:, cut:]], axis=1)
    x = x + self.positions[...][None, : x.shape[1]]
    real = jnp.repeat(history >= 0, self.config.num_places, axis=1)
    real = jnp.pad(
      real, ((0, 0), (0, before.shape[1] + 1)), constant_values=True
    )
    mask = jnp.asarray(attention_masks.causal(x.shape[1]))[None] & real[:, None]
    y = self.transformer(x, mask=mask)[:, cut:]
    logits = jnp.einsum(
      "bnd,ndk->bnk", y, self.out[...], preferred_element_type=jnp.float32
    )
    gold = jnp.take_along_axis(logits, answer[..., None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - gold)

  def generate(
    self,
    codes: Int[Array, "m n"],
    history: Int[Array, "B H"],
    tree: Trie,
    *,
    beam_size: int,
  ) -> Int[Array, "B W"]:
    """The items of the best beams, n passes one after the other.

    Args:
      codes: of all items.
      history: items, -1 in front.
      tree: of the items that may be found.
      beam_size: W.

    Returns:
      Items, best first, -1 where a beam found none.
    """
    places, width = self.config.num_places, self.config.width
    batch, size = history.shape[0], beam_size
    x = self._history(codes, history)
    length = x.shape[1]
    x = x + self.positions[...][None, :length]
    real = jnp.repeat(history >= 0, places, axis=1)  # [B, T]
    mask = jnp.asarray(attention_masks.causal(length))[None] & real[:, None]
    _, past = self._pass(x, None, mask)
    layers = self.config.num_layers
    beams = jnp.zeros((layers, 2, batch, size, places, width))
    score = jnp.where(jnp.arange(size) == 0, 0.0, -jnp.inf)
    score = jnp.broadcast_to(score[None], (batch, size))
    node = jnp.zeros((batch, size), jnp.int32)
    new = jnp.broadcast_to(self.start[...][None], (batch, size, width))
    own = jnp.eye(size, dtype=bool)
    for place in range(places):
      new = new + self.positions[...][length + place][None, None]
      mask = own[:, :, None] & (jnp.arange(places) < place)[None, None]
      mask = mask.reshape(size, -1)
      mask = jnp.concatenate([mask, own], axis=1)  # beams so far, and itself
      mask = jnp.broadcast_to(mask[None], (batch, *mask.shape))
      seen = jnp.broadcast_to(real[:, None], (batch, size, length))
      mask = jnp.concatenate([seen, mask], axis=2)
      flat = beams.reshape(layers, 2, batch, -1, width)
      y, fresh = self._pass(new, jnp.concatenate([past, flat], axis=3), mask)
      beams = beams.at[:, :, :, :, place].set(fresh)
      logits = self.transformer.norm(y) @ self.out[...][place]
      below = tree.child[node]  # [B, W, K]
      total = score[..., None] + jax.nn.log_softmax(logits, axis=-1)
      total = jnp.where(below >= 0, total, -jnp.inf).reshape(batch, -1)
      score, best = jax.lax.top_k(total, size)
      parent, code = jnp.divmod(best, self.config.num_codes)
      node = jnp.take_along_axis(below.reshape(batch, -1), best, axis=1)
      node = jnp.where(score > -jnp.inf, node, 0)
      index = parent[None, None, :, :, None, None]
      beams = jnp.take_along_axis(beams, index, axis=3)
      new = self._embed(code[..., None], place)[..., 0, :]
    return jnp.where(score > -jnp.inf, tree.item[node], -1)

  def _pass(self, x, past, mask):
    """New tokens through all blocks; keys and values of old ones are given."""
    heads = self.config.num_heads

    def split(y):
      return y.reshape(*y.shape[:2], heads, -1).swapaxes(1, 2)

    def step(x, each):
      block, old = each
      y = block.norm_attention(x)
      reads = block.attention
      fresh = jnp.stack([reads.key(y), reads.value(y)])
      both = fresh if old is None else jnp.concatenate([old, fresh], axis=2)
      mixed = attention.attend(
        split(reads.query(y)), split(both[0]), split(both[1]), mask
      )
      mixed = mixed.swapaxes(1, 2).reshape(x.shape)
      x = x + reads.out(mixed)
      return x + block.mlp(block.norm_mlp(x)), fresh

    return jax.lax.scan(step, x, (self.transformer.blocks, past))

  def _embed(self, codes, place=0):
    """[..., n] codes of the places from `place` on -> [..., n, D]."""
    shift = (place + jnp.arange(codes.shape[-1])) * self.config.num_codes
    return take_rows(
      self.codes[...], codes + jnp.broadcast_to(shift, codes.shape)
    )

  def _history(self, codes, history):
    """[B, H] items -> [B, H n, D]; any codes where there is no item."""
    found = self._embed(codes[jnp.maximum(history, 0)])
    return found.reshape(history.shape[0], -1, found.shape[-1])

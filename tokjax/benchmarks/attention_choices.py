"""Which pairs of causal attention to read: choices that others make.

Each is a function of blocks of rows; `recall_of` says which share of the mass
of attention falls on the pairs that it reads.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from tokjax.typing import Array, Bool, Float, Int, Key

__all__ = [
  "block_top_k",
  "made_heads",
  "recall_of",
  "setting_of",
  "streaming",
  "vertical_slash",
]

# From the number of a block of rows, which of its pairs are read: bool[b, N].
Choice = Callable[[Int[Array, ""]], Bool[Array, "b N"]]
# Of the pairs of causal attention, about; may be traced.
Share = float | Float[Array, ""]


def made_heads(
  key: Key[Array, ""], num_tokens: int, width: int, num_heads: int
) -> list[Float[Array, "1 H N d"]]:
  """Queries, keys and values of one sequence."""
  parts = jax.random.split(key, 6)
  shape = 1, num_heads, num_tokens, width
  q, k, v, topic = (jax.random.normal(part, shape) for part in parts[:4])
  sums = jnp.cumsum(topic, axis=2)
  near = (sums - jnp.roll(sums, 64, axis=2)) / 8  # of the last 64 tokens
  near = near.at[:, :, :64].set(topic[:, :, :64])
  everybody = jax.random.normal(parts[4], (1, num_heads, 1, width))
  heavy = jax.random.bernoulli(parts[5], 0.01, (*shape[:3], 1))
  heavy = heavy.at[:, :, 0].set(True)  # the sink
  return [q + near + everybody, k + near + heavy * everybody, v]


def streaming(kept: Share, num_tokens: int, block: int) -> Choice:
  """The first block and the last keys (StreamingLLM)."""
  width = jnp.round(num_tokens * (1 - (1 - kept) ** 0.5)) - block
  width = jnp.maximum(width, 1)

  def choose(i):
    row = (i * block + jnp.arange(block))[:, None]
    key = jnp.arange(num_tokens)[None]
    return (key < block) | (key > row - width)

  return choose


def block_top_k(
  q: Float[Array, "N d"], k: Float[Array, "N d"], kept: Share, block: int
) -> Choice:
  """Blocks of keys whose mean is nearest to that of the rows."""
  q, k = (jnp.mean(x.reshape(-1, block, x.shape[1]), axis=1) for x in (q, k))
  scores = jnp.matmul(q, k.T, precision="highest")
  number = jnp.arange(scores.shape[0])
  scores = jnp.where(number[None] < number[:, None], scores, -jnp.inf)
  scores = jnp.where(number[None] == number[:, None], jnp.inf, scores)
  rank = jnp.argsort(jnp.argsort(-scores, axis=1), axis=1)

  def choose(i):
    blocks = rank[i] < jnp.maximum(jnp.round(kept * (i + 1)), 1)
    return jnp.repeat(blocks, block)[None].repeat(block, axis=0)

  return choose


def vertical_slash(
  q: Float[Array, "N d"], k: Float[Array, "N d"], kept: Share, block: int
) -> Choice:
  """Columns and diagonals that the last 64 rows look at (MInference)."""
  num_tokens, width = q.shape
  row = num_tokens - 64 + jnp.arange(64)[:, None]
  back = row - jnp.arange(num_tokens)[None]  # how far behind the row
  logits = jnp.matmul(q[-64:], k.T, precision="highest") * width**-0.5
  weights = jax.nn.softmax(jnp.where(back >= 0, logits, -jnp.inf), axis=1)
  columns = jnp.sum(weights, axis=0)
  slashes = jnp.zeros_like(columns).at[back].add(weights, mode="drop")
  slashes = slashes.at[0].set(jnp.inf)  # every row reads itself
  number = jnp.maximum(jnp.round(kept / 2 * num_tokens), 1)
  columns, slashes = (
    jnp.argsort(jnp.argsort(-x)) < number for x in (columns, slashes)
  )

  def choose(i):
    row = (i * block + jnp.arange(block))[:, None]
    back = row - jnp.arange(num_tokens)[None]
    return columns[None] | slashes[jnp.maximum(back, 0)]

  return choose


def recall_of(
  choose: Choice, q: Float[Array, "N d"], k: Float[Array, "N d"], block: int
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """Mean share of the mass on the pairs chosen, and how many of them."""
  num_tokens, width = q.shape
  key = jnp.arange(num_tokens)[None]

  def rows(i):
    query = jax.lax.dynamic_slice_in_dim(q, i * block, block)
    causal = key <= (i * block + jnp.arange(block))[:, None]
    logits = jnp.matmul(query, k.T) * width**-0.5
    weights = jax.nn.softmax(jnp.where(causal, logits, -jnp.inf), axis=1)
    chosen = choose(i) & causal
    return jnp.sum(jnp.where(chosen, weights, 0)), jnp.sum(chosen)

  share, pairs = jax.lax.map(rows, jnp.arange(num_tokens // block))
  pairs = jnp.sum(pairs, dtype=jnp.float32)
  return (
    jnp.sum(share) / num_tokens,
    pairs / (num_tokens * (num_tokens + 1) / 2),
  )


def setting_of(
  pairs: Callable[[float], Float[Array, "..."]],
  kept: float,
  low: float,
  high: float,
  *,
  halvings: int,
) -> float:
  """The largest setting that reads no more than a share of the pairs.

  Args:
    pairs: the shares read at a setting, which grow with it.
    kept: what their mean may be.
    low: a setting that reads no more.
    high: one that may read more.
    halvings: of the range.
  """
  for _ in range(halvings):
    middle = (low + high) / 2
    above = float(jnp.mean(pairs(middle))) > kept
    low, high = (low, middle) if above else (middle, high)
  return low

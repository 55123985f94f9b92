"""AnchorAttention beside dense attention, and other choices at its sparsity.

python -m tokjax.benchmarks.sparse_attention

Times are those of plain XLA on this device. Recall is the share of the mass of
causal attention that falls on the pairs read, on made queries and keys: words
near each other are alike, and some keys are looked for by everybody.
"""

import argparse
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from tokjax.benchmarks import timing
from tokjax.ops import attention
from tokjax.sparse.anchor_attention import (
  AnchorConfig,
  anchor_attention,
  recall,
)
from tokjax.typing import Array, Bool, Float, Int, Key

__all__ = [
  "block_top_k",
  "dense_attention",
  "main",
  "made_heads",
  "recall_of",
  "run",
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


def dense_attention(
  q: Float[Array, "B H N d"],
  k: Float[Array, "B H N d"],
  v: Float[Array, "B H N e"],
  *,
  tile: int = 512,
) -> Float[Array, "B H N e"]:
  """Causal attention, a square of logits at a time up to the diagonal.

  Of the plain forms tried on CPU the fastest: half the time of whole rows of
  logits. The tile divides N.
  """

  def rows(i):
    def cut(x, j):
      return jax.lax.dynamic_slice_in_dim(x, j * tile, tile, axis=2)

    def add(j, state):
      row, key = (n * tile + jnp.arange(tile) for n in (i, j))
      mask = key[None] <= row[:, None]
      more = attention.attend_with_lse(cut(q, i), cut(k, j), cut(v, j), mask)
      return attention.merge(state, more)

    out = jnp.zeros_like(cut(v, 0), dtype=jnp.float32)
    state = attention.AttentionState(out, jnp.full_like(out[..., 0], -jnp.inf))
    return jax.lax.fori_loop(0, i + 1, add, state).out

  out = jax.lax.map(rows, jnp.arange(q.shape[2] // tile))
  return jnp.moveaxis(out, 0, 2).reshape(v.shape)


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


def run(
  *,
  num_tokens: int = 16384,
  num_heads: int = 1,
  width: int = 64,
  block: int = 128,
  step: int = 4,
  kept: Sequence[float] = (0.1, 0.2),
  repeats: int = 5,
):
  """Times both at each kept fraction, and compares the recall of choices.

  Args:
    num_tokens: N, a multiple of `block` and of 512.
    num_heads: H.
    width: d.
    block: of rows and keys.
    step: blocks in a group of rows.
    kept: fractions of the pairs of causal attention, what every row reads
      anyway among them.
    repeats: timed calls of each.

  Returns:
    Rows, see `timing.row`; those of the other choices have no times, and are
    of the first head.
  """
  q, k, v = made_heads(jax.random.key(0), num_tokens, width, num_heads)

  @jax.jit
  def anchored(theta):
    config = AnchorConfig(block, step, theta, num_tokens)
    return anchor_attention(q, k, v, config)

  fraction = jax.jit(lambda theta: jnp.mean(anchored(theta)[1].kept_fraction))
  thetas = {share: _threshold(fraction, share) for share in kept}
  dense = jax.jit(dense_attention)
  candidates = {"dense": lambda: dense(q, k, v)}
  for share, theta in thetas.items():
    candidates[f"anchor {share}"] = functools.partial(anchored, theta)
  times = timing.compare(candidates, repeats=repeats)
  shape = {"H": num_heads, "N": num_tokens, "d": width, "b": block, "s": step}
  row = functools.partial(timing.row, "sparse_attention")
  rows = [row("dense", shape, "float32", times["dense"], kept=1.0, recall=1.0)]
  share_of = jax.jit(lambda theta: recall(anchored(theta)[0].lse, q, k))
  for share, theta in thetas.items():
    taken = times[f"anchor {share}"]
    more = dict(
      theta=theta,
      kept=float(fraction(theta)),
      recall=float(jnp.mean(share_of(theta))),
      speedup=times["dense"]["median_s"] / taken["median_s"],
    )
    rows.append(row("anchor", shape, "float32", taken, **more))
    for name, choose in _choices(q[0, 0], k[0, 0], share, block).items():
      found = jax.jit(
        functools.partial(recall_of, choose, block=block)
      )(q[0, 0], k[0, 0])  # fmt: skip
      mass, pairs = map(float, found)
      rows.append(row(name, shape, "float32", {}, kept=pairs, recall=mass))
  return rows


def _choices(q, k, kept, block):
  return {
    "streaming": streaming(kept, q.shape[0], block),
    "block top-k": block_top_k(q, k, kept, block),
    "vertical-slash": vertical_slash(q, k, kept, block),
  }


def _threshold(fraction, kept):
  """The theta at which this share of the pairs is read, by bisection."""
  low, high = -20.0, 40.0
  for _ in range(14):
    middle = (low + high) / 2
    low, high = (low, middle) if fraction(middle) > kept else (middle, high)
  return low


def main(argv: list[str] | None = None) -> None:
  """Runs the comparison and prints its table.

  Args:
    argv: command line; None for the process's own.
  """
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--tokens", type=int, default=16384)
  parser.add_argument("--heads", type=int, default=1)
  parser.add_argument("--step", type=int, default=4)
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--out", help="file to append JSON lines to")
  options = parser.parse_args(argv)
  found = run(
    num_tokens=options.tokens,
    num_heads=options.heads,
    step=options.step,
    repeats=options.repeats,
  )
  columns = ["implementation", "kept", "recall", "theta", "median_s", "speedup"]
  timing.print_rows(found, columns)
  if options.out:
    timing.write_rows(found, options.out)


if __name__ == "__main__":
  main()

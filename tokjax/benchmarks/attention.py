"""Attention that leaves pairs out, beside dense attention.

tokjax bench attention

Under rules (causal, a window), and AnchorAttention at some shares of the pairs
with other choices of as many. Times are those of this device. Recall is the
share of the mass of causal attention that falls on the pairs read, on made
queries and keys: words near each other are alike, and some keys are looked for
by everybody.
"""

import argparse
import functools
from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from tokjax.benchmarks import attention_choices, timing
from tokjax.kernels.sparse_attention import rule_attention
from tokjax.ops import attention, mask_rules
from tokjax.sparse.anchor_attention import (
  AnchorConfig,
  anchor_attention,
  recall,
)
from tokjax.typing import Array, Float

__all__ = ["dense_attention", "main", "run"]

Dense = Literal["tiles", "cudnn", "xla"]


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


def run(
  *,
  num_tokens: int = 16384,
  num_heads: int = 1,
  width: int = 64,
  block: int = 128,
  step: int = 4,
  kept: Sequence[float] = (0.1, 0.2),
  window: int = 1024,
  dtype: str = "float32",
  dense: Dense = "tiles",
  repeats: int = 5,
):
  """Times all in turns, and compares the recall of choices.

  Args:
    num_tokens: N, a multiple of `block` and of 512.
    num_heads: H.
    width: d.
    block: of rows and keys.
    step: blocks in a group of rows.
    kept: fractions of the pairs of causal attention, what every row reads
      anyway among them.
    window: keys that a row reads under the rule of windows.
    dtype: of queries, keys and values.
    dense: what is compared with: `dense_attention`, the fastest plain form on
      CPU, or `jax.nn.dot_product_attention` by that name.
    repeats: timed calls of each.

  Returns:
    Rows, see `timing.row`; those of the other choices have no times, and are
    of the first head.
  """
  q, k, v = attention_choices.made_heads(
    jax.random.key(0), num_tokens, width, num_heads
  )
  q, k, v = (x.astype(dtype) for x in (q, k, v))

  @jax.jit
  def anchored(theta):
    config = AnchorConfig(block, step, theta, num_tokens)
    return anchor_attention(q, k, v, config)

  fraction = jax.jit(lambda theta: jnp.mean(anchored(theta)[1].kept_fraction))
  thetas = {
    share: attention_choices.setting_of(
      fraction, share, -20.0, 40.0, halvings=14
    )
    for share in kept
  }
  candidates = {"dense": functools.partial(_dense(dense), q, k, v)}
  for name, rule in (
    ("causal", mask_rules.causal),
    ("window", _window(window)),
  ):
    candidates[name] = functools.partial(_under(rule), q, k, v)
  for share, theta in thetas.items():
    candidates[f"anchor {share}"] = functools.partial(anchored, theta)
  times = timing.compare(candidates, repeats=repeats)
  shape = {"H": num_heads, "N": num_tokens, "d": width, "b": block, "s": step}
  pairs = num_tokens * (num_tokens + 1) / 2

  def row(name, taken, kept, **more):
    if taken:
      more["speedup"] = times["dense"]["median_s"] / taken["median_s"]
      flops = 4 * num_heads * width * pairs * kept
      more["tflops"] = flops / taken["median_s"] / 1e12
    return timing.row("attention", name, shape, dtype, taken, kept=kept, **more)

  within = window * (num_tokens - (window - 1) / 2) / pairs
  rows = [
    row(f"dense {dense}", times["dense"], 1.0, recall=1.0),
    row("rule causal", times["causal"], 1.0, recall=1.0),
    row(f"rule window {window}", times["window"], within),
  ]
  share_of = jax.jit(lambda theta: recall(anchored(theta)[0].lse, q, k))
  for share, theta in thetas.items():
    more = dict(theta=theta, recall=float(jnp.mean(share_of(theta))))
    taken = times[f"anchor {share}"]
    rows.append(row("anchor", taken, float(fraction(theta)), **more))
    for name, choose in _choices(q[0, 0], k[0, 0], share, block).items():
      mass, read = jax.jit(
        functools.partial(attention_choices.recall_of, choose, block=block)
      )(q[0, 0], k[0, 0])
      rows.append(row(name, {}, float(read), recall=float(mass)))
  return rows


def _dense(name):
  """Causal attention [B, H, N, d] by name, compiled."""
  if name == "tiles":
    return jax.jit(dense_attention)

  def fused(q, k, v):
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return jax.nn.dot_product_attention(
      q, k, v, is_causal=True, implementation=name
    )

  return jax.jit(fused)


def _window(window):
  return mask_rules.every(mask_rules.causal, mask_rules.local(window))


def _under(rule):
  @jax.jit
  def attend(q, k, v):
    return rule_attention(q, k, v, rule, mask_rules.tokens(q.shape[2])).out

  return attend


def _choices(q, k, kept, block):
  return {
    "streaming": attention_choices.streaming(kept, q.shape[0], block),
    "block top-k": attention_choices.block_top_k(q, k, kept, block),
    "vertical-slash": attention_choices.vertical_slash(q, k, kept, block),
  }


def main(argv: list[str] | None = None) -> None:
  """Runs the comparison and prints its table.

  Args:
    argv: command line; None for the process's own.
  """
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--tokens", type=int, default=16384)
  parser.add_argument("--heads", type=int, default=1)
  parser.add_argument("--step", type=int, default=4)
  parser.add_argument("--width", type=int, default=64)
  parser.add_argument("--window", type=int, default=1024)
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--dense", choices=get_args(Dense), default="tiles")
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--out", help="file to append JSON lines to")
  options = parser.parse_args(argv)
  found = run(
    num_tokens=options.tokens,
    num_heads=options.heads,
    step=options.step,
    width=options.width,
    window=options.window,
    dtype=options.dtype,
    dense=options.dense,
    repeats=options.repeats,
  )
  columns = ["implementation", "kept", "recall", "theta"]
  columns += ["median_s", "speedup", "tflops"]
  timing.print_rows(found, columns)
  if options.out:
    timing.write_rows(found, options.out)


if __name__ == "__main__":
  main()

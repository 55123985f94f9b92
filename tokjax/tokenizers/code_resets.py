"""Codes that nothing chooses any more, brought back to where vectors are.

Three ways, which `codebook.update` takes after a step, as functions of arrays:

- `from_batch`: a dead code becomes a random vector of the batch;
- `split_most_used`: it becomes half of the code in most use;
- `toward_anchors`: every code moves to the vector nearest to it, the further
  the less it is used.

Sources: the batch and its threshold, lucidrains/vector-quantize-pytorch; the
split, google-research/big_vision (UViM); anchors, Zheng and Vedaldi, 2023,
"Online Clustered Codebook", as in bytedance/1d-tokenizer. Ours: candidates are
the vectors of all devices, in one order, so that all draw the same; nothing
happens in a batch without vectors.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tokjax.kernels.nearest_code import nearest_code
from tokjax.ops import similarity
from tokjax.ops.rows import draw_rows
from tokjax.typing import Array, Bool, Float, Int, Key

__all__ = [
  "Anchored",
  "from_batch",
  "rows_of_all_devices",
  "split_most_used",
  "toward_anchors",
]


class Anchored(NamedTuple):
  """Codes after they moved to their anchors.

  Attributes:
    codes: the table.
    usage: moving share of the vectors that chose each code.
  """

  codes: Float[Array, "K d"]
  usage: Float[Array, " K"]


def from_batch(
  key: Key[Array, ""],
  counts: Float[Array, " K"],
  codes: Float[Array, "K d"],
  rows: Float[Array, "n d"],
  mask: Bool[Array, " n"],
  *,
  threshold: float | Float[Array, ""],
) -> tuple[Float[Array, " K"], Float[Array, "K d"]]:
  """Dead codes become vectors of the batch, with the count that just lives.

  Args:
    key: of the draw.
    counts: moving count of every code; dead is what lies below `threshold`.
    codes: the table.
    rows: vectors of the batch, whole on every device.
    mask: True where one counts.
    threshold: also the count of a code that comes back; with less it would
      die again at the next step.

  Returns:
    Counts and codes.

  Example:
    >>> codes, rows = jnp.zeros((2, 1)), jnp.array([[7.0]])
    >>> counts, codes = jax.jit(from_batch)(
    ...   jax.random.key(0), jnp.array([3.0, 0.5]), codes, rows,
    ...   jnp.array([True]), threshold=1.0)
    >>> counts.tolist(), codes.tolist()
    ([3.0, 1.0], [[0.0], [7.0]])
  """
  fresh = draw_rows(key, rows, mask, number=len(counts))
  dead = (counts < threshold) & jnp.any(mask)
  return (
    jnp.where(dead, threshold, counts),
    jnp.where(dead[:, None], fresh, codes),
  )


def split_most_used(
  key: Key[Array, ""],
  counts: Float[Array, " K"],
  sums: Float[Array, "K d"],
  *,
  threshold: float | Float[Array, ""],
  spread: float = 0.01,
) -> tuple[Float[Array, " K"], Float[Array, "K d"]]:
  """While a code is dead, the most used one gives it half of what it has.

  Args:
    key: of the factors that tell the halves apart.
    counts: moving count of every code; dead is what lies below `threshold`.
    sums: moving sum of the vectors of every code.
    threshold: no code is split to less than that.
    spread: the half given away is multiplied by 1 +- spread in each channel.

  Returns:
    Counts and sums.

  Example:
    >>> counts, sums = jax.jit(split_most_used)(
    ...   jax.random.key(0), jnp.array([8.0, 0.0]), jnp.array([[4.0], [0.0]]),
    ...   threshold=1.0)
    >>> counts.tolist(), sums.round(1).tolist()
    ([4.0, 4.0], [[2.0], [2.0]])
  """

  def dead(carry):
    counts, _, step = carry
    can = jnp.max(counts) >= 2 * threshold
    return (jnp.min(counts) < threshold) & can & (step < len(counts))

  def split(carry):
    counts, sums, step = carry
    most, least = jnp.argmax(counts), jnp.argmin(counts)
    factor = jax.random.uniform(
      jax.random.fold_in(key, step),
      sums.shape[1:],
      minval=1 - spread,
      maxval=1 + spread,
    )
    half, row = counts[most] / 2, sums[most] / 2
    counts = counts.at[most].set(half).at[least].set(half)
    sums = sums.at[most].set(row).at[least].set(row * factor)
    return counts, sums, step + 1

  counts, sums, _ = jax.lax.while_loop(
    dead, split, (counts, sums, jnp.int32(0))
  )
  return counts, sums


def toward_anchors(
  codes: Float[Array, "K d"],
  usage: Float[Array, " K"],
  hits: Float[Array, " K"] | Int[Array, " K"],
  rows: Float[Array, "n d"],
  mask: Bool[Array, " n"],
  *,
  decay: float = 0.99,
  cosine: bool = False,
) -> Anchored:
  """Every code moves to the vector nearest to it, the less it is used.

  With p the moving share of the vectors that chose a code and x the vector
  nearest to it, code = (1 - a) code + a x, where a = exp(-10 K p / (1 - decay)
  - 0.001): .999 for p = 0, and nothing at p = 1 / K. Starting from p = 0, the
  first steps move the whole table to the data.

  Costs 2 n K d FLOPs, as the search for the nearest codes does.

  Args:
    codes: the table, as it lies; of any length for "cosine", too.
    usage: p before the step.
    hits: vectors of the step that chose each code.
    rows: vectors of the batch, not normalised, whole on every device.
    mask: True where one counts.
    decay: of p, below 1.
    cosine: nearest by angle, not by distance. x is pasted as it is.

  Returns:
    The table and p after the step; without vectors both as they were.

  Example:
    >>> codes, rows = jnp.array([[0.0], [9.0]]), jnp.array([[1.0], [2.0]])
    >>> found = jax.jit(toward_anchors)(
    ...   codes, jnp.zeros(2), jnp.array([2.0, 0.0]), rows,
    ...   jnp.array([True, True]))
    >>> found.codes.round(2).tolist()
    [[0.0], [2.009999990463257]]
  """
  total = jnp.sum(hits)
  share = hits / jnp.maximum(total, 1)
  moved = decay * usage + (1 - decay) * share
  exponent = -10 * len(codes) * moved / (1 - decay) - 1e-3
  weight = jnp.where(total > 0, jnp.exp(exponent), 0)[:, None]
  # The search never picks what is not a number.
  choices = jnp.where(mask[:, None], rows, jnp.nan)
  query = codes
  if cosine:
    query, choices = map(similarity.safe_normalize, (codes, choices))
  nearest = rows[nearest_code(query, choices)]
  nearest = jnp.where(jnp.any(mask), nearest, codes)
  return Anchored(
    (1 - weight) * codes + weight * nearest, jnp.where(total > 0, moved, usage)
  )


def rows_of_all_devices(
  x: Float[Array, "*batch d"],
  mask: Bool[Array, "*batch"],
  axis_name: str | None = None,
) -> tuple[Float[Array, "n d"], Bool[Array, " n"]]:
  """The vectors of the whole batch, whole on every device, in order.

  Args:
    x: vectors.
    mask: True where one counts; the others become zero.
    axis_name: mesh axis over which a `shard_map` cuts the batch.

  Returns:
    float32 rows, and whether each counts.

  Example:
    >>> x, mask = jnp.array([[[1.0], [2.0]]]), jnp.array([[True, False]])
    >>> rows, valid = jax.jit(rows_of_all_devices)(x, mask)
    >>> rows.tolist(), valid.tolist()
    ([[1.0], [0.0]], [True, False])
  """
  rows = _whole(x).reshape(-1, x.shape[-1]).astype(jnp.float32)
  mask = _whole(mask).reshape(-1)
  rows = jnp.where(mask[:, None], rows, 0)
  if axis_name is None:
    return rows, mask
  size, place = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)

  def gather(x):  # as a sum, which is known to be the same everywhere
    whole = jnp.zeros((size, *x.shape), x.dtype).at[place].set(x)
    return jax.lax.psum(whole, axis_name).reshape(-1, *x.shape[1:])

  return gather(rows), gather(mask.astype(jnp.int32)) > 0


def _whole(x):
  """On every device, where an Explicit mesh has parts of it."""
  parts = any(axis is not None for axis in jax.typeof(x).sharding.spec)
  return jax.sharding.reshard(x, jax.P()) if parts else x

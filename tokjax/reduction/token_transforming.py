"""Token Transforming: every reduction is a matrix, and one that is full.

A reduction is Y = W X. Pruning, merging and pooling are matrices with at most
one entry in a column; the constructors here make them, so that they compose
(`tokjax.ops.plans.compose_plans`) and are undone (`Reduced.restore`) alike.
`token_transforming` lets a token go into several outputs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tokjax import checks
from tokjax.ops import merging, packing, plans, similarity
from tokjax.reduction import types
from tokjax.typing import Array, Bool, Float, Int32

__all__ = [
  "merging_transform",
  "pooling_transform",
  "pruning_transform",
  "recycling_transform",
  "token_transforming",
]


def token_transforming(
  features: Float[Array, "B N D"],
  metric: Float[Array, "B N d"],
  score: Float[Array, "B N"],
  mask: Bool[Array, "B N"] | None = None,
  size: Float[Array, "B N"] | None = None,
  *,
  num_keep: int,
  temperature: float | Float[Array, ""] = 0.1,
  num_protected: int = 0,
  num_sources: int | None = None,
  positions: str = "keep",
) -> types.Reduced:
  """Mixes all tokens into anchors, each by its similarity.

  Anchors are the `num_keep` tokens of the highest score. With c the cosine of
  metrics, s the sizes and t the temperature, over tokens j and anchors a:

      W[a, j] = s_j exp(c[a, j] / t) / (sum over j)  what an output is made of
      R[a, j] = exp(c[a, j] / t) / (sum over a)      where a token goes

  Y = W X, sizes are R s (their sum stays), `Reduced.restore` gives R^T Y. Add
  `tokjax.reduction.tome.size_bias` of the sizes to later attention.

  Args:
    features: tokens; gradients flow through all of them.
    metric: what decides how alike they are, such as keys averaged over heads;
      W and R pass a gradient to it.
    score: how informative a token is: the attention it receives, averaged
      over heads and queries, or [CLS]'s. No gradient flows.
    mask: True where a token counts; None for all.
    size: tokens that each one stands for; None for one. Give `size` of the
      reduction before.
    num_keep: K, static. Also with K = N tokens are mixed, unless t is small.
    temperature: t, may be traced. Towards 0 it gives a pruning, towards
      infinity each output is the mean of all.
    num_protected: the first tokens ([CLS], registers) are anchors that mix
      with nothing, static.
    num_sources: only so many of the nearest tokens go into an output, static;
      None for all. Sizes are shared as before.
    positions: "keep" (that of the anchor) or "renumber".

  Returns:
    The anchors in ascending order, with a `Transform`.

  Raises:
    ValueError: if counts are out of range, or sizes disagree.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> x = jnp.array([[[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-0.6, 0.8]]])
    >>> score = jnp.array([[0.25, 0.325, 0.3, 0.125]])
    >>> reduce = jax.jit(token_transforming, static_argnames="num_keep")
    >>> out = reduce(x, x, score, num_keep=2)
    >>> [round(v, 4) for v in out.tokens.tolist()[0][0]]
    [0.8107, 0.536]

  Cost: 2 K N (d + D) FLOPs, K N floats twice.

  Source: Zeng et al. (2025), "Token Transforming: A Unified and Training-Free
  Token Compression Framework for Vision Transformer Acceleration". The paper
  gives the algebra; no code is public, so this choice of W and R is inferred.
  """
  num_tokens = features.shape[1]
  checks.in_range(1, num_tokens, num_keep=num_keep)
  checks.in_range(0, num_keep, num_protected=num_protected)
  if num_sources is not None:
    checks.in_range(1, num_tokens, num_sources=num_sources)
  if mask is None:
    mask = jnp.ones_like(score, dtype=bool)
  if size is None:
    size = jnp.ones_like(score, dtype=jnp.float32)
  checks.same_size(
    features=num_tokens,
    metric=metric.shape[1],
    score=score.shape[1],
    mask=mask.shape[1],
    size=size.shape[1],
  )
  metric = jnp.where(mask[..., None], metric, 0).astype(jnp.float32)
  metric = similarity.safe_normalize(metric)
  place = jnp.cumsum(jnp.ones_like(mask, dtype=jnp.int32), axis=1) - 1
  protected = mask & (place < num_protected)
  score = jnp.where(protected, jnp.inf, score)
  kept = packing.keep_top_k(score, num_keep, mask)
  one = functools.partial(
    _matrices, temperature=temperature, num_sources=num_sources
  )
  plan = jax.vmap(one)(metric, mask, size, protected, place, kept)
  return types.fused(
    features, plan, kept.index, kept.mask, size=size, positions=positions
  )


def _matrices(
  metric, mask, size, protected, place, kept, *, temperature, num_sources
):
  """W and R of one example, [K, N]."""
  cosine = jnp.matmul(
    metric[kept.index],
    metric.T,
    precision="highest",
    preferred_element_type=jnp.float32,
  )
  logits = cosine / temperature
  mixes = kept.mask & ~protected[kept.index]
  allowed = mixes[:, None] & (mask & ~protected)[None, :]
  # A protected anchor is made of itself, and goes to itself only.
  itself = kept.index[:, None] == place[None, :]
  itself &= (kept.mask & protected[kept.index])[:, None]
  allowed |= itself
  share = _softmax(logits, allowed, axis=0)
  size = jnp.where(mask, size.astype(jnp.float32), 0)
  if num_sources is not None:
    nearest = jnp.where(allowed, jax.lax.stop_gradient(cosine), -jnp.inf)
    _, near = jax.lax.top_k(nearest, num_sources)
    chosen = jax.vmap(lambda row, at: row.at[at].set(True))(
      jnp.zeros_like(allowed), near
    )
    allowed &= chosen
  weight = _softmax(logits, allowed, axis=1, factor=size[None, :])
  return plans.Transform(weight, share)


def _softmax(logits, allowed, *, axis, factor=1.0):
  """Softmax of what is allowed, each term times a factor; else 0."""
  highest = jnp.max(
    jnp.where(allowed, jax.lax.stop_gradient(logits), -jnp.inf),
    axis=axis,
    keepdims=True,
  )
  highest = jnp.where(highest > -jnp.inf, highest, 0)
  terms = jnp.exp(jnp.where(allowed, logits - highest, 0)) * factor
  terms = jnp.where(allowed, terms, 0)
  total = jnp.sum(terms, axis=axis, keepdims=True)
  return terms / jnp.where(total > 0, total, 1)


def pruning_transform(
  kept: packing.Kept,
  num_tokens: int,
  weight: Float[Array, "*batch N"] | None = None,
) -> plans.Transform:
  """The matrix that keeps some tokens, and fuses the others if asked to.

  Args:
    kept: which stay, from `tokjax.ops.packing`.
    num_tokens: N, static.
    weight: attention of each token: one more row, last, is the sum of the
      dropped tokens times theirs. None for none. Give 0 to masked tokens.

  Returns:
    One row of zeros and a 1 per kept token, [*batch, K or K + 1, N].

  Raises:
    ValueError: if sizes disagree.

  Example:
    >>> import jax.numpy as jnp
    >>> from tokjax.ops import packing
    >>> kept = packing.keep_top_k(jnp.array([0.5, 0.1, 0.4]), 1)
    >>> weight = jnp.array([0.5, 0.25, 0.25])
    >>> pruning_transform(kept, 3, weight).weight.tolist()
    [[1.0, 0.0, 0.0], [0.0, 0.25, 0.25]]

  Source: Zeng et al. (2025); the fused row is that of Liang et al. (2022),
  "Not All Patches are What You Need: Expediting Vision Transformers via Token
  Reorganizations" (EViT).
  """
  place = jnp.where(kept.mask, kept.index, num_tokens)
  rows = jax.nn.one_hot(place, num_tokens, dtype=jnp.float32)
  if weight is None:
    return plans.Transform(rows, rows)
  checks.same_size(num_tokens=num_tokens, weight=weight.shape[-1])
  dropped = jnp.sum(rows, axis=-2) == 0
  last = jnp.where(dropped, weight.astype(jnp.float32), 0)[..., None, :]
  share = (last != 0).astype(jnp.float32)
  return plans.Transform(
    jnp.concatenate([rows, last], axis=-2),
    jnp.concatenate([rows, share], axis=-2),
  )


def merging_transform(
  slot: Int32[Array, "*batch N"],
  num_outputs: int,
  size: Float[Array, "*batch N"] | None = None,
) -> plans.Transform:
  """The matrix that replaces groups of tokens by their means.

  Args:
    slot: group of each token, such as a cluster; `num_outputs` to drop it.
    num_outputs: K, static.
    size: weight of each token in its mean; None for equal weights.

  Returns:
    [*batch, K, N]; rows of groups that have tokens sum to 1.

  Example:
    >>> import jax.numpy as jnp
    >>> merging_transform(jnp.array([0, 1, 0]), 2).weight.tolist()
    [[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]]

  Source: Zeng et al. (2025).
  """
  plan = merging.mean_plan(slot, num_outputs, size)
  return plans.to_transform(plan, num_outputs)


def pooling_transform(
  grid: tuple[int, int], window: tuple[int, int]
) -> plans.Transform:
  """The matrix that averages windows of a grid of tokens.

  Args:
    grid: rows and columns of the tokens, in raster order.
    window: rows and columns of a window; they divide the grid.

  Returns:
    [K, N] without batch axes.

  Raises:
    ValueError: if the windows do not fill the grid.

  Example:
    >>> pooling_transform((2, 4), (2, 2)).weight[0].tolist()
    [0.25, 0.25, 0.0, 0.0, 0.25, 0.25, 0.0, 0.0]

  Source: Zeng et al. (2025).
  """
  checks.divisible(window[0], grid_rows=grid[0])
  checks.divisible(window[1], grid_columns=grid[1])
  rows, columns = np.indices(grid) // np.reshape(window, (2, 1, 1))
  across = grid[1] // window[1]
  slot = jnp.asarray((rows * across + columns).ravel(), jnp.int32)
  return merging_transform(slot, grid[0] // window[0] * across)


def recycling_transform(
  kept: packing.Kept,
  cell: Int32[Array, "*batch N"],
  importance: Float[Array, "*batch N"],
  num_cells: int,
) -> plans.Transform:
  """The matrix that keeps some tokens and fuses the others by cell.

  A row for each cell of the image is the mean of the tokens in it that are not
  kept, weighted with their importance; it is zero where there are none.

  Args:
    kept: which stay, from `tokjax.ops.packing`.
    cell: cell of each token; `num_cells` where it is masked.
    importance: positive weights.
    num_cells: static.

  Returns:
    [*batch, K + num_cells, N]: kept tokens, then cells.

  Raises:
    ValueError: if sizes disagree.

  Example:
    >>> import jax.numpy as jnp
    >>> from tokjax.ops import packing
    >>> kept = packing.keep_top_k(jnp.array([0.9, 0.1, 0.3]), 1)
    >>> importance = jnp.array([0.5, 0.125, 0.375])
    >>> recycling_transform(
    ...     kept, jnp.array([0, 0, 0]), importance, 1).weight.tolist()
    [[1.0, 0.0, 0.0], [0.0, 0.25, 0.75]]

  Source: Zeng et al. (2025); the rule of the cells is that of VFlowOpt (2025).
  """
  checks.same_size(cell=cell.shape[-1], importance=importance.shape[-1])
  first = pruning_transform(kept, cell.shape[-1])
  taken = jnp.sum(first.weight, axis=-2) > 0
  rest = merging_transform(
    jnp.where(taken, num_cells, cell), num_cells, importance
  )
  return plans.Transform(
    jnp.concatenate([first.weight, rest.weight], axis=-2),
    jnp.concatenate([first.share, rest.share], axis=-2),
  )

"""GlobalCom^2: the thumbnail says how much of each crop is worth keeping.

High-resolution models see a picture twice: as a thumbnail, and cut into crops.
Attention of the thumbnail gives every crop its budget, and together with the
attention inside the crop chooses the tokens (`global_com_scores`).
"""

import functools
import math

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.ops import budgets, packing, ranking
from tokjax.reduction import global_com_scores, types
from tokjax.typing import Array, Bool, Float

__all__ = ["global_com"]


def global_com(
  thumbnail: Float[Array, "B N D"],
  crops: Float[Array, "B n N D"],
  thumbnail_scores: Float[Array, "B N"],
  crop_scores: Float[Array, "B n N"],
  mask: Bool[Array, "B n N"] | None = None,
  newline: Float[Array, " D"] | None = None,
  *,
  grid: tuple[int, int],
  keep_ratio: float = 0.25,
  temperature: float = 10.0,
  alpha: float = 0.5,
  compat: str | None = None,
  positions: str = "keep",
) -> types.Reduced:
  """Tokens of thumbnail and crops that go to the language model.

  The stream they are taken from is the thumbnail, then the canvas of all
  crops read row by row across crops, each row ending with a newline token if
  there is one. The thumbnail keeps its int(N R) best tokens; crop j keeps
  int(N_j r_j) of its N_j valid ones by `holistic_scores`, with r_j from
  `crop_budgets`; every newline of a row with valid tokens stays.

  Args:
    thumbnail: tokens of the thumbnail, a square, in raster order.
    crops: tokens of the crops, each a square of the same side; crops in raster
      order.
    thumbnail_scores: attention of [CLS] in the thumbnail, see
      `global_com_scores.class_scores`.
    crop_scores: the same in each crop.
    mask: True inside the picture, see
      `global_com_scores.unpadded_mask`; None for all.
    newline: feature of the token that ends a row of the canvas, or None.
    grid: rows and columns of crops, static; their product is n.
    keep_ratio: R, static, 0..1. .25 in the paper.
    temperature: tau of the budgets, 10 for logits.
    alpha: weight of the thumbnail in the scores of a token (paper: .5).
    compat: None, or "reference" for the published code: scores are added
      after scaling each to length one instead of by `alpha`, the thumbnail's
      tokens come in the order of their scores, and a single crop is kept
      whole.
    positions: "keep" (places in the stream) or "renumber".

  Returns:
    A selection from the stream. Budgets are rounded down and not handed on
    where they hit 1, so even R = 1 drops tokens of crops below the average.

  Raises:
    ValueError: if sizes disagree, tokens are no square, or a setting is out
      of range.

  Example:
    >>> import functools
    >>> import jax, jax.numpy as jnp
    >>> thumbnail, crops = jnp.ones((1, 16, 2)), jnp.ones((1, 4, 16, 2))
    >>> reduce = jax.jit(functools.partial(global_com, grid=(2, 2)))
    >>> out = reduce(thumbnail, crops, thumbnail[..., 0], crops[..., 0])
    >>> int(out.mask.sum())  # a quarter of 5 * 16
    20

  Cost: a few sums over the scores and one gather.

  Source: Liu et al. (2026), "Compression with Global Guidance: Towards
  Training-free High-Resolution MLLMs Acceleration". For video the average of
  the frames takes the place of the thumbnail and frames that of crops (paper).
  """
  checks.has_rank(3, thumbnail=thumbnail)
  checks.has_rank(4, crops=crops)
  checks.one_of((None, "reference"), compat=compat)
  checks.in_range(0, 1, keep_ratio=keep_ratio)
  checks.same_size(
    thumbnail_tokens=thumbnail.shape[1],
    crop_tokens=crops.shape[2],
    thumbnail_scores=thumbnail_scores.shape[1],
    crop_scores=crop_scores.shape[2],
  )
  checks.same_size(thumbnail_dim=thumbnail.shape[2], crop_dim=crops.shape[3])
  if mask is None:
    mask = jnp.ones_like(crops[..., 0], dtype=bool)
  checks.same_size(crops=crops.shape[1], mask_crops=mask.shape[1])
  checks.same_size(crop_tokens=crops.shape[2], mask_tokens=mask.shape[2])
  reference = compat == "reference"
  ratio = global_com_scores.crop_budgets(
    thumbnail_scores,
    grid=grid,
    keep_ratio=keep_ratio,
    temperature=temperature,
  )
  scores = global_com_scores.holistic_scores(
    crop_scores,
    thumbnail_scores,
    mask,
    grid=grid,
    alpha=None if reference else alpha,
  )
  num_crops, num_tokens = crops.shape[1:3]
  capacity = min(
    math.floor(num_crops * num_tokens * keep_ratio * (1 + 1e-5)),
    num_crops * num_tokens,
  )
  if reference and grid == (1, 1):
    ratio, capacity = jnp.ones_like(ratio), num_tokens
  one = functools.partial(
    _global_com,
    newline=newline,
    grid=grid,
    num_thumbnail=budgets.keep_count(keep_ratio, num_tokens, rounding="floor"),
    capacity=max(capacity, 1),
    by_score=reference,
    positions=positions,
  )
  return jax.vmap(one)(thumbnail, crops, thumbnail_scores, scores, ratio, mask)


def _global_com(
  thumbnail,
  crops,
  thumbnail_scores,
  scores,
  ratio,
  mask,
  *,
  newline,
  grid,
  num_thumbnail,
  capacity,
  by_score,
  positions,
):
  num_tokens, width = thumbnail.shape
  canvas_of = functools.partial(global_com_scores.canvas_of_crops, grid=grid)
  thumbnail_scores = jax.lax.stop_gradient(thumbnail_scores)
  order = ranking.ranks(thumbnail_scores)  # 0 for the best
  if by_score:
    first = jnp.argsort(order)[:num_thumbnail].astype(jnp.int32)
  else:
    first = packing.pack(order < num_thumbnail, num_thumbnail).index

  valid = jnp.sum(mask, axis=1).astype(jnp.float32)
  count = jnp.floor(valid * ratio).astype(jnp.int32)
  keep = canvas_of(ranking.keep_best(scores, count, mask))
  canvas = canvas_of(crops)  # [rows, columns, D]
  if newline is not None:
    rows = canvas.shape[0]
    end = jnp.broadcast_to(newline.astype(canvas.dtype), (rows, 1, width))
    canvas = jnp.concatenate([canvas, end], axis=1)
    shown = jnp.any(canvas_of(mask), axis=1, keepdims=True)
    keep = jnp.concatenate([keep, shown], axis=1)
    capacity += rows
  rest = packing.pack(keep.reshape(-1), capacity)
  stream = jnp.concatenate([thumbnail, canvas.reshape(-1, width)])

  index = jnp.concatenate([first, rest.index + num_tokens])
  live = jnp.concatenate([jnp.ones_like(first, dtype=bool), rest.mask])
  return types.Reduced(
    tokens=jnp.where(live[:, None], stream[index], 0),
    index=index,
    mask=live,
    size=live.astype(jnp.float32),
    position_ids=types.positions(index, positions),
  )

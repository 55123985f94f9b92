"""SparseVLM: the question's own words rate the picture, leftovers are fused.

Inside the language model, at three layers: text tokens that look at the
picture most are raters; visual tokens are kept by the attention the raters pay
them (`sparsevlm_scores`); the better part of the others is clustered and lives
on as a few means.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.ops import density_peaks, merging, packing, plans, ranking
from tokjax.reduction import types
from tokjax.typing import Array, Bool, Float

__all__ = [
  "VARIANTS",
  "Variant",
  "num_recycled",
  "sparse_vlm_plan",
  "sparsevlm",
]


@dataclasses.dataclass(frozen=True)
class Variant:
  """Settings of one published version of SparseVLM.

  Attributes:
    layers: 0-based layers after which tokens are dropped.
    budgets: tokens kept by score at those layers, by the average number of
      tokens they are named for.
    recycle: whether dropped tokens are fused into means.
    positions: "renumber" or "keep".
    corrected: whether scores are those of `corrected_scores`.
  """

  layers: tuple[int, ...]
  budgets: Mapping[int, tuple[int, ...]]
  recycle: bool
  positions: str
  corrected: bool


VARIANTS = {
  "v1.5": Variant(
    layers=(2, 6, 15),
    budgets={
      192: (300, 200, 110),
      128: (303, 110, 36),
      96: (238, 48, 26),
      64: (66, 30, 17),
    },
    recycle=True,
    positions="renumber",
    corrected=False,
  ),
  "plus": Variant(
    layers=(2, 6, 15),
    budgets={192: (300, 200, 118), 128: (238, 108, 60), 64: (66, 34, 20)},
    recycle=False,
    positions="keep",
    corrected=True,
  ),
}


def sparsevlm(
  features: Float[Array, "B N D"],
  scores: Float[Array, "B N"],
  mask: Bool[Array, "B N"] | None = None,
  *,
  num_keep: int,
  recycle: bool = True,
  recycle_ratio: float = 0.3,
  tokens_per_center: int = 10,
  positions: str = "keep",
) -> types.Reduced:
  """One step: keeps the best tokens and the means of the next best.

  The `num_keep` best tokens stay. Of the n others, the best
  int(recycle_ratio n) + 1 are clustered around int(m / tokens_per_center) + 1
  density peaks, m being their number, and the mean of each cluster is put
  after the tokens that stay.

  Args:
    features: hidden states of the visual tokens.
    scores: from `rater_scores` or `corrected_scores`; no gradient flows.
    mask: True where the token is real.
    num_keep: tokens kept by score, static, at most N; see `VARIANTS`.
    recycle: whether to add the means; False gives a pure selection's rows.
    recycle_ratio: share of the others that is clustered; .3 in the published
      code.
    tokens_per_center: 10 in the published code.
    positions: "keep", or "renumber" (published v1.5). The place of a mean is
      that of its density peak.

  Returns:
    `num_keep` + `num_recycled(...)` rows: tokens in ascending order, then means
    in the order of their peaks. The numbers are static and count padding. With
    at most `num_keep` valid tokens all are kept and there are no means.

  Raises:
    ValueError: if sizes disagree or a setting is out of range.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> x = jnp.array([[[1.0], [2.0], [3.0], [4.0]]])
    >>> reduce = jax.jit(sparsevlm, static_argnames="num_keep")
    >>> out = reduce(x, jnp.array([[0.4, 0.1, 0.3, 0.2]]), num_keep=2)
    >>> out.index.tolist(), out.tokens.tolist()
    ([[0, 2, 3]], [[[1.0], [3.0], [4.0]]])

  Cost: a sort, and 2 m^2 D FLOPs for the m tokens that are clustered.

  Source: Zhang et al. (2025), "SparseVLM: Visual Token Sparsification for
  Efficient Vision-Language Model Inference", numbers from the published code.
  It renumbers positions and breaks ties of density by random noise; here the
  lower position wins. The adaptive ratio of the paper is in neither.
  """
  checks.has_rank(3, features=features)
  num_tokens = features.shape[1]
  checks.in_range(1, num_tokens, num_keep=num_keep)
  checks.same_size(
    features_batch=features.shape[0], scores_batch=scores.shape[0]
  )
  checks.same_size(features_tokens=num_tokens, scores_tokens=scores.shape[1])
  rows = 0
  if recycle:
    rows = num_recycled(
      num_tokens,
      num_keep,
      recycle_ratio=recycle_ratio,
      tokens_per_center=tokens_per_center,
    )
  if mask is None:
    mask = jnp.ones_like(features[..., 0], dtype=bool)
  checks.same_size(features_batch=features.shape[0], mask_batch=mask.shape[0])
  checks.same_size(features_tokens=num_tokens, mask_tokens=mask.shape[1])
  one = functools.partial(
    _sparsevlm,
    num_keep=num_keep,
    num_candidates=int(recycle_ratio * (num_tokens - num_keep)) + 1,
    num_centers=rows,
    positions=positions,
  )
  return jax.vmap(one)(features, scores, mask)


def num_recycled(
  num_tokens: int,
  num_keep: int,
  *,
  recycle_ratio: float = 0.3,
  tokens_per_center: int = 10,
) -> int:
  """Number of means that a step adds to the tokens it keeps.

  Args:
    num_tokens: visual tokens before the step.
    num_keep: tokens kept by score.
    recycle_ratio: share of the others that is clustered, 0..1.
    tokens_per_center: see `sparsevlm`.

  Returns:
    The number; 0 where nothing is dropped.

  Raises:
    ValueError: if a setting is out of range.

  Example:
    >>> num_recycled(576, 300)
    9

  Source: the published code of Zhang et al. (2025), "SparseVLM".
  """
  checks.in_range(0, num_tokens, num_keep=num_keep)
  checks.in_range(0, 1, recycle_ratio=recycle_ratio)
  checks.in_range(1, float("inf"), tokens_per_center=tokens_per_center)
  num_dropped = num_tokens - num_keep
  if num_dropped == 0:
    return 0
  num_candidates = min(int(recycle_ratio * num_dropped) + 1, num_dropped)
  return min(num_candidates // tokens_per_center + 1, num_candidates)


def sparse_vlm_plan(
  average: int,
  *,
  variant: str = "v1.5",
  num_visual: int = 576,
  delay: int = 1,
) -> tuple[tuple[int, int], ...]:
  """Visual tokens that the layers see, means included.

  Args:
    average: a row of the variant's table: 192, 128, 96 or 64.
    variant: a name of `VARIANTS`.
    num_visual: visual tokens at the input.
    delay: layers from the one that scores to the first with fewer tokens. 1:
      the scoring layer itself still sees all. 0 counts it as short already,
      which is how the tables get their names ("plus", 128: 128.0).

  Returns:
    (first layer, tokens) pairs for `ops.budgets`.

  Raises:
    ValueError: for an unknown name, or an `average` without a row.

  Example:
    >>> sparse_vlm_plan(64, variant="plus")
    ((0, 576), (3, 66), (7, 34), (16, 20))

  Source: the published code of Zhang et al. (2025), "SparseVLM".
  """
  checks.one_of(tuple(VARIANTS), variant=variant)
  settings = VARIANTS[variant]
  checks.one_of(tuple(settings.budgets), average=average)
  plan = [(0, num_visual)]
  for layer, keep in zip(
    settings.layers, settings.budgets[average], strict=True
  ):
    before = plan[-1][1]
    keep = min(keep, before)
    means = num_recycled(before, keep) if settings.recycle else 0
    plan.append((layer + delay, keep + means))
  return tuple(plan)


def _sparsevlm(
  x, scores, mask, *, num_keep, num_candidates, num_centers, positions
):
  num_tokens = x.shape[0]
  num_rows = num_keep + num_centers
  keep = (ranking.ranks(scores, mask) < num_keep) & mask
  kept = packing.pack(keep, num_keep)
  slot = jnp.where(keep, jnp.cumsum(keep, dtype=jnp.int32) - 1, num_rows)
  weight = keep.astype(jnp.float32)
  index, live = kept.index, kept.mask
  if num_centers:
    dropped = mask & ~keep
    num_candidates = min(num_candidates, num_tokens - num_keep)
    chosen = (ranking.ranks(scores, dropped) < num_candidates) & dropped
    candidates = packing.pack(chosen, num_candidates)
    centers = density_peaks.density_peaks(
      x[candidates.index], candidates.mask, num_clusters=num_centers
    )
    means = merging.mean_plan(centers.assignment, num_centers)
    row = jnp.maximum(jnp.cumsum(chosen, dtype=jnp.int32) - 1, 0)
    row = jnp.minimum(row, num_candidates - 1)
    slot = jnp.where(chosen, num_keep + centers.assignment[row], slot)
    weight = jnp.where(chosen, means.weight[row], weight)
    peaks = jnp.where(
      centers.mask, candidates.index[centers.index], num_tokens - 1
    )
    index = jnp.concatenate([index, peaks])
    live = jnp.concatenate([live, centers.mask])
  plan = plans.Merge(slot, weight)
  return types.fused(x, plan, index, live, positions=positions)

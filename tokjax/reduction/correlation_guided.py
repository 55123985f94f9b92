"""Correlation-guided compression of document pages, sub-image by sub-image.

How alike the patches of a sub-image are says how many tokens it deserves; the
attention of [CLS] at a low layer says which (its local information), and
outliers of that attention at a deep layer are kept besides (they hold global
information). Every sub-image of a page is an example of the batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.ops import (
  attention_scores,
  merging,
  packing,
  plans,
  ranking,
  similarity,
)
from tokjax.reduction import correlation_scores, types
from tokjax.typing import Array, Bool, Float, Int, Key

__all__ = ["CorrelatedTokens", "correlated_tokens", "correlation_guided"]


class CorrelatedTokens(NamedTuple):
  """Which tokens of a sub-image carry its information.

  Attributes:
    density: share of its tokens that are not redundant, 0..1.
    local: tokens drawn by the attention at the low layer.
    outlier: tokens far above the others at the deep layer.
  """

  density: Float[Array, "*batch"]
  local: Bool[Array, "*batch N"]
  outlier: Bool[Array, "*batch N"]


def correlation_guided(
  features: Float[Array, "B N D"],
  keys: Float[Array, "B N d"],
  low_attention: Float[Array, "B N"],
  high_attention: Float[Array, "B N"],
  mask: Bool[Array, "B N"] | None = None,
  num_draws: Int[Array, " B"] | None = None,
  key: Key[Array, ""] | None = None,
  *,
  num_keep: int,
  threshold: float = 0.9,
  min_similar: int = 8,
  iqr_factor: float = 1.5,
  temperature: float = 1.0,
  aggregation: str = "none",
  positions: str = "keep",
) -> types.Reduced:
  """Keeps as many tokens of each sub-image as its content asks for.

  `correlated_tokens` marks tokens by local and global information; their
  union is packed into `num_keep` rows. Where it has more, outliers stay first,
  then the most attended at the low layer.

  Args:
    features: last-layer features of the patches, one sub-image per example.
    keys: attention keys of the patches at a low layer.
    low_attention: attention of [CLS] to the patches at that layer.
    high_attention: the same at a deep layer.
    mask: True where the patch is real.
    num_draws: tokens to draw from each example; None by its density.
    key: draws; None takes the most attended.
    num_keep: rows there are at most, static. A capacity: fewer are used where
      the content asks for fewer, even if `num_keep` is N.
    threshold: see `information_density`.
    min_similar: see `information_density`.
    iqr_factor: outliers lie above Q3 + iqr_factor * (Q3 - Q1).
    temperature: see `sample_tokens`.
    aggregation: "none", or "nearest_mean": every dropped token is averaged
      into the kept one whose key is most alike (cosine, ties to the lower).
    positions: "keep" or "renumber", see `types.positions`.

  Returns:
    The kept tokens in raster order. How many found no room is the size of the
    union less `num_keep`, see `correlated_tokens`.

  Raises:
    ValueError: if sizes disagree, a setting is out of range or unknown.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> blank, low = jnp.ones((1, 12, 2)), jnp.full((1, 12), 1 / 12)
    >>> high = jnp.array([7 * [0.05] + [0.45] + 4 * [0.05]])
    >>> reduce = jax.jit(correlation_guided, static_argnames="num_keep")
    >>> kept = reduce(blank, blank, low, high, num_keep=2)
    >>> kept.index.tolist(), kept.mask.tolist()
    ([[7, 11]], [[True, False]])

  Cost: 2 N^2 d FLOPs, N * 128 floats; aggregation 2 K N d FLOPs more.

  Source: Zhang et al. (2024), "Token-level Correlation-guided Compression for
  Efficient Multimodal Document Understanding". No code was published: steps
  from the paper's figure, thresholds, layers and aggregation ours. The page
  as a whole, sent beside its sub-images, is not compressed in the paper.
  """
  checks.has_rank(3, features=features)
  num_tokens = features.shape[1]
  checks.in_range(1, num_tokens, num_keep=num_keep)
  checks.one_of(("none", "nearest_mean"), aggregation=aggregation)
  checks.same_size(features_batch=features.shape[0], keys_batch=keys.shape[0])
  checks.same_size(features_tokens=num_tokens, keys_tokens=keys.shape[1])
  mask = _full_mask(features, mask, "features")
  found = correlated_tokens(
    keys,
    low_attention,
    high_attention,
    mask,
    num_draws,
    key,
    threshold=threshold,
    min_similar=min_similar,
    iqr_factor=iqr_factor,
    temperature=temperature,
  )

  def one(x, keys, attention, mask, local, outlier):
    keep = local | outlier
    attention = jnp.where(mask, attention.astype(jnp.float32), 0)
    share = attention / jnp.maximum(jnp.sum(attention), 1e-30)  # at most 1
    keep &= ranking.ranks(share + 2 * outlier, keep) < num_keep
    kept = packing.pack(keep, num_keep)
    if aggregation == "none":
      return types.selected(x, kept.index, kept.mask, positions=positions)
    plan = _nearest_mean(keys, keep, kept, mask)
    return types.fused(x, plan, kept.index, kept.mask, positions=positions)

  return jax.vmap(one)(
    features, keys, low_attention, mask, found.local, found.outlier
  )


def correlated_tokens(
  keys: Float[Array, "B N d"],
  low_attention: Float[Array, "B N"],
  high_attention: Float[Array, "B N"],
  mask: Bool[Array, "B N"] | None = None,
  num_draws: Int[Array, " B"] | None = None,
  key: Key[Array, ""] | None = None,
  *,
  threshold: float = 0.9,
  min_similar: int = 8,
  iqr_factor: float = 1.5,
  temperature: float = 1.0,
) -> CorrelatedTokens:
  """Marks the tokens that `correlation_guided` keeps; their number is free.

  Args:
    keys: attention keys of the patches at a low layer (default of the paper's
      figure: a low layer; ours: layer 2 of 24).
    low_attention: attention of [CLS] to the patches at that layer.
    high_attention: the same at a deep layer (ours: layer 22 of 24).
    mask: True where the patch is real.
    num_draws: tokens to draw from each example, such as
      `ops.budgets.allocate(density, total, cap)` for a page of fixed size;
      None for round(density * number of valid tokens), half to even.
    key: draws; None takes the most attended.
    threshold: see `information_density`.
    min_similar: see `information_density`.
    iqr_factor: outliers lie above Q3 + iqr_factor * (Q3 - Q1).
    temperature: see `sample_tokens`.

  Returns:
    The density and two masks; what is kept is their union.

  Raises:
    ValueError: if sizes disagree or a setting is out of range.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> keys, a = jnp.eye(4)[None], jnp.array([[0.1, 0.2, 0.3, 0.4]])
    >>> found = jax.jit(correlated_tokens)(keys, a, a)
    >>> found.density.tolist(), found.local.tolist()
    ([1.0], [[True, True, True, True]])

  Cost: that of `information_density` and two sorts.

  Source: Zhang et al. (2024), see `correlation_guided`.
  """
  checks.has_rank(3, keys=keys)
  checks.same_size(
    keys_tokens=keys.shape[1],
    low_attention=low_attention.shape[1],
    high_attention=high_attention.shape[1],
  )
  mask = _full_mask(keys, mask, "keys")
  density = correlation_scores.information_density(
    keys, mask, threshold=threshold, min_similar=min_similar
  )
  if num_draws is None:
    valid = jnp.sum(mask, axis=1, dtype=jnp.float32)
    num_draws = jnp.round(density * valid).astype(jnp.int32)
  checks.same_size(keys_batch=keys.shape[0], num_draws=num_draws.shape[0])
  return CorrelatedTokens(
    density=density,
    local=correlation_scores.sample_tokens(
      low_attention, num_draws, mask, key, temperature=temperature
    ),
    outlier=attention_scores.iqr_upper(high_attention, mask, factor=iqr_factor),
  )


def _nearest_mean(keys, keep, kept, mask) -> plans.Merge:
  """Every valid token joins the kept one with the most similar key."""
  num_rows = kept.index.shape[0]
  keys = jax.lax.stop_gradient(keys).astype(jnp.float32)
  unit = similarity.safe_normalize(jnp.where(mask[:, None], keys, 0))
  cosine = jnp.matmul(unit[kept.index], unit.T, precision="highest")  # [K, N]
  cosine = jnp.where(kept.mask[:, None], cosine, -jnp.inf)
  nearest = jnp.argmax(cosine, axis=0).astype(jnp.int32)
  own = jnp.cumsum(keep, dtype=jnp.int32) - 1
  slot = jnp.where(keep, own, nearest)
  slot = jnp.where(mask & jnp.any(keep), slot, num_rows)
  return merging.mean_plan(slot, num_rows)


def _full_mask(x, mask, name):
  if mask is None:
    return jnp.ones_like(x[..., 0], dtype=bool)
  checks.same_size(
    **{f"{name}_tokens": x.shape[-2], "mask_tokens": mask.shape[-1]}
  )
  return mask

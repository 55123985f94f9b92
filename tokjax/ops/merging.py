"""Which tokens go together: bipartite matching, and targets with followers.

Every function returns a `Fusion`: a plan of `tokjax.ops.plans` and, for each
output, the input position that stands for it. Matching looks at the metric
only and passes no gradient; what is merged by the plan does. Masked tokens
neither merge nor receive, and every example is treated as if it had been
alone, without its padding.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.ops import packing, plans, similarity
from tokjax.typing import Array, Bool, Float, Int32, Key

__all__ = [
  "Fusion",
  "bipartite_match",
  "dominant_contextual",
  "mean_plan",
  "random_match",
]


class Fusion(NamedTuple):
  """How tokens are fused, and what stands for each output.

  Attributes:
    plan: where the tokens go.
    index: input position of the token that others were fused into, in the
      order of the outputs; the last position where `mask` is False.
    mask: True where the output exists; those come first.
  """

  plan: plans.Merge | plans.Transform
  index: Int32[Array, "*batch K"]
  mask: Bool[Array, "*batch K"]


def mean_plan(
  slot: Int32[Array, "*batch N"],
  num_outputs: int,
  size: Float[Array, "*batch N"] | None = None,
) -> plans.Merge:
  """The plan that replaces each group of tokens by its mean.

  Args:
    slot: output of each token; `num_outputs` where it is dropped.
    num_outputs: K, static.
    size: weight of each token in its mean; None for equal weights.

  Returns:
    Weights that sum to 1 in each output which has tokens.

  Example:
    >>> import jax.numpy as jnp
    >>> plan = mean_plan(jnp.array([0, 0, 1]), 2, jnp.array([3.0, 1.0, 1.0]))
    >>> plan.weight.tolist()
    [0.75, 0.25, 1.0]

  Source: common knowledge.
  """
  if size is None:
    size = jnp.ones_like(slot, dtype=jnp.float32)
  checks.same_size(slot=slot.shape[-1], size=size.shape[-1])
  size = jnp.where(slot < num_outputs, size.astype(jnp.float32), 0)
  ones = plans.Merge(slot, jnp.ones_like(size))
  total = plans.merge_sizes(ones, size, num_outputs)[..., None]
  each = plans.restore_plan(ones, total)[..., 0]
  return plans.Merge(slot, size / jnp.where(each > 0, each, 1))


def bipartite_match(
  metric: Float[Array, "*batch N d"],
  num_merged: int,
  mask: Bool[Array, "*batch N"] | None = None,
  size: Float[Array, "*batch N"] | None = None,
  *,
  class_token: bool = False,
  distill_token: bool = False,
  every: int = 2,
  order: str = "similarity",
) -> Fusion:
  """Merges the tokens that have the most similar partner.

  The valid tokens are numbered 0, 1, 2, ...; every second one (of those with
  an odd number) is a destination, the others are sources. A source proposes to
  the destination of the highest cosine; the `num_merged` sources with the
  highest cosines are merged into theirs. Several may go into one.

  Args:
    metric: what decides, such as keys averaged over heads; the mean over the
      features that are merged is taken by `plan`.
    num_merged: how many tokens disappear, static, at most half (with
      protected tokens, half of the rest). An example with fewer valid tokens
      merges only as many as do not fit into N - num_merged.
    mask: True where a token counts; None for all.
    size: weights of the mean; None for the plain one.
    class_token: the first token is never merged.
    distill_token: the second one neither merges nor receives.
    every: one of this many tokens is a destination, the last of each group;
      with more than 2 up to (every - 1) / every of the tokens can be merged.
    order: of the outputs: "similarity" (sources that stay, best first, then
      destinations), "ascending" (both parts ascending) or "raster" (all of
      them ascending). Where no token is merged, none is moved.

  Returns:
    The plan of N - num_merged outputs. Sizes are kept by
    `plans.merge_sizes(plan, size, ...)`.

  Raises:
    ValueError: if `num_merged` is out of range, or sizes disagree.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> x = jnp.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.5, 1.0]])
    >>> match = jax.jit(bipartite_match, static_argnums=1)(x, 1)
    >>> match.plan.slot.tolist(), match.index.tolist()
    ([1, 1, 0, 2], [2, 1, 3])

  Cost: N^2 d / 2 FLOPs and N^2 / 4 floats (every = 2).

  Source: Bolya et al. (2023), "Token Merging: Your ViT But Faster"; its code
  fixes the orders "similarity" (without class token) and "ascending" (with
  one), and drops an incomplete last group where `every` > 2. The mask is ours.
  """
  num_tokens = metric.shape[-2]
  checks.in_range(2, num_tokens, every=every)
  protected = int(class_token) + int(distill_token)
  most = (num_tokens - protected) * (every - 1) // every
  checks.in_range(0, max(most, 0), num_merged=num_merged)
  checks.one_of(("similarity", "ascending", "raster"), order=order)
  metric, mask, size = _prepare(metric, mask, size)

  def one(metric, mask, size):  # [N, d], [N], [N]
    number = jnp.cumsum(mask, dtype=jnp.int32) - 1
    count = jnp.sum(mask, dtype=jnp.int32)
    receives = number % every == every - 1
    # Fewer tokens than a group: the last one receives.
    receives |= (count < every) & (number == count - 1)
    receives &= mask
    shielded = (number == 0) & class_token
    shielded |= (number == int(class_token)) & distill_token
    closed = (number == int(class_token)) & distill_token
    return _match(
      metric,
      mask,
      size,
      receives,
      shielded,
      closed,
      jnp.maximum(count - (num_tokens - num_merged), 0),
      num_merged=num_merged,
      num_destinations=num_tokens // every,
      order=order,
    )

  return _over_batch(one, metric, mask, size)


def random_match(
  key: Key[Array, ""],
  metric: Float[Array, "*batch N d"],
  num_merged: int,
  mask: Bool[Array, "*batch N"] | None = None,
  size: Float[Array, "*batch N"] | None = None,
) -> Fusion:
  """Merges random tokens, each into the most similar of the others.

  Args:
    key: PRNG key of the choice; examples draw apart.
    metric: what decides where they go.
    num_merged: how many tokens disappear, static, less than N. An example
      with fewer valid tokens merges only as many as do not fit.
    mask: True where a token counts; None for all.
    size: weights of the mean; None for the plain one.

  Returns:
    The plan of N - num_merged outputs, ascending.

  Raises:
    ValueError: if `num_merged` is out of range, or sizes disagree.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> draw = jax.jit(random_match, static_argnums=2)
    >>> match = draw(jax.random.key(0), jnp.eye(4), 1)
    >>> match.index.shape
    (3,)

  Cost: 2 r (N - r) d FLOPs for r merged tokens.

  Source: the random variant in the code of Bolya et al. (2023), which leaves
  the outputs in random order.
  """
  num_tokens = metric.shape[-2]
  checks.in_range(0, num_tokens - 1, num_merged=num_merged)
  metric, mask, size = _prepare(metric, mask, size)
  draw = jax.random.uniform(key, mask.shape)
  draw = jnp.where(mask, draw, -1)  # the masked are never drawn

  def one(metric, mask, size, draw):
    count = jnp.sum(mask, dtype=jnp.int32)
    limit = jnp.maximum(count - (num_tokens - num_merged), 0)
    place = jnp.argsort(jnp.argsort(-draw, stable=True), stable=True)
    receives = mask & (place >= limit)
    nobody = mask & ~mask  # sharded as the mask is
    return _match(
      metric,
      mask,
      size,
      receives,
      nobody,
      nobody,
      limit,
      num_merged=num_merged,
      num_destinations=num_tokens - num_merged,
      order="raster",
    )

  return _over_batch(one, metric, mask, size, draw)


def _prepare(metric, mask, size):
  """Checks sizes, fills in defaults, and normalises what decides."""
  num_tokens = metric.shape[-2]
  if mask is None:
    mask = jnp.ones_like(metric[..., 0], dtype=bool)
  if size is None:
    size = jnp.ones_like(metric[..., 0], dtype=jnp.float32)
  checks.same_size(
    metric_tokens=num_tokens, mask=mask.shape[-1], size=size.shape[-1]
  )
  return _unit(metric, mask), mask, size


def _unit(metric, mask):
  """Rows of length one in float32, zero where masked, without gradient."""
  metric = jax.lax.stop_gradient(metric).astype(jnp.float32)
  metric = jnp.where(mask[..., None], metric, 0)
  return similarity.safe_normalize(metric)


def _over_batch(one, *arrays):
  for _ in range(arrays[0].ndim - 2):
    one = jax.vmap(one)
  return one(*arrays)


def _cosine(a, b):
  return jnp.matmul(
    a, b.T, precision="highest", preferred_element_type=jnp.float32
  )


def _match(
  metric,
  mask,
  size,
  receives,
  shielded,
  closed,
  limit,
  *,
  num_merged,
  num_destinations,
  order,
):
  """Merges the best `limit` sources (valid, not `receives`) of one example."""
  num_tokens = mask.shape[0]
  num_outputs = num_tokens - num_merged
  place = jnp.cumsum(jnp.ones_like(mask, dtype=jnp.int32)) - 1
  gives = mask & ~receives
  sources = packing.pack(gives, max(num_tokens - num_destinations, 1))
  targets = packing.pack(receives, num_destinations)
  cosine = _cosine(metric[sources.index], metric[targets.index])  # [A, C]
  allowed = (sources.mask & ~shielded[sources.index])[:, None]
  allowed = allowed & (targets.mask & ~closed[targets.index])[None, :]
  cosine = jnp.where(allowed, cosine, -jnp.inf)
  partner = targets.index[jnp.argmax(cosine, axis=1)]  # [A]
  best = jnp.max(cosine, axis=1)
  rank = jnp.argsort(jnp.argsort(-best, stable=True), stable=True)
  goes = (rank < limit) & (best > -jnp.inf)

  row = jnp.maximum(jnp.cumsum(gives, dtype=jnp.int32) - 1, 0)  # token to row
  merged = gives & goes[row]
  sort_key = place
  if order == "similarity":
    sort_key = jnp.where(gives, rank[row].astype(jnp.int32), place)
  if order != "raster":
    sort_key = jnp.where(receives, sort_key + num_tokens, sort_key)
  # Where nothing is merged nothing moves.
  sort_key = jnp.where(limit > 0, sort_key, place)
  sort_key = jnp.where(mask & ~merged, sort_key, 2 * num_tokens)
  sequence = jnp.argsort(sort_key, stable=True).astype(jnp.int32)
  output = jnp.argsort(sequence).astype(jnp.int32)  # its inverse
  exists = sort_key[sequence] < 2 * num_tokens
  slot = output[jnp.where(merged, partner[row], place)]
  slot = jnp.where(mask, slot, num_outputs)
  return Fusion(
    plan=mean_plan(slot, num_outputs, size),
    index=jnp.where(exists, sequence, num_tokens - 1)[:num_outputs],
    mask=exists[:num_outputs],
  )


def dominant_contextual(
  metric: Float[Array, "*batch N d"],
  score: Float[Array, "*batch N"],
  num_dominant: int,
  num_contextual: int,
  mask: Bool[Array, "*batch N"] | None = None,
) -> Fusion:
  """Keeps the best tokens and fuses the others into a few.

  Of the m valid tokens that are not among the `num_dominant` highest scores,
  every step-th is a target, step = max(1, m // num_contextual), as many as
  there is room for; each other one goes to the target of the highest cosine.
  An output is its target *plus* the mean of those that went to it: a sum, up
  to twice as long as a token. Where there is room for all valid tokens, all
  stay as and where they are.

  Args:
    metric: what decides who goes where, such as keys averaged over heads.
    score: what makes a token dominant.
    num_dominant: static, at least 1.
    num_contextual: static, 0 for a pure selection.
    mask: True where a token counts; None for all.

  Returns:
    The plan of num_dominant + num_contextual outputs: dominant tokens in
    input order, then targets in input order.

  Raises:
    ValueError: if the counts are out of range, or sizes disagree.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> metric = jnp.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    >>> score = jnp.array([0.0, 0.9, 0.1, 0.2])
    >>> fuse = jax.jit(dominant_contextual, static_argnums=(2, 3))
    >>> fusion = fuse(metric, score, 1, 1)
    >>> fusion.index.tolist(), fusion.plan.weight.tolist()
    ([1, 0], [1.0, 1.0, 0.5, 0.5])

  Cost: 2 N num_contextual d FLOPs.

  Source: the code of Yang et al. (2025), "VisionZip", which VisionDrop shares.
  """
  num_tokens = metric.shape[-2]
  checks.in_range(1, num_tokens, num_dominant=num_dominant)
  checks.in_range(0, num_tokens - num_dominant, num_contextual=num_contextual)
  if mask is None:
    mask = jnp.ones_like(score, dtype=bool)
  checks.same_size(
    metric_tokens=num_tokens, score=score.shape[-1], mask=mask.shape[-1]
  )
  kept = packing.keep_top_k(score, num_dominant, mask)
  return _over_batch(
    functools.partial(_followers, num_contextual=num_contextual),
    _unit(metric, mask),
    mask,
    kept,
  )


def _followers(metric, mask, kept, *, num_contextual):
  """`dominant_contextual` of one example, after the dominant are known."""
  num_dominant = kept.index.shape[0]
  num_outputs = num_dominant + num_contextual
  # The token's row among the dominant ones, or past the last row.
  place = jnp.where(kept.mask, kept.index, mask.shape[0])
  taken = jnp.zeros_like(mask).at[place].set(True, mode="drop")
  row = jnp.cumsum(taken, dtype=jnp.int32) - 1
  slot = jnp.where(taken, row, num_outputs)
  weight = taken.astype(jnp.float32)
  if not num_contextual:
    plan = plans.Merge(slot, weight)
    return Fusion(plan, kept.index, kept.mask)
  rest = mask & ~taken
  fits = jnp.sum(mask, dtype=jnp.int32) <= num_outputs
  number = jnp.cumsum(rest, dtype=jnp.int32) - 1
  step = jnp.maximum(jnp.sum(rest, dtype=jnp.int32) // num_contextual, 1)
  is_target = rest & (number % step == 0) & (number < step * num_contextual)
  targets = packing.pack(is_target, num_contextual)
  cosine = _cosine(metric, metric[targets.index])  # [N, C]
  cosine = jnp.where(targets.mask[None, :], cosine, -jnp.inf)
  nearest = jnp.argmax(cosine, axis=1).astype(jnp.int32)
  goes = rest & ~is_target
  target = jnp.where(goes, nearest, num_contextual)
  share = mean_plan(target, num_contextual).weight
  target = jnp.where(is_target, number // step, target)
  slot = jnp.where(rest, num_dominant + target, slot)
  slot = jnp.where(fits & mask, jnp.cumsum(mask, dtype=jnp.int32) - 1, slot)
  weight = jnp.where(goes, share, weight)
  weight = jnp.where(is_target, 1, weight)
  everyone = packing.pack(mask, num_outputs)
  index = jnp.concatenate([kept.index, targets.index])
  return Fusion(
    plan=plans.Merge(slot, weight),
    index=jnp.where(fits, everyone.index, index),
    mask=jnp.concatenate([kept.mask, targets.mask]),
  )

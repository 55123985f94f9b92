"""AIM: merge before the language model, prune by PageRank inside of it.

Part A, `aim_merge`, halves the visual tokens of an image or a frame again and
again. Part B drops visual tokens after each of the later layers, by
`pagerank_importance` and `aim_prune`; how many stay is the plan of
`tokjax.ops.budgets.linear_decay_plan`.
"""

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.kernels import column_attention
from tokjax.ops import merging, packing, plans
from tokjax.reduction import types
from tokjax.typing import Array, Bool, Float, Implementation

__all__ = ["aim_merge", "aim_prune", "merge_rounds", "pagerank_importance"]


def merge_rounds(num_tokens: int, num_keep: int) -> tuple[int, ...]:
  """How many tokens each round of `aim_merge` removes.

  Round i removes num_tokens >> i, so that half, a quarter, an eighth are left;
  the last round removes what is still too many.

  Args:
    num_tokens: N.
    num_keep: K.

  Returns:
    Numbers that sum to N - K.

  Raises:
    ValueError: if `num_keep` is not in 1..N.

  Example:
    >>> merge_rounds(196, 49), merge_rounds(196, 74)
    ((98, 49), (98, 24))

  Source: the code of Zhong et al. (2025).
  """
  checks.in_range(1, num_tokens, num_keep=num_keep)
  rounds, left = [], num_tokens
  while left > num_keep:
    removed = max(num_tokens >> (len(rounds) + 1), 1)
    removed = min(removed, left // 2, left - num_keep)
    rounds.append(removed)
    left -= removed
  return tuple(rounds)


def aim_merge(
  features: Float[Array, "B N D"],
  mask: Bool[Array, "B N"] | None = None,
  *,
  num_keep: int,
  order: str = "similarity",
  positions: str = "keep",
) -> types.Reduced:
  """Merges similar tokens in rounds, each at most halving their number.

  In a round even tokens are sources and odd ones destinations; the sources of
  the highest cosine to a destination are merged, and each destination becomes
  the plain mean of itself and what came to it, whatever those stood for. The
  next round splits even and odd in the order that this one left.

  Args:
    features: tokens of one image or frame, after projector and pooling; they
      decide and are merged. Gradients flow through the means, not through the
      choice.
    mask: True where a token counts; None for all.
    num_keep: K, static. An example with fewer valid tokens is left as it is.
    order: "similarity", sources that stay by descending similarity and then
      destinations, as in the published code; or "raster".
    positions: "keep" or "renumber" (as the published code does).

  Returns:
    The outputs; `plan` is that of all rounds together, `size` counts the
    tokens in each, which the method does not use.

  Raises:
    ValueError: if `num_keep` is out of range, or sizes disagree.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> x = jnp.array([[[1.0, 0.0], [0.5, 0.0], [0.0, 1.0], [0.5, 1.0]]])
    >>> merge = jax.jit(aim_merge, static_argnames="num_keep")
    >>> merge(x, num_keep=3).tokens.tolist()
    [[[0.0, 1.0], [0.75, 0.0], [0.5, 1.0]]]

  Cost: N^2 D / 2 FLOPs in the first round, a quarter of that in the next.

  Source: Zhong et al. (2025), "AIM: Adaptive Inference of Multi-Modal LLMs via
  Token Merging and Pruning", and its code. The mask and "raster" are ours.
  """
  num_tokens = features.shape[1]
  checks.one_of(("similarity", "raster"), order=order)
  checks.same_size(
    features=num_tokens, mask=num_tokens if mask is None else mask.shape[1]
  )
  rounds = merge_rounds(num_tokens, num_keep)
  if mask is None:
    mask = jnp.ones_like(features[..., 0], dtype=bool)
  # Nothing merged yet: every valid token is its own output.
  place = jnp.cumsum(jnp.ones_like(mask, dtype=jnp.int32), axis=1) - 1
  plan = plans.Merge(
    jnp.where(mask, place, num_tokens), mask.astype(jnp.float32)
  )
  index, valid, left = place, mask, num_tokens
  wide = features.astype(jnp.float32)
  if not rounds:
    kept = packing.pack(mask, num_tokens)
    return types.selected(features, kept.index, kept.mask, positions=positions)
  for removed in rounds:
    tokens = plans.apply_plan(plan, wide, left)
    match = merging.bipartite_match(tokens, removed, valid, order=order)
    left -= removed
    plan = plans.compose_plans(match.plan, plan, left)
    index = jnp.take_along_axis(index, match.index, axis=1)
    valid = match.mask
  index = jnp.where(valid, index, num_tokens - 1)
  return types.fused(features, plan, index, valid, positions=positions)


def pagerank_importance(
  queries: Float[Array, "B H N d"],
  keys: Float[Array, "B Hk N d"],
  mask: Bool[Array, "B N"] | None = None,
  *,
  temperature: float = 0.1,
  num_iterations: int = 5,
  damping: float = 0.0,
  scale: float | None = None,
  causal: bool = True,
  ghost_rows: bool = False,
  implementation: Implementation | None = None,
) -> Float[Array, "B N"]:
  """Importance of tokens by PageRank on the attention of one layer.

  With M = softmax(logits / temperature), per head: d = 1 / n for all n rows,
  then d <- (1 - damping) d M + damping / n, `num_iterations` times. Importance
  is the root mean square of d over heads.

  Args:
    queries: of the layer, after rotary encoding. No gradient flows.
    keys: of the layer, likewise.
    mask: True where a token counts; None for all.
    temperature: 0.1 in the published code, which sharpens attention.
    num_iterations: static; 5 in the published code. A causal map drives all
      weight to the first token in the end.
    damping: 0 in the published code.
    scale: factor of the inner products; None for d ** -0.5.
    causal: whether a row sees only the tokens up to itself.
    ghost_rows: rows that `mask` leaves out (dropped, not padding) still vote
      in the first step, and n counts them, as in the published code, which
      only masks what it drops.
    implementation: of `column_attention`.

  Returns:
    float32, 0 for masked tokens.

  Raises:
    ValueError: if sizes disagree, or a setting is out of range.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> x = jnp.zeros((1, 1, 2, 4))
    >>> rank = jax.jit(pagerank_importance, static_argnames="num_iterations")
    >>> rank(x, x, num_iterations=1).tolist()
    [[0.75, 0.25]]

  Cost: `num_iterations` times that of `column_attention`, with normalisers
  made once; no N x N array, which the published code holds.

  Source: Zhong et al. (2025) and its code.
  """
  checks.in_range(1, 1 << 20, num_iterations=num_iterations)
  checks.in_range(0, 1, damping=damping)
  if mask is None:
    mask = jnp.ones_like(queries[:, 0, :, 0], dtype=bool)
  checks.same_size(
    queries=queries.shape[2], keys=keys.shape[2], mask=mask.shape[1]
  )
  if scale is None:
    scale = queries.shape[-1] ** -0.5
  votes = jnp.ones_like(mask) if ghost_rows else mask
  count = jnp.sum(votes, axis=1, keepdims=True)
  start = jnp.where(votes, 1 / jnp.maximum(count, 1), 0)[:, None]  # [B, 1, N]
  like = jax.lax.stop_gradient(queries[..., 0]).astype(jnp.float32)
  start = jnp.broadcast_to(start, like.shape)
  valid = mask[:, None]

  weight, found = start, None
  for _ in range(num_iterations):
    # All rows that ever count do in the first round.
    found = column_attention.column_attention(
      queries,
      keys,
      mask,
      weight,
      scale=scale / temperature,
      causal=causal,
      normalizers=found,
      implementation=implementation,
    )
    weight = (1 - damping) * found.received + damping * start
    weight = jnp.where(valid, weight, 0)
  return jnp.sqrt(jnp.mean(jnp.square(weight), axis=1))


def aim_prune(
  hidden: Float[Array, "B S D"],
  importance: Float[Array, "B S"],
  protected: Bool[Array, "B S"],
  mask: Bool[Array, "B S"] | None = None,
  *,
  num_keep: int,
  positions: str = "keep",
) -> types.Reduced:
  """Drops the least important visual tokens; text stays.

  Args:
    hidden: the sequence after a layer.
    importance: from `pagerank_importance` of that layer. No gradient flows.
    protected: True for tokens that are never dropped, such as text.
    mask: True where a token counts; None for all.
    num_keep: visual tokens that stay and protected ones, static.
    positions: "keep" (as the published code does) or "renumber".

  Returns:
    A selection of the sequence.

  Raises:
    ValueError: if `num_keep` is out of range, or sizes disagree.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> x, text = jnp.ones((1, 4, 2)), jnp.array([[False, False, False, True]])
    >>> score = jnp.array([[0.2, 0.3, 0.1, 0.0]])
    >>> reduce = jax.jit(aim_prune, static_argnames="num_keep")
    >>> reduce(x, score, text, num_keep=3).index.tolist()
    [[0, 1, 3]]

  Source: Zhong et al. (2025) and its code.
  """
  checks.in_range(1, hidden.shape[1], num_keep=num_keep)
  checks.same_size(
    hidden=hidden.shape[1],
    importance=importance.shape[1],
    protected=protected.shape[1],
    mask=hidden.shape[1] if mask is None else mask.shape[1],
  )
  score = jnp.where(protected, jnp.inf, importance)
  return types.highest(
    hidden, score, mask, num_keep=num_keep, positions=positions
  )

"""VisionZip: tokens that [CLS] attends to, and the rest fused into a few."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.ops import attention_scores, merging
from tokjax.reduction import types
from tokjax.typing import Array, Bool, Float

__all__ = ["Signals", "visionzip", "visionzip_signals"]


class Signals(NamedTuple):
  """What an encoder layer says about its tokens.

  Attributes:
    score: how much attention each token gets, float32.
    metric: what decides which tokens are alike.
  """

  score: Float[Array, "B N"]
  metric: Float[Array, "B N d"]


def visionzip(
  features: Float[Array, "B N D"],
  metric: Float[Array, "B N d"],
  score: Float[Array, "B N"],
  mask: Bool[Array, "B N"] | None = None,
  *,
  num_keep: int,
  num_contextual: int | None = None,
  class_token: bool = False,
  positions: str = "keep",
) -> types.Reduced:
  """Keeps the most attended tokens and fuses the others into a few.

  The num_keep - num_contextual tokens of the highest score stay. Of the
  others, evenly spaced ones are targets, and each remaining token goes to the
  target whose metric is nearest: output = target + mean of those that went to
  it. See `tokjax.ops.merging.dominant_contextual`.

  Args:
    features: output of the encoder, before the projector.
    metric: keys averaged over heads. No gradient flows.
    score: attention that [CLS] pays to each token, summed over heads (in
      models without one, that all tokens pay). No gradient flows.
    mask: True where a token counts; None for all.
    num_keep: K, static.
    num_contextual: how many of them are fused, static, less than K; None for
      round(10 K / 64), the split of the published budgets 64 = 54 + 10,
      128 = 108 + 20 and 192 = 162 + 30.
    class_token: token 0 is [CLS]: it always stays, as the first output, and
      counts as one of the K.
    positions: "keep" or "renumber" (as the published LLaVA code does).

  Returns:
    Kept tokens in input order, then fused ones in the order of their targets.
    Where all valid tokens have room they stay as they are.

  Raises:
    ValueError: if counts are out of range, or sizes disagree.

  Example:
    >>> import functools
    >>> import jax, jax.numpy as jnp
    >>> x = jnp.array([[[8.0], [1.0], [2.0], [4.0]]])
    >>> score = jnp.array([[0.9, 0.0, 0.1, 0.2]])
    >>> reduce = functools.partial(visionzip, num_keep=2, num_contextual=1)
    >>> out = jax.jit(reduce)(x, x, score)
    >>> out.tokens.tolist(), out.size.tolist()
    ([[[8.0], [4.0]]], [[1.0, 3.0]])

  Cost: 2 N num_contextual d FLOPs.

  Source: Yang et al. (2025), "VisionZip: Longer is Better but Not Necessary in
  Vision Language Models", and its code; two of the three splits are inferred.
  """
  num_tokens = features.shape[1]
  checks.in_range(1, num_tokens, num_keep=num_keep)
  if num_contextual is None:
    num_contextual = min(round(num_keep * 10 / 64), num_keep - 1)
  checks.in_range(0, num_keep - 1, num_contextual=num_contextual)
  checks.same_size(
    features=num_tokens,
    metric=metric.shape[1],
    score=score.shape[1],
    mask=num_tokens if mask is None else mask.shape[1],
  )
  if class_token:
    first = jnp.cumsum(jnp.ones_like(score, dtype=jnp.int32), axis=1) == 1
    score = jnp.where(first, jnp.inf, score)
  fusion = merging.dominant_contextual(
    metric, score, num_keep - num_contextual, num_contextual, mask
  )
  return types.fused(features, *fusion, positions=positions)


def visionzip_signals(
  query: Float[Array, "B H 1 d"],
  keys: Float[Array, "B H N d"],
  mask: Bool[Array, "B N"] | None = None,
  *,
  scale: float | None = None,
) -> Signals:
  """Scores and metric of `visionzip` from one layer of an encoder.

  Args:
    query: that of [CLS], per head, at the layer before the last one.
    keys: keys of the same layer, [CLS] included.
    mask: True where a token counts; None for all.
    scale: factor of the inner products; None for d ** -0.5.

  Returns:
    Attention summed over heads, and keys averaged over heads, of all N tokens;
    pass them with `class_token=True`, or cut off the first.

  Example:
    >>> import jax.numpy as jnp
    >>> signals = visionzip_signals(
    ...     jnp.zeros((1, 2, 1, 4)), jnp.zeros((1, 2, 4, 4)))
    >>> signals.score.tolist()
    [[0.5, 0.5, 0.5, 0.5]]

  Cost: 2 H N d FLOPs; no N x N array.

  Source: the code of Yang et al. (2025).
  """
  rows = attention_scores.row_attention(query, keys, mask, scale=scale)
  metric = jnp.mean(keys.astype(jnp.float32), axis=1)
  return Signals(
    score=jnp.sum(rows[:, :, 0], axis=1),
    metric=jax.lax.stop_gradient(metric),
  )

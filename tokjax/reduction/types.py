"""What every reduction returns: the tokens that are left, and the choice.

The choice stays beside the tokens, so that another stream of the same tokens
(keys, position ids, a second layer) is cut alike, and what was computed for
the few can be spread over the many again.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.ops import packing, plans
from tokjax.typing import Array, Bool, Float, Int32

__all__ = ["Reduced", "fused", "highest", "positions", "selected"]


class Reduced(NamedTuple):
  """Tokens that are left when N become K.

  Attributes:
    tokens: features in the dtype they came in; rows where `mask` is False are
      zero.
    index: input position of each token, or of the one that others were fused
      into. A selection is ascending; rows where `mask` is False hold the last
      position.
    mask: True where the row holds a token.
    size: number (or weight) of the input tokens it stands for: 1 in a
      selection, 0 where `mask` is False.
    position_ids: where the reader of the tokens shall place them: `index`, or
      0, 1, 2, ... where they are renumbered.
    plan: how tokens were fused; None in a pure selection.
  """

  tokens: Float[Array, "*batch K D"]
  index: Int32[Array, "*batch K"]
  mask: Bool[Array, "*batch K"]
  size: Float[Array, "*batch K"]
  position_ids: Int32[Array, "*batch K"]
  plan: plans.Merge | plans.Transform | None = None

  def apply(self, stream: Array) -> Array:
    """Reduces another stream of the same tokens by the same choice.

    Args:
      stream: [*batch, N, *features]; a fused one must be floating point, with
        one feature axis.

    Returns:
      [*batch, K, *features], zero where `mask` is False.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.arange(8.0).reshape(1, 4, 2)
      >>> kept = selected(x, jnp.array([[1, 3]]))
      >>> kept.apply(jnp.array([[10, 11, 12, 13]])).tolist()
      [[11, 13]]
    """
    if self.plan is None:
      return _take(stream, self.index, self.mask)
    rows = plans.apply_plan(self.plan, stream, self.index.shape[-1])
    return jnp.where(self.mask[..., None], rows, 0)

  def restore(self, rows: Float[Array, "*batch K E"], num_tokens: int) -> Array:
    """Spreads one row per reduced token over the original places.

    Args:
      rows: what was computed for the reduced tokens.
      num_tokens: N, static.

    Returns:
      [*batch, N, E]. A token that was fused gets the row (by a `Transform`,
      the weighted mean of the rows) it went into; one that was dropped, zero.

    Example:
      >>> import jax.numpy as jnp
      >>> kept = selected(jnp.ones((1, 3, 2)), jnp.array([[2]]))
      >>> kept.restore(jnp.array([[[7.0]]]), 3).tolist()
      [[[0.0], [0.0], [7.0]]]
    """
    rows = jnp.where(self.mask[..., None], rows, 0)
    if self.plan is not None:
      return plans.restore_plan(self.plan, rows)
    # A selection is the merge of K tokens into N places.
    slot = jnp.where(self.mask, self.index, num_tokens)
    back = plans.Merge(slot, jnp.ones_like(self.size))
    return plans.apply_plan(back, rows, num_tokens)


def positions(
  index: Int32[Array, "*batch K"], policy: str
) -> Int32[Array, "*batch K"]:
  """Position ids of kept tokens.

  Args:
    index: their input positions.
    policy: "keep" (the original positions; grounding needs them) or
      "renumber" (0, 1, 2, ... in the order of the rows, as the LLaVA code of
      most methods does).

  Returns:
    int32 ids.

  Raises:
    ValueError: for another policy.

  Example:
    >>> import jax.numpy as jnp
    >>> positions(jnp.array([4, 9]), "renumber").tolist()
    [0, 1]

  Source: both are in use; LLaVA ports renumber, Qwen ports keep.
  """
  checks.one_of(("keep", "renumber"), positions=policy)
  if policy == "keep":
    return index
  return jnp.cumsum(jnp.ones_like(index), axis=-1) - 1


def highest(
  features: Float[Array, "B N D"],
  scores: Float[Array, "B N"],
  mask: Bool[Array, "B N"] | None = None,
  *,
  num_keep: int,
  positions: str = "keep",
) -> Reduced:
  """The tokens with the highest scores, in their original order.

  What every method does in the end that ranks tokens by one number.

  Args:
    features: all tokens; kept ones keep their gradient.
    scores: one per token; no gradient flows. A valid NaN is the lowest of all.
    mask: True where a token may be kept; None for all.
    num_keep: tokens to keep, static, at most N.
    positions: "keep" or "renumber", see `positions`.

  Returns:
    The kept tokens. Ties go to the lower index; with fewer than `num_keep`
    valid tokens all of them are kept and the rest is masked.

  Raises:
    ValueError: if the token axes disagree or `num_keep` is out of range.

  Example:
    >>> import jax.numpy as jnp
    >>> scores = jnp.array([[0.1, 0.4, 0.2, 0.4]])
    >>> highest(jnp.ones((1, 4, 2)), scores, num_keep=2).index.tolist()
    [[1, 3]]

  Cost: a selection of `num_keep` among N numbers, and a gather.

  Source: ours.
  """
  num_tokens = features.shape[1]
  checks.same_size(features_tokens=num_tokens, scores_tokens=scores.shape[1])
  if mask is not None:
    checks.same_size(features_tokens=num_tokens, mask_tokens=mask.shape[1])
  checks.in_range(1, num_tokens, num_keep=num_keep)
  kept = packing.keep_top_k(scores, num_keep, mask)
  return selected(features, kept.index, kept.mask, positions=positions)


def selected(
  features: Float[Array, "*batch N D"],
  picks: Int32[Array, "*batch K"],
  mask: Bool[Array, "*batch K"] | None = None,
  *,
  positions: str = "keep",
) -> Reduced:
  """A pure selection, in ascending order whatever the order of the picks.

  Args:
    features: all tokens; kept ones keep their gradient.
    picks: positions of the kept tokens, each at most once, in any order.
    mask: True where a pick counts; None for all.
    positions: "keep" or "renumber", see `positions`.

  Returns:
    The kept tokens; those that count come first.

  Example:
    >>> import jax.numpy as jnp
    >>> x = jnp.arange(8.0).reshape(1, 4, 2)
    >>> selected(x, jnp.array([[3, 0]])).index.tolist()
    [[0, 3]]

  Source: ours.
  """
  num_tokens = features.shape[-2]
  picks = picks.astype(jnp.int32)
  if mask is not None:
    picks = jnp.where(mask, picks, num_tokens)
  index = jnp.sort(picks, axis=-1)
  kept = index < num_tokens
  index = jnp.minimum(index, num_tokens - 1)
  return Reduced(
    tokens=_take(features, index, kept),
    index=index,
    mask=kept,
    size=kept.astype(jnp.float32),
    position_ids=_ids(index, positions),
  )


def fused(
  features: Float[Array, "*batch N D"],
  plan: plans.Merge | plans.Transform,
  index: Int32[Array, "*batch K"],
  mask: Bool[Array, "*batch K"] | None = None,
  *,
  size: Float[Array, "*batch N"] | None = None,
  positions: str = "keep",
) -> Reduced:
  """Tokens fused as a plan says.

  Args:
    features: all tokens; outputs pass gradients to those they are made of.
    plan: where each token goes.
    index: input position of the token that stands for each output, in the
      order of the outputs.
    mask: True where an output exists; None for all.
    size: how many tokens each input stands for; None for one. It is what
      `size` of the result sums; the weights of the plan are as they are.
    positions: "keep" or "renumber", see `positions`.

  Returns:
    The outputs in the order of the plan.

  Example:
    >>> import jax.numpy as jnp
    >>> from tokjax.ops import plans
    >>> plan = plans.Merge(jnp.array([[0, 0, 1]]), jnp.array([[0.5, 0.5, 1.0]]))
    >>> x = jnp.array([[[1.0], [3.0], [5.0]]])
    >>> out = fused(x, plan, jnp.array([[0, 2]]))
    >>> out.tokens[0, :, 0].tolist(), out.size.tolist()
    ([2.0, 5.0], [[2.0, 1.0]])

  Source: ours.
  """
  num_outputs = index.shape[-1]
  if mask is None:
    mask = jnp.ones_like(index, dtype=bool)
  if size is None:
    size = jnp.ones_like(features[..., 0], dtype=jnp.float32)
  tokens = plans.apply_plan(plan, features, num_outputs)
  sizes = plans.merge_sizes(plan, size, num_outputs)
  return Reduced(
    tokens=jnp.where(mask[..., None], tokens, 0),
    index=index.astype(jnp.int32),
    mask=mask,
    size=jnp.where(mask, sizes, 0),
    position_ids=_ids(index.astype(jnp.int32), positions),
    plan=plan,
  )


_ids = positions  # `positions` is also the name of an argument


def _take(stream, index, mask):
  """Rows [*batch, K, ...] of a stream [*batch, N, ...], zero where masked."""

  def one(stream, index, mask):
    rows = stream[index]
    keep = mask.reshape(mask.shape + (1,) * (rows.ndim - 1))
    return jnp.where(keep, rows, jnp.zeros_like(rows))

  for _ in range(index.ndim - 1):
    one = jax.vmap(one)
  return one(stream, index, mask)

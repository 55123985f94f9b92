"""ToMe: merge the most similar pairs of tokens, a few in every block of a ViT.

Between attention and MLP of each block, `tome` removes r tokens: keys decide,
features are averaged by their sizes. `Reduced.size` goes on to the next block
as `size`, `size_bias` adds it to the logits of the attention there, and
`track_sources` keeps which input each token is made of.
"""

from collections.abc import Sequence

import jax.numpy as jnp

from tokjax import checks
from tokjax.ops import merging, plans
from tokjax.reduction import types
from tokjax.typing import Array, Bool, Float, Int32, Key

__all__ = [
  "merge_schedule",
  "size_bias",
  "tome",
  "tome_random",
  "track_sources",
]


def tome(
  features: Float[Array, "B N D"],
  metric: Float[Array, "B N d"],
  mask: Bool[Array, "B N"] | None = None,
  size: Float[Array, "B N"] | None = None,
  *,
  num_keep: int,
  class_token: bool = False,
  distill_token: bool = False,
  every: int = 2,
  order: str | None = None,
  positions: str = "keep",
) -> types.Reduced:
  """Merges N - num_keep tokens into their most similar partners.

  Tokens of even number are sources, those of odd number destinations; the
  sources whose best destination has the highest cosine are merged into it, by
  the mean weighted with sizes. See `tokjax.ops.merging.bipartite_match`.

  Args:
    features: tokens; a merged one passes its gradient to all it is made of.
    metric: what decides, the keys of the block averaged over heads. No
      gradient flows.
    mask: True where a token counts; None for all.
    size: how many input tokens each one stands for; None for one.
    num_keep: K, static, at least half of N (protected tokens aside). An
      example with fewer valid tokens is left as it is.
    class_token: the first token is never merged.
    distill_token: the second one is never merged, nor merged into.
    every: one of this many tokens is a destination; with more than 2 fewer
      than half can be kept.
    order: of the outputs, "similarity", "ascending" or "raster"; None is what
      the published code does: "ascending" with a class token, "similarity"
      without.
    positions: "keep" or "renumber".

  Returns:
    The outputs, sources that stayed before destinations, with their sizes.

  Raises:
    ValueError: if `num_keep` is out of range, or sizes disagree.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> x = jnp.array([[[1.0, 0.0], [1.0, 0.5], [0.0, 1.0], [-1.0, 0.0]]])
    >>> out = jax.jit(tome, static_argnames="num_keep")(x, x, num_keep=3)
    >>> out.tokens.tolist(), out.size.tolist()
    ([[[0.0, 1.0], [1.0, 0.25], [-1.0, 0.0]]], [[1.0, 2.0, 1.0]])

  Cost: N^2 d / 2 + 2 N D FLOPs; N^2 / 4 floats.

  Source: Bolya et al. (2023), "Token Merging: Your ViT But Faster", and its
  code. The mask and "raster" are ours.
  """
  num_tokens = features.shape[1]
  checks.in_range(1, num_tokens, num_keep=num_keep)
  _same_tokens(features, metric, mask, size)
  if order is None:
    order = "ascending" if class_token else "similarity"
  match = merging.bipartite_match(
    metric,
    num_tokens - num_keep,
    mask,
    size,
    class_token=class_token,
    distill_token=distill_token,
    every=every,
    order=order,
  )
  return types.fused(features, *match, size=size, positions=positions)


def tome_random(
  key: Key[Array, ""],
  features: Float[Array, "B N D"],
  metric: Float[Array, "B N d"],
  mask: Bool[Array, "B N"] | None = None,
  size: Float[Array, "B N"] | None = None,
  *,
  num_keep: int,
  positions: str = "keep",
) -> types.Reduced:
  """Merges random tokens into the most similar of the others: a control.

  Args:
    key: PRNG key of the choice.
    features: tokens.
    metric: what decides where a drawn token goes.
    mask: True where a token counts; None for all.
    size: how many input tokens each one stands for; None for one.
    num_keep: K, static.
    positions: "keep" or "renumber".

  Returns:
    The outputs in ascending order, with their sizes.

  Raises:
    ValueError: if `num_keep` is out of range, or sizes disagree.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> x = jnp.ones((1, 4, 2))
    >>> reduce = jax.jit(tome_random, static_argnames="num_keep")
    >>> float(reduce(jax.random.key(0), x, x, num_keep=2).size.sum())
    4.0

  Cost: 2 (N - K) K d + 2 N D FLOPs.

  Source: the random variant in the code of Bolya et al. (2023), which leaves
  the outputs in random order.
  """
  num_tokens = features.shape[1]
  checks.in_range(1, num_tokens, num_keep=num_keep)
  _same_tokens(features, metric, mask, size)
  match = merging.random_match(key, metric, num_tokens - num_keep, mask, size)
  return types.fused(features, *match, size=size, positions=positions)


def _same_tokens(features, metric, mask, size):
  checks.same_size(
    features=features.shape[1],
    metric=metric.shape[1],
    mask=features.shape[1] if mask is None else mask.shape[1],
    size=features.shape[1] if size is None else size.shape[1],
  )


def size_bias(
  size: Float[Array, "*batch K"],
  mask: Bool[Array, "*batch K"] | None = None,
) -> Float[Array, "*batch K"]:
  """What to add to attention logits, per key, so that sizes count.

  A key that stands for s tokens then gets the attention that s equal keys
  would get together. Add it to keys, not to queries.

  Args:
    size: tokens that each key stands for.
    mask: True where the key exists; None where its size is not 0.

  Returns:
    float32 log(size); -inf where the key does not exist.

  Example:
    >>> import jax.numpy as jnp
    >>> size_bias(jnp.array([1.0, 0.0])).tolist()
    [0.0, -inf]

  Source: proportional attention of Bolya et al. (2023): on for supervised and
  for trained models, off for MAE weights as they are.
  """
  size = size.astype(jnp.float32)
  exists = size > 0
  if mask is not None:
    checks.same_size(size=size.shape[-1], mask=mask.shape[-1])
    exists &= mask
  return jnp.where(exists, jnp.log(jnp.where(exists, size, 1)), -jnp.inf)


def track_sources(
  slot: Int32[Array, "B N"],
  plan: plans.Merge,
  num_outputs: int,
) -> Int32[Array, "B N"]:
  """Where each input token of the model is, after one more merge.

  Args:
    slot: token of the current block that holds each input token; the numbers
      0..N-1 before the first merge.
    plan: the merge of this block, `Reduced.plan`.
    num_outputs: K of this block, static.

  Returns:
    Its output; `num_outputs` where it was dropped.

  Example:
    >>> import jax.numpy as jnp
    >>> from tokjax.ops import plans
    >>> plan = plans.Merge(jnp.array([[1, 0, 1]]), jnp.ones((1, 3)))
    >>> track_sources(jnp.array([[0, 0, 1, 2]]), plan, 2).tolist()
    [[1, 1, 0, 1]]

  Source: Bolya et al. (2023), whose code carries an N x N matrix instead.
  """
  so_far = plans.Merge(slot, jnp.ones_like(slot, dtype=jnp.float32))
  return plans.compose_plans(plan, so_far, num_outputs).slot


def merge_schedule(
  num_tokens: int,
  num_layers: int,
  num_merged: int | Sequence[int],
  *,
  inflection: int | float = 0,
  protected: int = 0,
) -> tuple[int, ...]:
  """How many tokens are left after each layer.

  Args:
    num_tokens: N at the first layer, protected ones included.
    num_layers: L.
    num_merged: r, tokens to merge per layer; or one number per layer, layers
      past the last merge none.
    inflection: from -1 to 1 with a single r: r falls or rises linearly over
      the layers, from int(r (1 - inflection)) to 2 r minus that; the total
      stays. -1 starts at 2 r and ends at 0.
    protected: tokens that are never merged.

  Returns:
    L counts for `num_keep`. A layer merges at most half of the rest.

  Raises:
    ValueError: for an inflection outside -1..1, or one beside a sequence.

  Example:
    >>> merge_schedule(197, 3, 16, protected=1)
    (181, 165, 149)

  Source: Bolya et al. (2023) and its code.
  """
  checks.in_range(-1, 1, inflection=inflection)
  checks.in_range(1, 1 << 20, num_layers=num_layers, num_tokens=num_tokens)
  if isinstance(num_merged, int):
    first = int(num_merged * (1 - inflection))
    step = (2 * num_merged - 2 * first) / max(num_layers - 1, 1)
    wanted = [int(first + step * layer) for layer in range(num_layers)]
  elif inflection:
    raise ValueError(
      f"inflection must be 0 beside a sequence, got {inflection}"
    )
  else:
    checks.in_range(1, num_layers, num_merged_layers=len(num_merged))
    wanted = [*num_merged, *[0] * (num_layers - len(num_merged))]
  counts = []
  for merged in wanted:
    num_tokens -= max(min(merged, (num_tokens - protected) // 2), 0)
    counts.append(num_tokens)
  return tuple(counts)

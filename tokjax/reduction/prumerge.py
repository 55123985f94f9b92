"""PruMerge and PruMerge+: keep attention outliers, add what is near to them.

How many tokens are kept is decided by each image; the number of rows is fixed
and the rest of them is masked.
"""

import functools

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.ops import attention_scores, packing, plans, similarity
from tokjax.reduction import types
from tokjax.typing import Array, Bool, Float

__all__ = ["prumerge", "prumerge_attention", "prumerge_plus"]


def prumerge(
  features: Float[Array, "B N D"],
  keys: Float[Array, "B N d"],
  attention: Float[Array, "B N"],
  mask: Bool[Array, "B N"] | None = None,
  *,
  num_keep: int,
  num_salient: int | None = None,
  num_neighbors: int = 32,
  order: str = "ascending",
  positions: str = "keep",
) -> types.Reduced:
  """Keeps outliers of attention, each with its neighbours added.

  Tokens whose attention a is above Q3 + 1.5 (Q3 - Q1) are kept, at least one.
  Each becomes x_i + sum of a_j x_j over its nearest tokens j by cosine of keys
  among *all* others, kept or not, and a last output is the sum of a_j x_j
  over the tokens that were dropped. Weights are not normalised.

  Args:
    features: of the layer before the last one.
    keys: of the last layer, all heads side by side. No gradient flows.
    attention: of [CLS] to each token, see `prumerge_attention`. No gradient
      flows.
    mask: True where a token counts; None for all.
    num_keep: rows, static, at least 2, one of them for the dropped tokens. Of
      more outliers than fit, those of the lowest attention are dropped.
    num_salient: keep so many of the most attended, static, instead of the
      outliers (budgets of others).
    num_neighbors: static; 32 in the published code.
    order: "ascending", or "attention" as the published code does (the most
      attended first).
    positions: "keep" or "renumber" (as the published code does).

  Returns:
    Kept tokens, then the one for the dropped, whose `index` is the most
    attended of them. `size` shares each token in proportion to its weights.

  Raises:
    ValueError: if counts are out of range, or sizes disagree.

  Example:
    >>> import functools
    >>> import jax, jax.numpy as jnp
    >>> x = jnp.array([[[4.0], [1.0], [2.0], [1.0]]])
    >>> keys = jnp.array([[[1.0, 0], [0, 1], [1, 0.1], [-1, 0]]])
    >>> a = jnp.array([[0.5, 0.125, 0.125, 0.0625]])
    >>> reduce = functools.partial(prumerge, num_keep=2, num_neighbors=1)
    >>> jax.jit(reduce)(x, keys, a).tokens.tolist()
    [[[4.25], [0.4375]]]

  Cost: 2 K N d + 2 K N D FLOPs, K N floats; the published code loops.

  Source: Shang et al. (2024), "LLaVA-PruMerge: Adaptive Token Reduction for
  Efficient Large Multimodal Models", and its code, which takes the quartiles
  over the whole batch; here each image has its own. Sizes are ours.
  """
  salient = _salient(features, keys, attention, mask, num_keep, num_salient)
  return _reduce(
    features,
    keys,
    attention,
    mask,
    salient,
    jnp.zeros_like(salient),
    num_keep=num_keep,
    num_neighbors=num_neighbors,
    order=order,
    positions=positions,
  )


def prumerge_plus(
  features: Float[Array, "B N D"],
  keys: Float[Array, "B N d"],
  attention: Float[Array, "B N"],
  mask: Bool[Array, "B N"] | None = None,
  *,
  num_keep: int,
  num_salient: int | None = None,
  stride: int | None = None,
  num_neighbors: int = 32,
  order: str = "ascending",
  positions: str = "keep",
) -> types.Reduced:
  """As `prumerge`, and evenly spaced tokens are kept beside the outliers.

  The valid tokens 0, stride, 2 stride, ... before the last one are kept too.

  Args:
    features: as in `prumerge`.
    keys: as in `prumerge`.
    attention: as in `prumerge`.
    mask: True where a token counts; None for all.
    num_keep: rows, static, at least 2, one of them for the dropped tokens. Of
      more tokens than fit, those of the lowest attention are dropped.
    num_salient: as in `prumerge`.
    stride: static; None for a third of the number of tokens per outlier,
      rounded down twice, as in the published code. Budgets of others give
      (num_salient, 3 stride): 64 tokens (13, 33), 128 (40, 18), 256 (95, 9).
    num_neighbors: as in `prumerge`.
    order: "ascending", or "attention" as the published code does (outliers
      first, the most attended at the head, then the spaced tokens).
    positions: "keep" or "renumber" (as the published code does).

  Returns:
    Kept tokens, then the one for the dropped.

  Raises:
    ValueError: if counts are out of range, or sizes disagree.

  Example:
    >>> import functools
    >>> import jax, jax.numpy as jnp
    >>> x, a = jnp.ones((1, 6, 2)), jnp.array([[0.1, 0.1, 0.5, 0.1, 0.1, 0.1]])
    >>> reduce = functools.partial(prumerge_plus, num_keep=4, stride=3)
    >>> jax.jit(reduce)(x, x, a).index.tolist()
    [[0, 2, 3, 1]]

  Cost: as `prumerge`.

  Source: Shang et al. (2024) and its code; rounding of the stride inferred.
  """
  salient = _salient(features, keys, attention, mask, num_keep, num_salient)
  if mask is None:
    mask = jnp.ones_like(salient)
  number = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
  count = jnp.sum(mask, axis=1, keepdims=True, dtype=jnp.int32)
  if stride is None:
    outliers = jnp.sum(salient, axis=1, keepdims=True, dtype=jnp.int32)
    step = jnp.maximum(count // jnp.maximum(outliers, 1) // 3, 1)
  else:
    checks.in_range(1, features.shape[1], stride=stride)
    step = jnp.full_like(count, stride)
  step = jnp.broadcast_to(step, mask.shape)
  last = jnp.broadcast_to(count - 1, mask.shape)
  spaced = mask & (number % step == 0) & (number < last) & ~salient
  return _reduce(
    features,
    keys,
    attention,
    mask,
    salient,
    spaced,
    num_keep=num_keep,
    num_neighbors=num_neighbors,
    order=order,
    positions=positions,
  )


def prumerge_attention(
  query: Float[Array, "B d"],
  keys: Float[Array, "B N d"],
  mask: Bool[Array, "B N"] | None = None,
) -> Float[Array, "B N"]:
  """Attention of [CLS] over the last layer, all heads as one.

  Args:
    query: of [CLS], all heads side by side (d = 1024 in CLIP ViT-L).
    keys: of all tokens, [CLS] included.
    mask: True where a token counts; None for all.

  Returns:
    float32 softmax(query keys / sqrt(d)). Cut off the first, then give the
    rest to `prumerge`.

  Example:
    >>> import jax.numpy as jnp
    >>> prumerge_attention(jnp.zeros((1, 4)), jnp.zeros((1, 2, 4))).tolist()
    [[0.5, 0.5]]

  Cost: 2 N d FLOPs.

  Source: the code of Shang et al. (2024); it is not the model's own attention
  of many heads.
  """
  rows = attention_scores.row_attention(
    query[:, None, None], keys[:, None], mask
  )
  return rows[:, 0, 0]


def _salient(features, keys, attention, mask, num_keep, num_salient):
  """Checks sizes; True at the tokens that attention singles out."""
  num_tokens = features.shape[1]
  checks.in_range(2, num_tokens, num_keep=num_keep)
  checks.same_size(
    features=num_tokens,
    keys=keys.shape[1],
    attention=attention.shape[1],
    mask=num_tokens if mask is None else mask.shape[1],
  )
  attention = jax.lax.stop_gradient(attention).astype(jnp.float32)
  if num_salient is None:
    found = attention_scores.iqr_upper(attention, mask)
    num_salient = 1  # where there is no outlier
  else:
    checks.in_range(1, num_keep - 1, num_salient=num_salient)
    found = jnp.zeros_like(attention, dtype=bool)
  first = packing.keep_top_k(attention, num_salient, mask)
  return found | jax.vmap(_member)(first, found)


def _reduce(
  features,
  keys,
  attention,
  mask,
  salient,
  spaced,
  *,
  num_keep,
  num_neighbors,
  order,
  positions,
):
  checks.in_range(1, 1 << 30, num_neighbors=num_neighbors)
  checks.one_of(("ascending", "attention"), order=order)
  if mask is None:
    mask = jnp.ones_like(salient)
  keys = jnp.where(mask[..., None], jax.lax.stop_gradient(keys), 0)
  keys = similarity.safe_normalize(keys.astype(jnp.float32))
  weight = jax.lax.stop_gradient(attention).astype(jnp.float32)
  weight = jnp.where(mask, weight, 0)
  one = functools.partial(
    _plan,
    num_kept=num_keep - 1,
    num_neighbors=min(num_neighbors, mask.shape[1]),
    order=order,
  )
  plan, index, exists = jax.vmap(one)(keys, weight, mask, salient, spaced)
  return types.fused(features, plan, index, exists, positions=positions)


def _plan(
  keys, weight, mask, salient, spaced, *, num_kept, num_neighbors, order
):
  """The matrix of one example, [K, N], its index and its mask."""
  num_tokens = mask.shape[0]
  kept = packing.pack(salient | spaced, num_kept, weight)
  place = jnp.cumsum(jnp.ones_like(mask, dtype=jnp.int32)) - 1
  itself = kept.index[:, None] == place[None, :]  # [K - 1, N]
  cosine = jnp.matmul(
    keys[kept.index],
    keys.T,
    precision="highest",
    preferred_element_type=jnp.float32,
  )
  cosine = jnp.where(mask[None, :] & ~itself, cosine, -jnp.inf)
  found, near = jax.lax.top_k(cosine, num_neighbors)
  near = jnp.where(found > -jnp.inf, near, num_tokens)
  chosen = jax.vmap(lambda row, at: row.at[at].set(True, mode="drop"))(
    jnp.zeros_like(itself), near
  )
  rows = jnp.where(itself, 1, jnp.where(chosen, weight[None, :], 0))
  rows = jnp.where(kept.mask[:, None], rows, 0)
  dropped = mask & ~_member(kept, mask)
  rows = jnp.concatenate([rows, jnp.where(dropped, weight, 0)[None, :]])
  heaviest = jnp.argmax(jnp.where(dropped, weight, -jnp.inf))
  some = jnp.any(dropped)
  heaviest = jnp.where(some, heaviest, num_tokens - 1).astype(jnp.int32)
  index = jnp.concatenate([kept.index, heaviest[None]])
  exists = jnp.concatenate([kept.mask, some[None]])

  sort_key = kept.index
  if order == "attention":
    rank = jnp.argsort(jnp.argsort(-weight, stable=True), stable=True)
    rank = rank[kept.index].astype(jnp.int32)
    sort_key = jnp.where(salient[kept.index], rank, num_tokens + kept.index)
  # The one for the dropped follows those kept, then come the rows not used.
  sort_key = jnp.concatenate([sort_key, jnp.full_like(sort_key[:1], 1 << 30)])
  sort_key = jnp.where(exists, sort_key, (1 << 30) + 1)
  sequence = jnp.argsort(sort_key, stable=True)
  rows, index, exists = rows[sequence], index[sequence], exists[sequence]
  index = jnp.where(exists, index, num_tokens - 1)
  total = jnp.sum(rows, axis=0)[None, :]
  share = rows / jnp.where(total > 0, total, 1)
  return plans.Transform(rows, share), index, exists


def _member(kept, mask):
  """True at the positions that were kept, [N]."""
  place = jnp.where(kept.mask, kept.index, mask.shape[0])
  return jnp.zeros_like(mask).at[place].set(True, mode="drop")

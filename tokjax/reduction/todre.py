"""ToDRE: keep unlike tokens, then drop all once attention has left them."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.kernels.column_attention import column_attention
from tokjax.kernels.greedy_select import greedy_select, similarity_table
from tokjax.ops import similarity
from tokjax.reduction import types
from tokjax.typing import Array, Bool, Float, Implementation, Int32

__all__ = [
  "CrossModalRatio",
  "cls_pivot",
  "cross_modal_ratio",
  "should_drop",
  "todre",
]

SYSTEM, VISION, TEXT = range(3)


class CrossModalRatio(NamedTuple):
  """Shares of attention that cross from one modality to the other, 0..1.

  Attributes:
    text_to_vision: of the attention of text tokens, what visual tokens get.
    vision_to_text: of the attention of visual tokens, what text tokens get.
  """

  text_to_vision: Float[Array, "*batch"]
  vision_to_text: Float[Array, "*batch"]


def todre(
  features: Float[Array, "B N D"],
  pivot: Int32[Array, " B"],
  mask: Bool[Array, "B N"] | None = None,
  *,
  num_keep: int,
  objective: Literal["max_sum", "k_center"] = "max_sum",
  positions: Literal["keep", "renumber"] = "keep",
  implementation: Implementation | None = None,
) -> types.Reduced:
  """Stage 1: keeps tokens unlike each other, starting from a pivot.

  With cosine similarities, each step takes

      max_sum    argmin_j sum_{c kept} cos(c, j)
      k_center   argmax_j min_{c kept} 1 - cos(c, j)

  max_sum may keep near-duplicates of tokens at the rim (look at the smallest
  distance beside the accuracy); k_center does not.

  Args:
    features: visual tokens after the projector.
    pivot: token to begin with, see `cls_pivot`; a masked one is replaced by the
      first valid token.
    mask: True where the token is real; None for all.
    num_keep: K, static, at most N. The paper keeps a quarter or a tenth.
    objective: "max_sum" (the revised paper) or "k_center" (the first version).
    positions: "keep" the original position ids or "renumber" them.
    implementation: of the selection, see `greedy_select`.

  Returns:
    The kept tokens in their original order.

  Raises:
    ValueError: if sizes disagree, `num_keep` is out of range, or a setting is
      unknown.
    NotImplementedError: if the named implementation cannot take the table.

  Example:
    >>> import jax, numpy as np
    >>> angle = np.deg2rad([0.0, 10, 20, 90, 100, 180])
    >>> x = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    >>> reduce = jax.jit(todre, static_argnames="num_keep")
    >>> reduce(x[None], np.array([1]), num_keep=4).index.tolist()
    [[0, 1, 4, 5]]

  Cost: 2 N^2 D FLOPs and 4 N^2 bytes for the similarities, then O(K N).

  Source: Li et al. (2025), "ToDRE: Visual Token Pruning via Diversity and Task
  Awareness for Efficient Large Vision-Language Models", from the text; no code
  is released. The original order of the result is our reading.
  """
  checks.has_rank(3, features=features)
  checks.in_range(1, features.shape[1], num_keep=num_keep)
  checks.one_of(("max_sum", "k_center"), objective=objective)
  checks.same_size(features=features.shape[0], pivot=pivot.shape[0])
  if mask is None:
    mask = jnp.ones_like(features[:, :, 0], dtype=bool)
  checks.same_size(features_tokens=features.shape[1], mask_tokens=mask.shape[1])
  x = jax.lax.stop_gradient(features).astype(jnp.float32)
  table = jax.vmap(similarity_table)(similarity.safe_normalize(x), mask)
  picks = greedy_select(
    table,
    mask,
    num_keep=num_keep,
    objective="max_sum" if objective == "max_sum" else "max_min",
    first=pivot,
    implementation=implementation,
  )
  return types.selected(features, picks.index, picks.mask, positions=positions)


def cls_pivot(
  attention: Float[Array, "B H N"], mask: Bool[Array, "B N"] | None = None
) -> Int32[Array, " B"]:
  """The token that the [CLS] token attends to most, over all heads.

  Args:
    attention: softmax row of [CLS] in the last encoder layer, per head, over
      patch tokens (`tokjax.ops.attention_scores.row_attention`). The frames of
      a video stand side by side: the best of the frames' best is the best.
    mask: where the pivot may be; of a tiled image the thumbnail. None for all.

  Returns:
    Positions, ties to the lower one; 0 where nothing is allowed.

  Raises:
    ValueError: if the token axes disagree.

  Example:
    >>> import jax.numpy as jnp
    >>> row = jnp.array([[[0.2, 0.5, 0.3], [0.1, 0.2, 0.7]]])
    >>> cls_pivot(row).tolist()
    [2]

  Source: Li et al. (2025), "ToDRE"; the mean over heads is our reading. For an
  encoder without [CLS] the paper finds a random token about as good.
  """
  score = jnp.mean(attention.astype(jnp.float32), axis=1)  # [B, N]
  if mask is not None:
    checks.same_size(attention=attention.shape[2], mask=mask.shape[1])
    score = jnp.where(mask, score, -jnp.inf)
  return jnp.argmax(score, axis=1).astype(jnp.int32)


def cross_modal_ratio(
  q: Float[Array, "B H S d"],
  k: Float[Array, "B Hk S d"],
  kinds: Int32[Array, "B S"],
  *,
  scale: float | None = None,
  causal: bool = True,
  implementation: Implementation | None = None,
) -> CrossModalRatio:
  """Stage 2: how much text and visual tokens still look at each other.

      text_to_vision = mean over heads and text rows i of sum_{j visual} A_ij
      vision_to_text = the same with the kinds exchanged

  for the softmax attention A of one layer, which is never written out.

  Args:
    q: queries of the layer, after position encoding.
    k: keys of the layer; Hk divides H.
    kinds: 0 for system, 1 for visual, 2 for text tokens, -1 for padding, which
      neither gives nor receives.
    scale: factor of the inner products, static; None for d ** -0.5.
    causal: whether a token sees only those up to itself, static. With the
      image before the question `vision_to_text` is then exactly 0.
    implementation: of the attention, see `column_attention`.

  Returns:
    float32 ratios per example; 0 where there are no rows of a kind.

  Raises:
    ValueError: if sizes disagree.
    NotImplementedError: if the named implementation cannot take the arguments.

  Example:
    >>> import jax.numpy as jnp
    >>> q = jnp.zeros((1, 1, 4, 2))
    >>> kinds = jnp.array([[0, 1, 1, 2]])
    >>> float(cross_modal_ratio(q, q, kinds).text_to_vision[0])
    0.5

  Cost: 4 H S^2 d FLOPs (half of it where causal), memory O(H S).

  Source: Li et al. (2025), "ToDRE". Rows of a softmax sum to 1, so the paper's
  denominators are the numbers of rows.
  """
  checks.same_size(q=q.shape[2], k=k.shape[2], kinds=kinds.shape[1])

  def share(rows, columns):
    own = (kinds == rows).astype(jnp.float32)  # [B, S]
    weight = own / jnp.maximum(jnp.sum(own, axis=1), 1)[:, None]
    received = column_attention(
      q,
      k,
      kinds >= 0,
      weight,
      scale=scale,
      causal=causal,
      implementation=implementation,
    ).received
    mean = jnp.mean(received, axis=1)  # [B, S]
    return jnp.sum(jnp.where(kinds == columns, mean, 0), axis=1)

  return CrossModalRatio(share(TEXT, VISION), share(VISION, TEXT))


def should_drop(
  ratio: CrossModalRatio, *, threshold: float | Float[Array, ""] = 0.1
) -> Bool[Array, "*batch"]:
  """Stage 2: whether the later layers can do without visual tokens.

  Args:
    ratio: measured in layer 7 L / 8 of L (28 of 32), per example.
    threshold: static or traced; the paper's default. 0 never drops, above 1
      always.

  Returns:
    True where both ratios are below the threshold. The visual keys of earlier
    layers stay in their caches.

  Example:
    >>> import jax.numpy as jnp
    >>> should_drop(CrossModalRatio(jnp.array([0.07]), jnp.zeros(1))).tolist()
    [True]

  Source: Li et al. (2025), "ToDRE".
  """
  low = ratio.text_to_vision < threshold
  return low & (ratio.vision_to_text < threshold)

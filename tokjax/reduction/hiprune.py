"""HiPrune: anchors, their neighbours and registers, from encoder attention."""

import functools

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.kernels import column_attention as columns
from tokjax.ops import similarity
from tokjax.reduction import types
from tokjax.typing import Array, Bool, Float, Implementation, Int32

__all__ = ["hiprune", "received_scores"]


def received_scores(
  q: Float[Array, "B H S d"],
  k: Float[Array, "B Hk S d"],
  mask: Bool[Array, "B S"] | None = None,
  *,
  num_prefix: int = 1,
  segment_ids: Int32[Array, "B S"] | None = None,
  group_size: int = 1,
  scale: float | None = None,
  implementation: Implementation | None = None,
) -> Float[Array, "B N"]:
  """Attention that each patch receives in one encoder layer.

  The mean over heads and over all valid query rows, those of [CLS] included,
  of the softmax attention to each patch. No attention matrix is held.

  Args:
    q: queries of all tokens of the layer.
    k: their keys.
    mask: True where a token exists; None for all.
    num_prefix: tokens in front of the patches ([CLS]); they attend, but get no
      score. Qwen encoders have none: 0.
    segment_ids: windows of a windowed layer: tokens of equal id see each other.
    group_size: patches that the host merges into one token, four in Qwen; the
      scores of each run of so many are averaged, static. Undo a reordering by
      windows on the result.
    scale: factor of the inner products, static; None for d ** -0.5.
    implementation: as in `column_attention`.

  Returns:
    float32 scores without gradient, N = (S - num_prefix) / group_size.

  Raises:
    ValueError: if sizes disagree.

  Example:
    >>> import jax.numpy as jnp
    >>> x = jnp.zeros((1, 2, 5, 4))
    >>> [round(score, 4) for score in received_scores(x, x)[0].tolist()]
    [0.2, 0.2, 0.2, 0.2]

  Cost: that of `column_attention`.

  Source: Liu et al. (2025), "HiPrune: Training-Free Visual Token Pruning via
  Hierarchical Attention in Vision-Language Models". The published Qwen code
  sums over rows; here it is the mean everywhere, which ranks alike.
  """
  checks.same_size(q_tokens=q.shape[2], k_tokens=k.shape[2])
  checks.in_range(0, k.shape[2] - 1, num_prefix=num_prefix)
  checks.in_range(1, k.shape[2], group_size=group_size)
  checks.divisible(group_size, patches=k.shape[2] - num_prefix)
  weight = None
  if mask is not None:
    count = jnp.maximum(jnp.sum(mask, axis=1), 1)
    weight = mask / count[:, None]
  received = columns.column_attention(
    q,
    k,
    mask,
    weight,
    scale=scale,
    segment_ids=segment_ids,
    implementation=implementation,
  ).received
  patches = jnp.mean(received, axis=1)[:, num_prefix:]
  if group_size == 1:
    return patches
  return jnp.mean(patches.reshape(patches.shape[0], -1, group_size), axis=-1)


def hiprune(
  features: Float[Array, "B N D"],
  shallow: Float[Array, "B N"],
  deep: Float[Array, "B N"],
  mask: Bool[Array, "B N"] | None = None,
  text: Float[Array, "B T D"] | None = None,
  text_mask: Bool[Array, "B T"] | None = None,
  *,
  num_keep: int,
  grid: tuple[int, int],
  alpha: float = 0.1,
  beta: float = 0.1,
  compat: str = "grid",
  positions: str = "keep",
) -> types.Reduced:
  """Keeps anchors, the tokens around them, and registers.

      anchors   = the round(num_keep * alpha / 5) highest of `shallow`
      buffers   = their neighbours left, right, above and below
      registers = the highest of `deep` among the rest, up to `num_keep`

  Should anchors and buffers be more than `num_keep`, anchors go first, then
  buffers by `shallow`.

  The published code takes neighbours by position in the flat order: the right
  neighbour of the last token of a row is the first of the next row, and a
  neighbour outside the grid becomes token 0 or N - 1. It keeps anchors and
  buffers out of the registers by subtracting 1 from `deep`, which is enough
  for means over rows, but not for the sums over rows of its Qwen port: there
  they may be picked twice, and fewer than `num_keep` tokens are left.
  `compat="reference"` does all that.

  HiPrune++ keeps round(beta * num_keep) tokens on top, those with the highest
  cosine to the mean text embedding; give `text` for it, and `features` in the
  embedding space of the language model.

  Args:
    features: visual tokens in raster order.
    shallow: attention received in a middle, object-centric layer, such as
      `received_scores` of layer 9 (counted from 1) of CLIP ViT-L.
    deep: the same of the layer whose features are used, the penultimate.
    mask: True where a token exists; None for all.
    text: token embeddings of the question, for HiPrune++.
    text_mask: True where a text token exists; None for all.
    num_keep: tokens to keep, static, at most N.
    grid: rows and columns of the token grid, static; their product is N.
    alpha: share of `num_keep` for anchors and buffers, 0..1, static. The
      paper's is 0.1.
    beta: share of `num_keep` on top for the text, static; used with `text`.
      The paper's is 0.1.
    compat: "grid" for neighbours on the grid, or "reference", static.
    positions: "keep" (the Qwen code) or "renumber" (the LLaVA code).

  Returns:
    The kept tokens in raster order, `num_keep` of them, plus those for the
    text. They keep their gradient; scores and text get none. Ties go to the
    lower index.

  Raises:
    ValueError: if sizes disagree, a share or the number of kept tokens is out
      of range, or `compat` is unknown.

  Example:
    >>> import functools
    >>> import jax, numpy as np
    >>> shallow, deep = np.zeros((1, 16)), np.full((1, 16), 0.03)
    >>> shallow[0, 5] = 1.0
    >>> deep[0, [0, 3, 15]] = 0.2, 0.15, 0.1
    >>> reduce = jax.jit(functools.partial(
    ...     hiprune, num_keep=8, grid=(4, 4), alpha=0.625))
    >>> reduce(np.ones((1, 16, 2)), shallow, deep).index.tolist()
    [[0, 1, 3, 4, 5, 6, 9, 15]]

  Cost: sorts of N numbers; for the text 2 N D FLOPs.

  Source: as `received_scores`. Among the text's tokens we count only those
  that are not kept already, so that the number is fixed; how buffers yield
  when there is no room is ours too.
  """
  num_tokens = features.shape[1]
  checks.same_size(
    features_tokens=num_tokens,
    shallow_tokens=shallow.shape[1],
    deep_tokens=deep.shape[1],
  )
  checks.same_size(features_tokens=num_tokens, grid_cells=grid[0] * grid[1])
  checks.in_range(1, num_tokens, num_keep=num_keep)
  checks.in_range(0, 1, alpha=alpha, beta=beta)
  checks.one_of(("grid", "reference"), compat=compat)
  if mask is None:
    mask = jnp.ones_like(features[..., 0], dtype=bool)
  checks.same_size(features_tokens=num_tokens, mask_tokens=mask.shape[1])
  num_text = 0 if text is None else round(beta * num_keep)
  checks.in_range(1, num_tokens, num_keep_with_text=num_keep + num_text)
  scores = [mask]
  for score in (shallow, deep):
    score = jax.lax.stop_gradient(score).astype(jnp.float32)
    scores.append(jnp.where(mask, score, -jnp.inf))
  closeness = None
  if num_text:
    closeness = jax.vmap(_closeness)(
      *_with_mask(features, mask, text, text_mask)
    )
  choose = functools.partial(
    _choose,
    num_keep=num_keep,
    num_text=num_text,
    num_anchors=round(num_keep * alpha / 5),
    grid=grid,
    compat=compat,
  )
  picks, kept = jax.vmap(choose)(*scores, closeness)
  return types.selected(features, picks, kept, positions=positions)


def _with_mask(features, mask, text, text_mask):
  checks.same_size(features_dim=features.shape[2], text_dim=text.shape[2])
  if text_mask is None:
    text_mask = jnp.ones_like(text[..., 0], dtype=bool)
  checks.same_size(text_tokens=text.shape[1], mask_tokens=text_mask.shape[1])
  features, text = jax.lax.stop_gradient((features, text))
  return features, mask, text, text_mask


def _closeness(features, mask, text, text_mask):
  """Cosine of each token to the mean text embedding, up to a factor, [N]."""
  wide = jnp.where(text_mask[:, None], text.astype(jnp.float32), 0)
  mean = jnp.sum(wide, axis=0) / jnp.maximum(jnp.sum(text_mask), 1)  # [D]
  features = jnp.where(mask[:, None], features.astype(jnp.float32), 0)
  unit = similarity.safe_normalize(features)
  # The length of the mean changes no order.
  return jnp.matmul(unit, mean, precision="highest")


def _choose(
  mask, shallow, deep, closeness, *, num_keep, num_text, num_anchors, **rules
):
  """Positions [K] of one example, and whether each counts."""
  anchor = _first(shallow, mask, num_anchors)  # [N]
  around = _neighbours(anchor, **rules) & mask & ~anchor
  chosen = anchor | around
  candidates = mask
  if rules["compat"] == "reference":
    registers = _first(deep - chosen, mask, num_keep - jnp.sum(chosen))
    candidates = chosen | registers
  tier = jnp.where(candidates, 2.0 * anchor + around, -1.0)
  score = jnp.where(chosen, shallow, deep)
  kept = candidates & (_rank(tier, score) < num_keep)
  if num_text:
    rest = mask & ~kept
    kept = kept | _first(jnp.where(rest, closeness, -jnp.inf), rest, num_text)
  capacity = num_keep + num_text
  position = jnp.arange(kept.shape[0], dtype=jnp.int32)
  picks = jnp.sort(jnp.where(kept, position, kept.shape[0]))[:capacity]
  return picks, picks < kept.shape[0]


def _first(score, mask, count):
  """The `count` highest valid scores, as a mask."""
  return mask & (_rank(mask.astype(jnp.float32), score) < count)


def _rank(major, minor):
  """Place of each token, highest `major` then `minor` then lower index first.

  Args:
    major: float32[N].
    minor: float32[N].

  Returns:
    int32[N], a permutation of 0..N - 1.
  """
  position = jax.lax.broadcasted_iota(jnp.int32, major.shape, 0)
  order = jax.lax.sort((-major, -minor, position), num_keys=3)[2]
  return jnp.argsort(order)


def _neighbours(anchor, *, grid, compat):
  """Tokens beside the anchors, [N]."""
  rows, columns = grid
  if compat == "grid":
    cells = anchor.reshape(rows, columns)
    padded = jnp.pad(cells, 1)
    around = (
      padded[:-2, 1:-1]
      | padded[2:, 1:-1]
      | padded[1:-1, :-2]
      | padded[1:-1, 2:]
    )
    return around.reshape(-1)
  last = rows * columns - 1
  around = jnp.zeros_like(anchor)
  for step in (-1, 1, -columns, columns):
    # Position p comes from anchor p - step; what falls outside is clamped.
    edge = min(abs(step), last + 1)
    shifted = jnp.pad(anchor, (max(step, 0), max(-step, 0)))
    shifted = shifted[: last + 1] if step > 0 else shifted[-step:]
    outside = anchor[-edge:] if step > 0 else anchor[:edge]
    end = last if step > 0 else 0
    place = jnp.arange(last + 1, dtype=jnp.int32)
    around = around | shifted | ((place == end) & jnp.any(outside))
  return around

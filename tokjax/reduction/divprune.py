"""DivPrune: keep the tokens that lie farthest from each other."""

from typing import Literal

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.kernels.greedy_select import (
  greedy_select,
  greedy_select_features,
  similarity_table,
)
from tokjax.ops import similarity
from tokjax.reduction import types
from tokjax.typing import Array, Bool, Float, Implementation, Int32

__all__ = ["divprune"]

# Tokens up to which all N x N similarities are held, 64 MiB an image.
_LARGEST_TABLE = 4096

_SIMILARITY = {"cosine": "inner", "l1": "l1", "l2": "squared_l2"}


def divprune(
  features: Float[Array, "B N D"],
  mask: Bool[Array, "B N"] | None = None,
  start: Int32[Array, " B"] | None = None,
  *,
  num_keep: int,
  metric: Literal["cosine", "l1", "l2"] = "cosine",
  first: Literal["isolated", "index"] = "isolated",
  gram: Literal["table", "stream"] | None = None,
  positions: Literal["keep", "renumber"] = "keep",
  implementation: Implementation | None = None,
) -> types.Reduced:
  """Keeps tokens whose smallest distance to each other is as large as can be.

  Greedy max-min: begins with the most isolated token, the one whose nearest
  other token is farthest; then takes, `num_keep - 1` times, the token whose
  nearest kept token is farthest:

      argmax_j min_{c kept} distance(c, j)        cosine: 1 - <x_c, x_j>

  Looks at no text and no attention and has nothing to train. For a metric
  (l1, l2, and the square root of the cosine distance) the smallest distance is
  at least half of the best possible one.

  Args:
    features: tokens as the language model would see them, after the projector;
      of all tiles of an image together.
    mask: True where the token is real; None for all.
    start: token to begin with where `first` is "index"; None for token 0.
    num_keep: K, static, at most N. The published runs keep
      round(0.098 * 576) = 56 of an image.
    metric: distance; "cosine" is the paper's default, the others are from its
      ablation.
    first: "isolated" (reference code) or "index", which makes it the greedy
      k-center of `start`.
    gram: "table" holds N x N float32 similarities, "stream" computes one row
      a step. None: the table up to 4,096 tokens.
    positions: "keep" the original position ids (ours) or "renumber" them, as
      the reference code does.
    implementation: of the selection, see `greedy_select`; "table" only.

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
    >>> reduce = jax.jit(divprune, static_argnames="num_keep")
    >>> reduce(x[None], num_keep=4).index.tolist()
    [[0, 2, 3, 5]]

  Cost: 2 N^2 D FLOPs and 4 N^2 bytes for the table, then O(K N). "stream":
  2 K N D, and as many FLOPs as the table where the start is "isolated".

  Source: Alvar et al. (2025), "DivPrune: Diversity-based Visual Token Pruning
  for Large Multimodal Models". The distance, the first token and the steps are
  the reference code's. It takes the minimum over all kept rows anew at each
  step, reads one image of a batch, and returns a token twice once every token
  left equals a kept one; the running minimum, batches, masks and the rule that
  a token is kept once are ours. Vectors of length zero are at cosine distance
  1 from everything.
  """
  checks.has_rank(3, features=features)
  batch, num_tokens, _ = features.shape
  checks.in_range(1, num_tokens, num_keep=num_keep)
  checks.one_of(tuple(_SIMILARITY), metric=metric)
  checks.one_of(("isolated", "index"), first=first)
  checks.one_of((None, "table", "stream"), gram=gram)
  if start is not None and first == "isolated":
    raise ValueError('start has no meaning where first is "isolated"')
  if gram is None:
    gram = "table" if num_tokens <= _LARGEST_TABLE else "stream"
  if gram == "stream" and implementation is not None:
    raise ValueError('implementation has no meaning where gram is "stream"')
  if mask is not None:
    checks.same_size(features_tokens=num_tokens, mask_tokens=mask.shape[1])
  if first == "index" and start is None:
    start = jnp.zeros_like(features[:, 0, 0], dtype=jnp.int32)

  x = jax.lax.stop_gradient(features).astype(jnp.float32)
  if metric == "cosine":
    x = similarity.safe_normalize(x)
  kind = _SIMILARITY[metric]
  if gram == "stream":
    picks = greedy_select_features(
      x, mask, num_keep=num_keep, similarity=kind, first=start
    )
  else:
    if mask is None:
      table = jax.vmap(lambda x: similarity_table(x, similarity=kind))(x)
    else:
      table = jax.vmap(lambda x, m: similarity_table(x, m, similarity=kind))(
        x, mask
      )
    picks = greedy_select(
      table,
      mask,
      num_keep=num_keep,
      first=start,
      implementation=implementation,
    )
  return types.selected(features, picks.index, picks.mask, positions=positions)

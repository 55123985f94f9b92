"""CATP: prune the images of in-context examples, before and inside a model."""

from typing import Literal

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.kernels.greedy_select import greedy_select
from tokjax.ops import similarity
from tokjax.reduction import types
from tokjax.typing import Array, Bool, Float, Implementation

__all__ = ["catp_context", "catp_query", "catp_stage1"]


def catp_stage1(
  features: Float[Array, "B N D"],
  text_mean: Float[Array, "B D"],
  mask: Bool[Array, "B N"] | None = None,
  *,
  num_keep: int,
  alignment_weight: float | Float[Array, ""] = 0.7,
  positions: Literal["keep", "renumber"] = "keep",
  implementation: Implementation | None = None,
) -> types.Reduced:
  """Stage 1: keeps tokens that cover their image and agree with its text.

  With sim(a, b) = (1 + cos(a, b)) / 2, greedily maximises

      sum_i max_{j kept} sim(x_i, x_j)
        + alignment_weight sum_{j kept} sim(x_j, text_mean)

  Args:
    features: tokens of one image after the projector; every image, of examples
      and of the query, is an entry of the batch.
    text_mean: mean input embedding of the text that goes with the image.
    mask: True where the token is real; None for all.
    num_keep: K, static, at most N: floor(N (1 - R / 2)) where R of all image
      tokens shall go in the end, half of them here.
    alignment_weight: lambda_1, static or traced; the paper's 0.7. The first
      sum has N terms, the second K.
    positions: "keep" the original position ids or "renumber" them.
    implementation: of the selection, see `greedy_select`.

  Returns:
    The kept tokens in their original order.

  Raises:
    ValueError: if sizes disagree or `num_keep` is out of range.
    NotImplementedError: if the named implementation cannot take the table.

  Example:
    >>> import jax, numpy as np
    >>> angle = np.deg2rad([0.0, 10, 90, 170, 60])
    >>> x = np.stack([np.cos(angle), np.sin(angle)], axis=-1)[None]
    >>> reduce = jax.jit(catp_stage1, static_argnames="num_keep")
    >>> reduce(x[:, :4], x[:, 4], num_keep=2).index.tolist()
    [[1, 2]]

  Cost: 2 N^2 D FLOPs and 4 N^2 bytes, then 3 N^2 a step.

  Source: Li et al. (2026), "CATP: Contextually Adaptive Token Pruning for
  Efficient and Enhanced Multimodal In-Context Learning", from the text; no code
  is released. Order and positions are our reading.
  """
  checks.has_rank(3, features=features)
  checks.same_size(features=features.shape[0], text_mean=text_mean.shape[0])
  checks.same_size(features_dim=features.shape[2], text_dim=text_mean.shape[1])
  checks.in_range(1, features.shape[1], num_keep=num_keep)
  mask = _all_valid(features, mask)

  def one(features, text, mask):
    unit = _unit(features, mask)
    table = jnp.matmul(unit, unit.T, precision="highest")  # [N, N]
    aligned = jnp.matmul(unit, _unit(text), precision="highest")
    covered = jnp.where(mask[:, None], (1 + table) / 2, 0)
    return covered, alignment_weight * (1 + aligned) / 2

  table, bonus = jax.vmap(one)(features, text_mean, mask)
  picks = greedy_select(
    table,
    mask,
    num_keep=num_keep,
    objective="coverage",
    bonus=bonus,
    implementation=implementation,
  )
  return types.selected(features, picks.index, picks.mask, positions=positions)


def catp_context(
  hidden: Float[Array, "B N D"],
  attention: Float[Array, "B N"],
  attention_before: Float[Array, "B N"],
  query_mean: Float[Array, "B D"],
  mask: Bool[Array, "B N"] | None = None,
  *,
  num_keep: int,
  relevance_weight: float | Float[Array, ""] = 0.6,
  positions: Literal["keep", "renumber"] = "keep",
) -> types.Reduced:
  """Stage 2, layer l: keeps image tokens of the examples that the query needs.

      score_j = max(0, attention_j - attention_before_j)
                + relevance_weight cos(hidden_j, query_mean)

  All images of a prompt compete in one ranking: an example that has nothing to
  do with the query may lose all its tokens.

  Args:
    hidden: hidden states of layer l, image tokens of all examples in a row.
    attention: how the last token of the query attends to them in layer l, mean
      over heads, not renormalised.
    attention_before: the same in layer l - 1.
    query_mean: mean hidden state of layer l over all tokens of the query,
      image and text.
    mask: True where the token is real (and is one of an image); None for all.
    num_keep: K, static, at most N: (1 - R) of the tokens before stage 1.
    relevance_weight: lambda_2, static or traced; the paper's 0.6.
    positions: "keep" the original position ids or "renumber" them.

  Returns:
    The kept tokens in their original order; equal scores, such as all 0, go to
    the lower position.

  Raises:
    ValueError: if sizes disagree or `num_keep` is out of range.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> hidden = jnp.array([[[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]])
    >>> now, before = jnp.array([[0.1, 0.1, 0.5]]), jnp.full((1, 3), 0.1)
    >>> query = jnp.array([[1.0, 0.0]])
    >>> reduce = jax.jit(catp_context, static_argnames="num_keep")
    >>> reduce(hidden, now, before, query, num_keep=2).index.tolist()
    [[0, 2]]

  Cost: 2 N D FLOPs and one row of attention from each of two layers.

  Source: Li et al. (2026), "CATP"; the paper uses l = 6 of a 7B model and 10 of
  13B. How the second half of R is split between examples and query is not in
  the text: `num_keep` says it.
  """
  checks.has_rank(3, hidden=hidden)
  checks.same_size(
    hidden_tokens=hidden.shape[1],
    attention=attention.shape[1],
    attention_before=attention_before.shape[1],
  )
  checks.same_size(hidden_dim=hidden.shape[2], query_dim=query_mean.shape[1])
  checks.in_range(1, hidden.shape[1], num_keep=num_keep)

  growth = attention.astype(jnp.float32) - attention_before.astype(jnp.float32)
  mask = _all_valid(hidden, mask)
  cosine = jax.vmap(_cosine)(hidden, query_mean, mask)
  score = jnp.maximum(growth, 0) + relevance_weight * cosine
  return types.highest(
    hidden, score, mask, num_keep=num_keep, positions=positions
  )


def catp_query(
  hidden: Float[Array, "B N D"],
  context_mean: Float[Array, "B D"],
  mask: Bool[Array, "B N"] | None = None,
  *,
  num_keep: int,
  positions: Literal["keep", "renumber"] = "keep",
) -> types.Reduced:
  """Stage 2, layer l + 1: keeps tokens of the query image by the context.

  Args:
    hidden: hidden states of layer l + 1, tokens of the query image.
    context_mean: mean hidden state of layer l + 1 over the example tokens that
      are left, text included (our reading).
    mask: True where the token is real; None for all.
    num_keep: K, static, at most N.
    positions: "keep" the original position ids or "renumber" them.

  Returns:
    The tokens with the largest cosine to `context_mean`, in their original
    order; ties to the lower position.

  Raises:
    ValueError: if sizes disagree or `num_keep` is out of range.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> hidden = jnp.array([[[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]]])
    >>> context = jnp.array([[0.0, 1.0]])
    >>> reduce = jax.jit(catp_query, static_argnames="num_keep")
    >>> reduce(hidden, context, num_keep=2).index.tolist()
    [[1, 2]]

  Cost: 2 N D FLOPs.

  Source: Li et al. (2026), "CATP".
  """
  checks.has_rank(3, hidden=hidden)
  checks.same_size(
    hidden_dim=hidden.shape[2], context_dim=context_mean.shape[1]
  )
  checks.in_range(1, hidden.shape[1], num_keep=num_keep)
  mask = _all_valid(hidden, mask)
  score = jax.vmap(_cosine)(hidden, context_mean, mask)
  return types.highest(
    hidden, score, mask, num_keep=num_keep, positions=positions
  )


def _all_valid(features, mask):
  if mask is None:
    return jnp.ones_like(features[:, :, 0], dtype=bool)
  checks.same_size(tokens=features.shape[1], mask_tokens=mask.shape[1])
  return mask


def _unit(x, mask=None):
  """Vectors of length one, zero where masked; no gradient."""
  x = jax.lax.stop_gradient(x).astype(jnp.float32)
  if mask is not None:
    x = jnp.where(mask[:, None], x, 0)  # NaN padding must not spread
  return similarity.safe_normalize(x)


def _cosine(x, y, mask):
  """Cosine of every row of x [N, D] with y [D]."""
  return jnp.matmul(_unit(x, mask), _unit(y), precision="highest")

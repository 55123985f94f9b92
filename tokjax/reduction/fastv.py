"""FastV: keep the image tokens that the last prompt token looks at."""

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.ops import attention_scores
from tokjax.reduction import types
from tokjax.typing import Array, Bool, Float, Int32

__all__ = ["fastv", "fastv_scores"]


def fastv_scores(
  q: Float[Array, "B H 1 d"],
  k: Float[Array, "B Hk S d"],
  visual_index: Int32[Array, "B N"],
  mask: Bool[Array, "B S"] | None = None,
  *,
  scale: float | None = None,
) -> Float[Array, "B N"]:
  """Attention of the last prompt token to each image token, over heads.

  One row of one layer: the mean over heads of the softmax over the whole
  prompt, read at the image tokens. (The row of the last token is what the
  paper ranks by; the average over text tokens is another method.)

  Args:
    q: query of the last valid prompt token, in the layer whose attention
      decides, after rotary encoding.
    k: keys of the whole prompt in that layer; Hk divides H.
    visual_index: where the image tokens stand in the prompt.
    mask: True where a prompt token exists; None for all.
    scale: factor of the inner products; None for d ** -0.5.

  Returns:
    float32 scores without gradient; 0 at masked tokens.

  Raises:
    ValueError: if sizes disagree.

  Example:
    >>> import jax.numpy as jnp
    >>> q, k = jnp.ones((1, 2, 1, 4)), jnp.zeros((1, 1, 4, 4))
    >>> fastv_scores(q, k, jnp.array([[1, 2]])).tolist()
    [[0.25, 0.25]]

  Cost: 2 * H * S * d FLOPs a prompt.

  Source: Chen et al. (2024), "An Image is Worth 1/2 Tokens After Layer 2:
  Plug-and-Play Inference Acceleration for Large Vision-Language Models".
  Grouped keys are ours.
  """
  checks.same_size(last_rows=q.shape[2], one=1)
  checks.same_size(k_batch=k.shape[0], visual_batch=visual_index.shape[0])
  q, k = jax.lax.stop_gradient((q, k))
  rows = attention_scores.row_attention(q, k, mask, scale=scale)
  mean = jnp.mean(rows[:, :, 0, :], axis=1)  # [B, S]
  return jnp.take_along_axis(mean, visual_index, axis=1)


def fastv(
  features: Float[Array, "B N D"],
  scores: Float[Array, "B N"],
  mask: Bool[Array, "B N"] | None = None,
  *,
  num_keep: int,
  positions: str = "keep",
) -> types.Reduced:
  """Drops image tokens inside the language model, once, at prefill.

  After layer K - 1 has run, `scores` rank the hidden states of the image
  tokens; from layer K on, and in the cache, only `num_keep` are left. The
  paper's K is 2 and its ratio one half; the evaluation table uses K = 3.
  `num_keep` is round(N * (1 - ratio)).

  The published code has a second mode that masks attention instead of
  dropping tokens and ranks again at each decoded token; its accuracy figures
  come from that mode. This is the dropping one. There, too, K = 0 means a
  random choice; here use `controls.random_keep`.

  Args:
    features: hidden states of the image tokens.
    scores: as from `fastv_scores`.
    mask: True where an image token exists; None for all.
    num_keep: tokens to keep, static, at most N.
    positions: "keep" (the in-place code: rotary positions stay) or
      "renumber".

  Returns:
    The kept tokens in their original order; they keep their gradient, the
    scores get none. Ties go to the lower index.

  Raises:
    ValueError: if the token axes disagree or `num_keep` is out of range.

  Example:
    >>> import jax.numpy as jnp
    >>> scores = jnp.array([[0.1, 0.4, 0.2, 0.3]])
    >>> fastv(jnp.ones((1, 4, 2)), scores, num_keep=2).index.tolist()
    [[1, 3]]

  Cost: a selection of `num_keep` among N numbers, and a gather.

  Source: as `fastv_scores`. Later image tokens tend to score higher, a known
  bias of the last token's row.
  """
  return types.highest(
    features, scores, mask, num_keep=num_keep, positions=positions
  )

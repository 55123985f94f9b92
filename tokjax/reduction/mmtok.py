"""MMTok: keep the tokens that cover the question and the image."""

import re
from typing import Literal

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.kernels.greedy_select import greedy_select
from tokjax.ops import similarity
from tokjax.reduction import types
from tokjax.typing import Array, Bool, Float, Implementation

__all__ = ["NO_QUESTION", "STOP_WORDS", "clean_question", "mmtok"]

NO_QUESTION = "What do you see in this image?"

STOP_WORDS = frozenset(
  """
  a an the is are was were be been being have has had do does did it they he she
  we you i what where when why how who which and or but so if then question
  answer to for with by from at into onto upon
  """.split()
)

_INSTRUCTIONS = (
  "Answer the question using a single word or phrase.",
  "Answer with the option's letter from the given choices directly.",
)


def mmtok(
  features: Float[Array, "B N D"],
  vision: Float[Array, "B N E"],
  text: Float[Array, "B T D"],
  mask: Bool[Array, "B N"] | None = None,
  text_mask: Bool[Array, "B T"] | None = None,
  candidates: Bool[Array, "B N"] | None = None,
  *,
  num_keep: int,
  alpha: float | Float[Array, ""] = 0.5,
  text_temperature: float | Float[Array, ""] = 0.02,
  vision_temperature: float | Float[Array, ""] = 0.2,
  positions: Literal["keep", "renumber"] = "keep",
  implementation: Implementation | None = None,
) -> types.Reduced:
  """Keeps the tokens that best cover text tokens and all visual tokens.

  With cosines, and a softmax over the visual tokens j,

      P_ij = softmax_j(<text_i, features_j> / text_temperature) / T
      Q_ij = softmax_j(<vision_i, vision_j> / vision_temperature) / N

  greedily maximises sum_i max_{j kept} P_ij + alpha sum_i max_{j kept} Q_ij.
  The function is monotone and submodular, so the result has at least 1 - 1/e
  of the best value.

  Args:
    features: visual tokens after the projector; these are returned.
    vision: the same tokens before the projector, without [CLS].
    text: rows of the language model's input embedding for the cleaned question
      (`clean_question`), without a start token. Further texts, such as a
      drafted answer, are further rows.
    mask: True where the visual token is real; None for all.
    text_mask: True where the text token is real; None for all.
    candidates: True where a token may be kept; the others are still covered.
      The reference code excludes patches that lie in the square padding. None
      for all.
    num_keep: K, static, at most N.
    alpha: weight of the image, static or traced; the published 0.5.
    text_temperature: the published 0.02 (0.01 for Qwen), static or traced.
    vision_temperature: the published 0.2, static or traced.
    positions: "keep" the original position ids or "renumber" them.
    implementation: of the selection, see `greedy_select`.

  Returns:
    The kept tokens in their original order.

  Raises:
    ValueError: if sizes disagree or `num_keep` is out of range.
    NotImplementedError: if the named implementation cannot take the table.

  Example:
    >>> import jax, numpy as np
    >>> angle = np.deg2rad([0.0, 5, 90, 100, 95])
    >>> x = np.stack([np.cos(angle), np.sin(angle)], axis=-1)[None]
    >>> image, text = x[:, :4], x[:, 4:]
    >>> reduce = jax.jit(mmtok, static_argnames="num_keep")
    >>> reduce(image, image, text, num_keep=2).index.tolist()
    [[0, 2]]

  Cost: 2 N (T D + N E) FLOPs, then 3 (T + N) N a step; holds one table of
  (T + N) N float32 values an example.

  Source: Dong et al. (2025), "MMTok: Multimodal Coverage Maximization for
  Efficient Inference of VLMs"; paper and reference code agree. Masks of
  padding are ours: T and N count what is valid.
  """
  checks.has_rank(3, features=features, vision=vision, text=text)
  num_tokens = features.shape[1]
  checks.same_size(features_tokens=num_tokens, vision_tokens=vision.shape[1])
  checks.same_size(features_dim=features.shape[2], text_dim=text.shape[2])
  checks.in_range(1, num_tokens, num_keep=num_keep)
  if mask is None:
    mask = jnp.ones_like(features[:, :, 0], dtype=bool)
  if text_mask is None:
    text_mask = jnp.ones_like(text[:, :, 0], dtype=bool)
  checks.same_size(features_tokens=num_tokens, mask_tokens=mask.shape[1])
  checks.same_size(text_tokens=text.shape[1], text_mask=text_mask.shape[1])
  allowed = mask
  if candidates is not None:
    checks.same_size(features_tokens=num_tokens, candidates=candidates.shape[1])
    allowed = mask & candidates

  def table(features, vision, text, mask, text_mask):
    token, patch = _unit(features, mask), _unit(vision, mask)
    word = _unit(text, text_mask)
    of_text = _cover(word, token, text_mask, mask, text_temperature)
    of_image = _cover(patch, patch, mask, mask, vision_temperature)
    return jnp.concatenate([of_text, alpha * of_image])  # [T + N, N]

  picks = greedy_select(
    jax.vmap(table)(features, vision, text, mask, text_mask),
    allowed,
    num_keep=num_keep,
    objective="coverage",
    implementation=implementation,
  )
  return types.selected(features, picks.index, picks.mask, positions=positions)


def clean_question(text: str) -> str:
  """The words of a question that may name something in an image.

  Drops image placeholders in front, the two short-answer instructions of
  LLaVA prompts, punctuation and the 47 words of `STOP_WORDS`.

  Args:
    text: the question as it stands in the prompt.

  Returns:
    The words left, separated by spaces; the text itself where none is left,
    and `NO_QUESTION` for an empty one. Tokenise it without a start token.

  Example:
    >>> clean_question("<image>\\nWhat is the color of the cat?")
    'color of cat'

  Source: the reference code of Dong et al. (2025), "MMTok". For Qwen it keeps
  all words.
  """
  raw = re.sub(r"^(\s*<image>)+", "", text).strip()
  for instruction in _INSTRUCTIONS:
    raw = raw.replace(instruction, "").strip()
  if not raw:
    return NO_QUESTION
  words = re.findall(r"\w+", raw)
  kept = [word for word in words if word.lower() not in STOP_WORDS]
  return " ".join(kept) if kept else raw


def _unit(x, mask):
  """Rows of length one, zero where masked; no gradient."""
  x = jax.lax.stop_gradient(x).astype(jnp.float32)
  x = jnp.where(mask[:, None], x, 0)  # NaN padding must not spread
  return similarity.safe_normalize(x)


def _cover(targets, tokens, target_mask, mask, temperature):
  """How well each token covers each target; valid rows add up to 1 in all."""
  logits = jnp.matmul(targets, tokens.T, precision="highest") / temperature
  logits = jnp.where(mask[None, :], logits, -jnp.inf)
  # Shifted by hand: a row without a valid token has no softmax.
  top = jnp.max(logits, axis=1, keepdims=True)
  rise = jnp.exp(logits - jnp.where(top > -jnp.inf, top, 0))
  share = rise / jnp.maximum(jnp.sum(rise, axis=1, keepdims=True), 1e-30)
  count = jnp.maximum(jnp.sum(target_mask), 1)
  return jnp.where(target_mask[:, None], share / count, 0)

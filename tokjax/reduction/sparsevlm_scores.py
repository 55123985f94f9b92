"""Scores of SparseVLM: which words rate the picture, and what they look at."""

import functools

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.kernels import column_attention as kernel
from tokjax.ops import ranking
from tokjax.typing import Array, Bool, Float, Implementation, Int

__all__ = ["corrected_scores", "rater_scores", "select_raters"]


def select_raters(
  visual: Float[Array, "B N D"],
  text: Float[Array, "B T D"],
  visual_mask: Bool[Array, "B N"] | None = None,
  text_mask: Bool[Array, "B T"] | None = None,
) -> Bool[Array, "B T"]:
  """Text tokens that speak of the picture.

  M = softmax over text of visual . text, plain inner products; a text token
  is a rater if its mean over the visual tokens is above the mean of all.

  Args:
    visual: visual tokens at the input of the language model.
    text: text tokens there.
    visual_mask: True where the visual token is real.
    text_mask: True where the text token is real.

  Returns:
    True for raters. Where no token lies above the mean (a single one never
    does) all real text tokens are raters.

  Raises:
    ValueError: if sizes disagree.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> visual = jnp.array([[[1.0, 0.0], [2.0, 0.0]]])
    >>> text = jnp.array([[[3.0, 0.0], [0.0, 1.0], [0.0, 5.0]]])
    >>> jax.jit(select_raters)(visual, text).tolist()
    [[True, False, False]]

  Cost: 2 N T D FLOPs, N T floats.

  Source: Zhang et al. (2025), "SparseVLM", published code; what happens
  without a rater is ours.
  """
  checks.has_rank(3, visual=visual, text=text)
  checks.same_size(visual_batch=visual.shape[0], text_batch=text.shape[0])
  checks.same_size(visual_dim=visual.shape[2], text_dim=text.shape[2])
  if visual_mask is None:
    visual_mask = jnp.ones_like(visual[..., 0], dtype=bool)
  if text_mask is None:
    text_mask = jnp.ones_like(text[..., 0], dtype=bool)
  checks.same_size(
    visual_tokens=visual.shape[1], visual_mask_tokens=visual_mask.shape[1]
  )
  checks.same_size(
    text_tokens=text.shape[1], text_mask_tokens=text_mask.shape[1]
  )
  return jax.vmap(_select_raters)(visual, text, visual_mask, text_mask)


def rater_scores(
  queries: Float[Array, "B H T d"],
  keys: Float[Array, "B Hk S d"],
  raters: Bool[Array, "B T"],
  mask: Bool[Array, "B S"] | None = None,
  *,
  first_visual: int,
  num_visual: int,
  scale: float | None = None,
  implementation: Implementation | None = None,
) -> Float[Array, "B N"]:
  """Attention that visual tokens get from the raters, averaged (v1.5).

  Args:
    queries: of the text rows, the last T of the S tokens, after rotation.
    keys: of all tokens; Hk divides H.
    raters: rows that count, from `select_raters`.
    mask: True where a key exists.
    first_visual: position of the first visual token, static.
    num_visual: N, static.
    scale: factor of the inner products; None for d ** -0.5.
    implementation: see `kernels.column_attention`.

  Returns:
    float32 mean over heads and raters of the attention to each visual token;
    0 without raters. No gradient flows.

  Raises:
    ValueError: if sizes disagree or the visual tokens end past S.

  Example:
    >>> import jax.numpy as jnp
    >>> q, k = jnp.zeros((1, 1, 1, 4)), jnp.zeros((1, 1, 4, 4))
    >>> rater_scores(q, k, jnp.array([[True]]),
    ...              first_visual=1, num_visual=2).tolist()
    [[0.25, 0.25]]

  Cost: 2 H T S d FLOPs; the attention map is not held.

  Source: Zhang et al. (2025), "SparseVLM", published code v1.5.
  """
  _check_rows(queries, keys, raters, mask, first_visual, num_visual)
  weight = raters.astype(jnp.float32)
  weight /= jnp.maximum(jnp.sum(weight, axis=1, keepdims=True), 1)
  found = kernel.column_attention(
    queries,
    keys,
    mask,
    weight,
    scale=scale,
    causal=True,
    implementation=implementation,
  )
  stop = first_visual + num_visual
  return jnp.mean(found.received[:, :, first_visual:stop], axis=1)


def corrected_scores(
  queries: Float[Array, "B H T d"],
  keys: Float[Array, "B Hk S d"],
  raters: Bool[Array, "B T"],
  mask: Bool[Array, "B S"] | None = None,
  position_ids: Int[Array, "B S"] | None = None,
  *,
  first_visual: int,
  num_visual: int,
  num_heads: int = 14,
  rope_base: float = 10_000.0,
  scale: float | None = None,
) -> Float[Array, "B N"]:
  """Attention from the raters without the pull of nearness ("plus").

  Rotary positions alone draw attention to what is near. The attention p of
  each row is divided by g, the attention that queries and keys of all ones
  would get at these positions: softmax of scale * 2 sum_m cos(a_m (i - j)) for
  the angles a_m of the rotation. The scores are means of p / g over raters and
  over the `num_heads` heads that give the visual tokens most.

  Args:
    queries: of the text rows, the last T of the S tokens, after rotation.
    keys: of all tokens; Hk divides H.
    raters: rows that count, from `select_raters`.
    mask: True where a key exists.
    position_ids: positions of the S tokens; None for 0, 1, 2, ...
    first_visual: position of the first visual token, static.
    num_visual: N, static.
    num_heads: heads that count, static; 14 of 32 in the published code.
    rope_base: base of the rotary frequencies of the model.
    scale: factor of the inner products; None for d ** -0.5.

  Returns:
    float32 scores; 0 without raters. No gradient flows. Heads are ranked by
    plain attention, ties to the lower head (our reading).

  Raises:
    ValueError: if sizes disagree or a setting is out of range.

  Example:
    >>> import functools
    >>> import jax, jax.numpy as jnp
    >>> q, k = jnp.ones((1, 1, 1, 4)), jnp.ones((1, 1, 4, 4))
    >>> score = jax.jit(functools.partial(
    ...     corrected_scores, first_visual=1, num_visual=2, num_heads=1))
    >>> score(q, k, jnp.array([[True]]), position_ids=jnp.zeros((1, 4), int))
    Array([[1., 1.]], dtype=float32)

  Cost: 2 (H + 1) T S d FLOPs; holds H T S probabilities of the text rows.

  Source: Zhang et al. (2025), "SparseVLM", published code of SparseVLM+.
  """
  _check_rows(queries, keys, raters, mask, first_visual, num_visual)
  checks.in_range(1, queries.shape[1], num_heads=num_heads)
  checks.divisible(2, queries_dim=queries.shape[3])
  if mask is None:
    mask = jnp.ones_like(keys[:, 0, :, 0], dtype=bool)
  if position_ids is None:
    position_ids = jnp.cumsum(jnp.ones_like(mask, dtype=jnp.int32), axis=1) - 1
  checks.same_size(
    keys_tokens=keys.shape[2], position_ids_tokens=position_ids.shape[1]
  )
  one = functools.partial(
    _corrected_scores,
    visual=slice(first_visual, first_visual + num_visual),
    num_heads=num_heads,
    rope_base=rope_base,
    scale=queries.shape[-1] ** -0.5 if scale is None else scale,
  )
  return jax.vmap(one)(queries, keys, raters, mask, position_ids)


def _select_raters(visual, text, visual_mask, text_mask):
  visual, text = jax.lax.stop_gradient((visual, text))
  visual = jnp.where(visual_mask[:, None], visual, 0).astype(jnp.float32)
  text = jnp.where(text_mask[:, None], text, 0).astype(jnp.float32)
  dots = jnp.matmul(visual, text.T, precision="highest")  # [N, T]
  share = jax.nn.softmax(jnp.where(text_mask[None, :], dots, -jnp.inf), axis=1)
  share = jnp.where(visual_mask[:, None] & text_mask[None, :], share, 0)
  value = jnp.sum(share, axis=0) / jnp.maximum(jnp.sum(visual_mask), 1)
  mean = jnp.sum(value) / jnp.maximum(jnp.sum(text_mask), 1)
  raters = text_mask & (value > mean)
  return jnp.where(jnp.any(raters), raters, text_mask)


def _corrected_scores(
  q, k, raters, mask, position_ids, *, visual, num_heads, rope_base, scale
):
  q, k = jax.lax.stop_gradient((q, k))
  num_rows, num_keys, dim = q.shape[1], k.shape[1], q.shape[2]
  k = jnp.repeat(k, q.shape[0] // k.shape[0], axis=0)
  k = jnp.where(mask[None, :, None], k, 0)
  q = jnp.where(raters[None, :, None], q, 0)
  logits = scale * jnp.einsum(  # [H, T, S]
    "htd,hsd->hts",
    q.astype(jnp.float32),
    k.astype(jnp.float32),
    precision="highest",
  )
  row = jnp.arange(num_rows) + (num_keys - num_rows)
  seen = jnp.arange(num_keys)[None, :] <= row[:, None]
  seen &= mask[None, :] & raters[:, None]  # [T, S]

  rate = rope_base ** (-jnp.arange(dim // 2, dtype=jnp.float32) * 2 / dim)
  angle = position_ids.astype(jnp.float32)[:, None] * rate[None, :]
  turned = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=1)  # [S, d]
  pull = (
    2
    * scale
    * jnp.matmul(turned[num_keys - num_rows :], turned.T, precision="highest")
  )  # [T, S]

  attention = _softmax(logits, seen[None])
  gravity = _softmax(pull, seen)
  mass = jnp.sum(attention[:, :, visual], axis=(1, 2))
  heads = (ranking.ranks(mass) < num_heads).astype(jnp.float32)
  weight = heads[:, None] * raters[None, :] / num_heads  # [H, T]
  weight /= jnp.maximum(jnp.sum(raters), 1)
  ratio = attention / jnp.where(gravity > 0, gravity, 1)[None]
  return jnp.einsum("ht,hts->s", weight, ratio[:, :, visual])


def _softmax(logits, seen):
  """Softmax over what is seen; zero in rows that see nothing."""
  logits = jnp.where(seen, logits, jnp.finfo(jnp.float32).min)
  return jnp.where(seen, jax.nn.softmax(logits, axis=-1), 0)


def _check_rows(queries, keys, raters, mask, first_visual, num_visual):
  checks.has_rank(4, queries=queries, keys=keys)
  checks.same_size(queries_batch=queries.shape[0], keys_batch=keys.shape[0])
  checks.same_size(queries_rows=queries.shape[2], raters=raters.shape[1])
  checks.divisible(keys.shape[1], query_heads=queries.shape[1])
  if mask is not None:
    checks.same_size(keys_tokens=keys.shape[2], mask_tokens=mask.shape[1])
  checks.in_range(1, keys.shape[2], num_visual=num_visual)
  checks.in_range(0, keys.shape[2] - num_visual, first_visual=first_visual)

"""Scores of correlation-guided compression: how many tokens, and which."""

import functools

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.ops import ranking, similarity
from tokjax.typing import Array, Bool, Float, Int, Key

__all__ = ["information_density", "pool_groups", "sample_tokens"]


def information_density(
  keys: Float[Array, "*batch N d"],
  mask: Bool[Array, "*batch N"] | None = None,
  *,
  threshold: float = 0.9,
  min_similar: int = 8,
  block_size: int = 128,
) -> Float[Array, "*batch"]:
  """Share of the tokens that few others resemble.

  A token is redundant if the cosine of its key with at least `min_similar`
  others exceeds `threshold`; the density is 1 - the share of redundant ones.

  Args:
    keys: attention keys of the patches at a low layer; heads side by side.
    mask: True where the patch is real.
    threshold: cosine above which patches resemble each other. The default and
      the next one are ours: the paper's values are not published.
    min_similar: how many others make a token redundant, static, at least 1.
    block_size: rows of the cosine matrix held at a time, static.

  Returns:
    float32 in 0..1; 0 without valid patches. No gradient flows. A key of
    length zero resembles none.

  Raises:
    ValueError: if sizes disagree or a setting is out of range.

  Example:
    >>> import jax.numpy as jnp
    >>> keys = jnp.array([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0],
    ...                   [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    >>> float(information_density(keys, min_similar=1))
    0.5

  Cost: 2 N^2 d FLOPs; N * block_size floats, never N^2.

  Source: Zhang et al. (2024), "Token-level Correlation-guided Compression for
  Efficient Multimodal Document Understanding"; no code was published, and the
  paper's figure leaves the counting rule open: this one is our reading.
  """
  checks.in_range(1, float("inf"), min_similar=min_similar)
  checks.in_range(1, float("inf"), block_size=block_size)
  if mask is None:
    mask = jnp.ones_like(keys[..., 0], dtype=bool)
  checks.same_size(keys_tokens=keys.shape[-2], mask_tokens=mask.shape[-1])
  one = functools.partial(
    _information_density,
    threshold=threshold,
    min_similar=min_similar,
    block_size=block_size,
  )
  for _ in range(mask.ndim - 1):
    one = jax.vmap(one)
  return one(keys, mask)


def sample_tokens(
  probability: Float[Array, "*batch N"],
  count: Int[Array, "*batch"],
  mask: Bool[Array, "*batch N"] | None = None,
  key: Key[Array, ""] | None = None,
  *,
  temperature: float = 1.0,
) -> Bool[Array, "*batch N"]:
  """Draws a traced number of tokens without replacement.

  The `count` largest of log(probability) / temperature + Gumbel noise are an
  exact draw one after the other, each in proportion to its probability among
  those that are left.

  Args:
    probability: at least 0; its sum does not matter.
    count: how many to draw, traced.
    mask: True where the token may be drawn.
    key: one draw per example is split from it; None takes the most probable.
    temperature: above 1 flatter, below 1 sharper; no part without a key.

  Returns:
    True for min(count, valid tokens) tokens. Those of probability zero come
    last; ties go to the lower position.

  Raises:
    ValueError: if the axes disagree.

  Example:
    >>> import jax.numpy as jnp
    >>> p = jnp.array([0.1, 0.6, 0.0, 0.3])
    >>> sample_tokens(p, jnp.array(2)).astype(int).tolist()
    [0, 1, 0, 1]

  Source: Zhang et al. (2024) draw guided by attention; the method of drawing
  is that of Vieira (2014) and Kool et al. (2019), "Stochastic beams".
  """
  p = jax.lax.stop_gradient(probability).astype(jnp.float32)
  if mask is not None:
    checks.same_size(probability=p.shape[-1], mask=mask.shape[-1])
    p = jnp.where(mask, p, 0)
  positive = p > 0
  score = jnp.where(positive, jnp.log(jnp.where(positive, p, 1)), -jnp.inf)
  if key is not None:
    draw = functools.partial(jax.random.gumbel, shape=p.shape[-1:])
    for _ in range(p.ndim - 1):
      draw = jax.vmap(draw)
    keys = jax.random.split(key, p.shape[:-1]) if p.ndim > 1 else key
    score = score / temperature + draw(keys)
  return ranking.keep_best(score, count, mask)


def pool_groups(
  scores: Float[Array, "*batch N"], *, group_size: int = 4
) -> Float[Array, "*batch M"]:
  """Highest score of every group of neighbors in a row.

  For a connector that has joined `group_size` horizontal neighbors into one
  token (DocOwl's reducer: 4) before compression: its tokens get the scores of
  their best patch.

  Args:
    scores: one per patch, in raster order; a row of patches must hold whole
      groups.
    group_size: patches per token, static, divides N.

  Returns:
    One score per token, in the dtype of the input.

  Raises:
    ValueError: if `group_size` does not divide N.

  Example:
    >>> import jax.numpy as jnp
    >>> pool_groups(jnp.array([1.0, 4.0, 2.0, 3.0]), group_size=2).tolist()
    [4.0, 3.0]

  Source: ours; Zhang et al. (2024) leave it open.
  """
  checks.in_range(1, scores.shape[-1], group_size=group_size)
  checks.divisible(group_size, scores=scores.shape[-1])
  return jnp.max(scores.reshape(*scores.shape[:-1], -1, group_size), axis=-1)


def _information_density(keys, mask, *, threshold, min_similar, block_size):
  keys = jax.lax.stop_gradient(keys).astype(jnp.float32)
  unit = similarity.safe_normalize(jnp.where(mask[:, None], keys, 0))
  place = jnp.arange(mask.shape[0])

  def redundant(row):
    vector, number = row
    cosine = jnp.matmul(unit, vector, precision="highest")  # [N]
    alike = (cosine > threshold) & mask & (place != number)
    return jnp.sum(alike, dtype=jnp.int32) >= min_similar

  found = jax.lax.map(redundant, (unit, place), batch_size=block_size)
  valid = jnp.sum(mask, dtype=jnp.float32)
  distinct = jnp.sum(mask & ~found, dtype=jnp.float32)
  return distinct / jnp.maximum(valid, 1)

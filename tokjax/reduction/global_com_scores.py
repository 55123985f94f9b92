"""Scores and budgets of GlobalCom^2."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from tokjax import checks
from tokjax.ops import similarity
from tokjax.typing import Array, Bool, Float

__all__ = [
  "canvas_of_crops",
  "class_scores",
  "crop_budgets",
  "crops_of_canvas",
  "holistic_scores",
  "no_class_scores",
  "unpadded_mask",
]


def crop_budgets(
  thumbnail_scores: Float[Array, "B N"],
  *,
  grid: tuple[int, int],
  keep_ratio: float = 0.25,
  temperature: float = 10.0,
) -> Float[Array, "B n"]:
  """Share of its tokens that each crop keeps.

  The thumbnail is split into the cells that the crops cover. With S_j the sum
  of scores in cell j and sigma = softmax(S / temperature),

      r_j = min(1, keep_ratio * (1 + sigma_j - mean(sigma)))

  Args:
    thumbnail_scores: of the tokens of the thumbnail, a square in raster order.
    grid: rows and columns of crops, static. Cells are side // columns by
      side // rows tokens, the last ones larger.
    keep_ratio: R, the mean of the shares.
    temperature: tau; 10 in the paper, for scores that are logits. Sums of
      probabilities are at most 1 and need one of their scale.

  Returns:
    float32 shares; their mean is R, or less where one was cut off at 1. No
    gradient flows.

  Raises:
    ValueError: if the tokens are no square or the grid is finer than they are.

  Example:
    >>> import jax.numpy as jnp
    >>> sums = jnp.array([[30.0, 10.0, 0.0, 0.0]])
    >>> [round(float(r), 4) for r in crop_budgets(sums, grid=(2, 2))[0]]
    [0.3899, 0.2149, 0.1976, 0.1976]

  Source: Liu et al. (2026), "Compression with Global Guidance", paper and
  published code.
  """
  checks.has_rank(2, thumbnail_scores=thumbnail_scores)
  side = _side(thumbnail_scores.shape[1])
  checks.in_range(1, side, grid_rows=grid[0], grid_columns=grid[1])
  cell = jnp.asarray(_cells(side, grid))  # [n, N]

  def one(scores):  # [N]
    scores = jax.lax.stop_gradient(scores).astype(jnp.float32)
    total = jnp.sum(jnp.where(cell, scores[None, :], 0), axis=1)
    power = jnp.exp((total - jnp.max(total)) / temperature)
    sigma = power / (jnp.sum(power) + 1e-8)
    return jnp.minimum(keep_ratio * (1 + sigma - jnp.mean(sigma)), 1)

  return jax.vmap(one)(thumbnail_scores)


def holistic_scores(
  crop_scores: Float[Array, "B n N"],
  thumbnail_scores: Float[Array, "B N"],
  mask: Bool[Array, "B n N"] | None = None,
  *,
  grid: tuple[int, int],
  alpha: float | None = 0.5,
) -> Float[Array, "B n N"]:
  """Scores of the tokens of the crops, from the crop and from the thumbnail.

  The thumbnail's scores are stretched bilinearly (pixel centers, no
  anti-aliasing) over the part of the canvas inside the picture and cut into
  crops, g. Then alpha g + (1 - alpha) s for the crop's own scores s.

  Args:
    crop_scores: s, of each crop's tokens in raster order.
    thumbnail_scores: of the thumbnail's tokens.
    mask: True inside the picture; its bounding box on the canvas is what the
      thumbnail shows. None for all.
    grid: rows and columns of crops, static.
    alpha: .5 in the paper; None for the rule of the published code, g / |g| +
      s / |s| with lengths over the valid tokens of the crop.

  Returns:
    float32 scores, -inf outside of the picture. No gradient flows.

  Raises:
    ValueError: if sizes disagree or tokens are no square.

  Example:
    >>> import functools
    >>> import jax, jax.numpy as jnp
    >>> score = jax.jit(functools.partial(holistic_scores, grid=(2, 2)))
    >>> score(jnp.zeros((1, 4, 1)), jnp.array([[3.0]])).tolist()
    [[[1.5], [1.5], [1.5], [1.5]]]

  Cost: 2 n N^1.5 FLOPs and more by n^0.5.

  Source: Liu et al. (2026), "Compression with Global Guidance".
  """
  checks.has_rank(3, crop_scores=crop_scores)
  num_crops, num_tokens = crop_scores.shape[1:]
  checks.same_size(grid_cells=grid[0] * grid[1], crops=num_crops)
  checks.same_size(
    crop_tokens=num_tokens, thumbnail_tokens=thumbnail_scores.shape[1]
  )
  side = _side(num_tokens)
  if mask is None:
    mask = jnp.ones_like(crop_scores, dtype=bool)
  checks.same_size(crop_tokens=num_tokens, mask_tokens=mask.shape[2])

  def one(local, scores, mask):  # [n, N], [N], [n, N]
    local, scores = jax.lax.stop_gradient((local, scores))
    local = jnp.where(mask, local, 0).astype(jnp.float32)
    scores = scores.astype(jnp.float32).reshape(side, side)
    inside = canvas_of_crops(mask, grid)
    rows = _stretch(jnp.any(inside, axis=1), side)  # [canvas rows, side]
    columns = _stretch(jnp.any(inside, axis=0), side)
    wide = jnp.matmul(rows, scores, precision="highest")
    wide = jnp.matmul(wide, columns.T, precision="highest")
    shown = jnp.where(mask, crops_of_canvas(wide, grid), 0)  # [n, N]
    if alpha is None:
      both = similarity.safe_normalize(local) + similarity.safe_normalize(shown)
    else:
      both = alpha * shown + (1 - alpha) * local
    return jnp.where(mask, both, -jnp.inf)

  return jax.vmap(one)(crop_scores, thumbnail_scores, mask)


def class_scores(
  query: Float[Array, "B H d"],
  keys: Float[Array, "B H S d"],
  *,
  kind: str = "logit",
) -> Float[Array, "B N"]:
  """Attention of [CLS] to the patches in the last layer of the encoder.

  Args:
    query: of [CLS].
    keys: of all tokens, [CLS] first: S = 1 + N.
    kind: "logit", the mean over heads of <q, k> d ** -0.5 (published code), or
      "prob", that of the softmax over all S (the paper's words).

  Returns:
    float32 scores of the N patches. No gradient flows.

  Raises:
    ValueError: if sizes disagree or for another kind.

  Example:
    >>> import jax.numpy as jnp
    >>> keys = jnp.array([[[[0.0], [1.0], [2.0]]]])
    >>> class_scores(jnp.ones((1, 1, 1)), keys).tolist()
    [[1.0, 2.0]]

  Cost: 2 H S d FLOPs.

  Source: Liu et al. (2026), "Compression with Global Guidance".
  """
  checks.has_rank(3, query=query)
  checks.has_rank(4, keys=keys)
  checks.one_of(("logit", "prob"), kind=kind)
  checks.same_size(query_heads=query.shape[1], key_heads=keys.shape[1])
  checks.same_size(query_dim=query.shape[2], key_dim=keys.shape[3])
  query, keys = jax.lax.stop_gradient((query, keys))
  scores = query.shape[2] ** -0.5 * jnp.einsum(
    "bhd,bhsd->bhs",
    query,
    keys,
    precision="highest" if query.dtype == jnp.float32 else None,
    preferred_element_type=jnp.float32,
  )
  if kind == "prob":
    scores = jax.nn.softmax(scores, axis=-1)
  return jnp.mean(scores[:, :, 1:], axis=1)


def no_class_scores(
  x: Float[Array, "B N D"], mask: Bool[Array, "B N"] | None = None
) -> Float[Array, "B N"]:
  """Scores for encoders without [CLS]: how little a token is like the mean.

  Args:
    x: tokens of a picture or crop.
    mask: True where the token is real; the others have no influence.

  Returns:
    float32 -cos(x_i, mean of all); 0 for masked tokens. No gradient flows.

  Raises:
    ValueError: if the token axes disagree.

  Example:
    >>> import jax.numpy as jnp
    >>> x = jnp.array([[[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]])
    >>> no_class_scores(x).tolist()
    [[-1.0, -1.0, 1.0]]

  Source: Liu et al. (2026), "Compression with Global Guidance", for SigLIP.
  """
  checks.has_rank(3, x=x)
  if mask is None:
    mask = jnp.ones_like(x[..., 0], dtype=bool)
  checks.same_size(x_tokens=x.shape[1], mask_tokens=mask.shape[1])
  x = jax.lax.stop_gradient(x)
  x = jnp.where(mask[..., None], x, 0).astype(jnp.float32)
  # A sum has the direction of the mean.
  mean = similarity.safe_normalize(jnp.sum(x, axis=1))
  unit = similarity.safe_normalize(x)
  return -jnp.einsum("bnd,bd->bn", unit, mean, precision="highest")


def unpadded_mask(
  image_size: tuple[int, int], *, grid: tuple[int, int], side: int
) -> np.ndarray:
  """Tokens of the crops that show the picture and not its padding.

  The picture was scaled to fit the canvas of all crops and centered; the
  padding on both sides is half the rest, rounded down.

  Args:
    image_size: height and width of the original, any unit.
    grid: rows and columns of crops.
    side: rows, and columns, of tokens in a crop.

  Returns:
    NumPy bool [n, side * side].

  Raises:
    ValueError: if a size is not positive.

  Example:
    >>> unpadded_mask((2, 4), grid=(1, 1), side=4)[0].sum()
    np.int64(8)

  Source: the rule of LLaVA-NeXT, Liu et al. (2024).
  """
  height, width = image_size
  checks.in_range(1e-9, float("inf"), height=height, width=width)
  checks.in_range(1, float("inf"), side=side, rows=grid[0], columns=grid[1])
  rows, columns = grid[0] * side, grid[1] * side
  inside = np.zeros((rows, columns), bool)
  if width * rows > columns * height:  # wider than the canvas
    pad = (rows - int(height * columns / width)) // 2
    inside[pad : rows - pad] = True
  else:
    pad = (columns - int(width * rows / height)) // 2
    inside[:, pad : columns - pad] = True
  return crops_of_canvas(inside, grid)


def canvas_of_crops(
  x: Shaped[Array, "n N *rest"], grid: tuple[int, int]
) -> Shaped[Array, "rows columns *rest"]:
  """Crops side by side, as they lie in the picture.

  Args:
    x: one row per token of each crop; crops and tokens in raster order.
    grid: rows and columns of crops; a crop is a square of tokens.

  Returns:
    One entry per token of the canvas.

  Example:
    >>> import jax.numpy as jnp
    >>> x = jnp.array([[0, 1, 2, 3], [4, 5, 6, 7]])
    >>> canvas_of_crops(x, (1, 2)).tolist()
    [[0, 1, 4, 5], [2, 3, 6, 7]]

  Source: ours.
  """
  side = math.isqrt(x.shape[1])
  rest = x.shape[2:]
  # One axis at a time, which is what an Explicit mesh can follow.
  x = x.reshape(*grid, side * side, *rest)
  x = x.reshape(*grid, side, side, *rest).swapaxes(1, 2)
  x = x.reshape(grid[0] * side, grid[1], side, *rest)
  return x.reshape(grid[0] * side, grid[1] * side, *rest)


def crops_of_canvas(
  x: Shaped[Array, "rows columns *rest"] | Shaped[np.ndarray, "rows columns"],
  grid: tuple[int, int],
) -> Shaped[Array, "n N *rest"] | Shaped[np.ndarray, "n N"]:
  """Cuts a canvas into crops, the inverse of `canvas_of_crops`.

  Args:
    x: one entry per token of the canvas, JAX or NumPy.
    grid: rows and columns of crops.

  Returns:
    One row per token of each crop, in raster order.

  Example:
    >>> import jax.numpy as jnp
    >>> x = jnp.array([[0, 1, 4, 5], [2, 3, 6, 7]])
    >>> crops_of_canvas(x, (1, 2)).tolist()
    [[0, 1, 2, 3], [4, 5, 6, 7]]

  Source: ours.
  """
  side = x.shape[0] // grid[0]
  rest = x.shape[2:]
  x = x.reshape(grid[0], side, grid[1] * side, *rest)
  x = x.reshape(grid[0], side, grid[1], side, *rest).swapaxes(1, 2)
  x = x.reshape(grid[0] * grid[1], side, side, *rest)
  return x.reshape(grid[0] * grid[1], side * side, *rest)


def _side(num_tokens: int) -> int:
  side = math.isqrt(num_tokens)
  if side * side != num_tokens:
    raise ValueError(f"tokens must form a square, got {num_tokens}")
  return side


def _cells(side, grid) -> np.ndarray:
  """Which tokens of the thumbnail belong to each crop, [n, N]."""
  step = np.array([side // grid[0], side // grid[1]])
  place = np.indices((side, side)) // step[:, None, None]
  row, column = np.minimum(place, np.array(grid)[:, None, None] - 1)
  cell = (row * grid[1] + column).reshape(-1)
  return np.arange(grid[0] * grid[1])[:, None] == cell[None, :]


def _stretch(inside, side):
  """Weights [canvas, side] that stretch `side` values over what is inside."""
  first = jnp.argmax(inside)
  size = jnp.maximum(jnp.sum(inside), 1)
  place = jnp.arange(inside.shape[0]) - first
  place = (place + 0.5) * side / size - 0.5
  place = jnp.clip(place, 0, side - 1)
  apart = jnp.abs(place[:, None] - jnp.arange(side)[None, :])
  return jnp.maximum(1 - apart, 0)

"""What every comparison must contain: choices that look at nothing.

Random tokens, every so-many-th token, average pooling, and a smaller image.
Published methods have lost to each of them; a table without these rows says
little.
"""

import fractions

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.ops import plans
from tokjax.reduction import types
from tokjax.typing import Array, Bool, Float, Key

__all__ = [
  "downsample",
  "pool_keep",
  "pooled_grid",
  "random_keep",
  "uniform_keep",
]


def random_keep(
  key: Key[Array, ""],
  features: Float[Array, "B N D"],
  mask: Bool[Array, "B N"] | None = None,
  *,
  num_keep: int,
  positions: str = "keep",
) -> types.Reduced:
  """Keeps tokens drawn without replacement, all equally likely.

  Args:
    key: one key; each example draws with its own part of it.
    features: all tokens.
    mask: True where a token exists; None for all.
    num_keep: tokens to keep, static, at most N.
    positions: "keep" or "renumber", see `types.positions`.

  Returns:
    The kept tokens in their original order, with their gradient.

  Raises:
    ValueError: if the token axes disagree or `num_keep` is out of range.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> reduce = jax.jit(random_keep, static_argnames="num_keep")
    >>> kept = reduce(jax.random.key(0), jnp.ones((2, 9, 4)), num_keep=3)
    >>> kept.tokens.shape
    (2, 3, 4)

  Source: ours. The first control of Wen et al. (2025), "Token Pruning in
  Multimodal Large Language Models: Are We Solving the Right Problem?".
  """
  _check(features, mask, num_keep)
  keys = jax.random.split(key, features.shape[0])
  num_tokens = features.shape[1]
  scores = jax.vmap(lambda key: jax.random.uniform(key, (num_tokens,)))(keys)
  return types.highest(
    features, scores, mask, num_keep=num_keep, positions=positions
  )


def uniform_keep(
  features: Float[Array, "B N D"],
  mask: Bool[Array, "B N"] | None = None,
  *,
  num_keep: int,
  positions: str = "keep",
) -> types.Reduced:
  """Keeps tokens at equal distances in the flat order.

  Of n valid tokens those in the middle of `num_keep` equal stretches:
  number floor((2 i + 1) n / (2 num_keep)), counted among the valid ones.

  Args:
    features: all tokens, N at most 30,000.
    mask: True where a token exists; None for all.
    num_keep: tokens to keep, static, at most N.
    positions: "keep" or "renumber", see `types.positions`.

  Returns:
    The kept tokens in their original order, with their gradient.

  Raises:
    ValueError: if the token axes disagree or `num_keep` is out of range.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> reduce = jax.jit(uniform_keep, static_argnames="num_keep")
    >>> reduce(jnp.ones((1, 12, 2)), num_keep=4).index.tolist()
    [[1, 4, 7, 10]]

  Source: ours.
  """
  _check(features, mask, num_keep)
  checks.in_range(1, 30_000, tokens=features.shape[1])  # products fit int32
  if mask is None:
    mask = jnp.ones_like(features[..., 0], dtype=bool)

  def choose(mask):
    count = jnp.sum(mask, dtype=jnp.int32)
    step = jnp.arange(num_keep, dtype=jnp.int32)
    number = (2 * step + 1) * count // (2 * num_keep)
    number = jnp.where(count < num_keep, step, number)
    valid_first = jnp.argsort(~mask)  # stable: valid tokens in their order
    return valid_first[number], step < count

  picks, kept = jax.vmap(choose)(mask)
  return types.selected(features, picks, kept, positions=positions)


def pool_keep(
  features: Float[Array, "B N D"],
  mask: Bool[Array, "B N"] | None = None,
  *,
  num_keep: int,
  grid: tuple[int, int],
  positions: str = "keep",
) -> types.Reduced:
  """Averages tokens over the cells of a coarser grid.

  The coarser grid is `pooled_grid(num_keep, grid)`. Token (r, c) falls into
  cell (floor(r h / H), floor(c w / W)) of h x w; cells do not overlap, and
  where sizes do not divide some are one token wider.

  Args:
    features: all tokens, in raster order.
    mask: True where a token exists; None for all. Averages are over valid
      tokens; a cell without any is masked.
    num_keep: number of cells, static.
    grid: rows and columns of the token grid, static; their product is N.
    positions: "keep" (the position of the first valid token of the cell) or
      "renumber".

  Returns:
    Cell means in raster order of the cells; `size` counts their tokens.

  Raises:
    ValueError: if sizes disagree or no coarser grid has `num_keep` cells.

  Example:
    >>> import functools
    >>> import jax, jax.numpy as jnp
    >>> x = jnp.arange(16.0).reshape(1, 16, 1)
    >>> pool = jax.jit(functools.partial(pool_keep, num_keep=4, grid=(4, 4)))
    >>> pool(x).tokens.tolist()
    [[[2.5], [4.5], [10.5], [12.5]]]

  Cost: 2 N D FLOPs.

  Source: ours.
  """
  _check(features, mask, num_keep)
  checks.same_size(
    features_tokens=features.shape[1], grid_cells=grid[0] * grid[1]
  )
  rows, columns = pooled_grid(num_keep, grid)
  if mask is None:
    mask = jnp.ones_like(features[..., 0], dtype=bool)
  row = jnp.arange(grid[0], dtype=jnp.int32) * rows // grid[0]
  column = jnp.arange(grid[1], dtype=jnp.int32) * columns // grid[1]
  cell = (row[:, None] * columns + column[None, :]).reshape(-1)  # [N]

  def plan(mask):
    slot = jnp.where(mask, cell, num_keep)
    member = slot[None, :] == jnp.arange(num_keep, dtype=jnp.int32)[:, None]
    count = jnp.sum(member, axis=1)  # [K]
    share = (1 / jnp.maximum(count, 1)).astype(jnp.float32)
    weight = jnp.where(mask, share[jnp.minimum(slot, num_keep - 1)], 0)  # [N]
    found = count > 0
    first = jnp.where(found, jnp.argmax(member, axis=1), mask.shape[0] - 1)
    return plans.Merge(slot, weight), first.astype(jnp.int32), found

  features = jnp.where(mask[..., None], features, 0)  # NaN must not spread
  merge, first, found = jax.vmap(plan)(mask)
  return types.fused(features, merge, first, found, positions=positions)


def pooled_grid(num_keep: int, grid: tuple[int, int]) -> tuple[int, int]:
  """The h x w = num_keep cells whose shape is closest to the grid's.

  Args:
    num_keep: number of cells.
    grid: rows and columns of the token grid.

  Returns:
    Rows h and columns w, neither more than the grid has; of two equally
    close the one with fewer rows.

  Raises:
    ValueError: if there is none.

  Example:
    >>> pooled_grid(64, (24, 24)), pooled_grid(192, (24, 24))
    ((8, 8), (12, 16))

  Source: ours; for square numbers on square grids the usual pooling.
  """
  shapes = [
    (rows, num_keep // rows)
    for rows in range(1, grid[0] + 1)
    if num_keep % rows == 0 and num_keep // rows <= grid[1]
  ]
  if not shapes:
    raise ValueError(
      f"num_keep={num_keep} cells must form a grid inside {grid}; no two "
      "factors do"
    )

  def stretch(shape):
    ratio = fractions.Fraction(shape[0] * grid[1], shape[1] * grid[0])
    return max(ratio, 1 / ratio)

  return min(shapes, key=stretch)


def downsample(
  images: Float[Array, "B rows columns C"],
  *,
  num_keep: int,
  patch_size: int,
) -> Float[Array, "B _ _ C"]:
  """Shrinks images so that the encoder makes `num_keep` tokens of them.

  The control of input down-sampling: fewer pixels in, instead of fewer tokens
  out. The size is `pooled_grid` of the encoder's grid times the patch; pixels
  are averaged with a triangle filter. An encoder with learned positions must
  interpolate them.

  Args:
    images: pixels; whole patches in both directions.
    num_keep: tokens wanted, static.
    patch_size: pixels of one side of a patch, static.

  Returns:
    The smaller images in the dtype of `images`; gradients flow.

  Raises:
    ValueError: if an image is no whole number of patches, or no grid has
      `num_keep` cells.

  Example:
    >>> import jax.numpy as jnp
    >>> images = jnp.ones((1, 336, 336, 3))
    >>> downsample(images, num_keep=64, patch_size=14).shape
    (1, 112, 112, 3)

  Source: ours, over `jax.image.resize`.
  """
  batch, height, width, channels = images.shape
  checks.divisible(patch_size, image_rows=height, image_columns=width)
  rows, columns = pooled_grid(
    num_keep, (height // patch_size, width // patch_size)
  )
  shape = (batch, rows * patch_size, columns * patch_size, channels)
  if shape == images.shape:
    return images
  small = jax.image.resize(images, shape, "linear", antialias=True)
  return small.astype(images.dtype)


def _check(features, mask, num_keep):
  checks.has_rank(3, features=features)
  checks.in_range(1, features.shape[1], num_keep=num_keep)
  if mask is not None:
    checks.same_size(features_batch=features.shape[0], mask_batch=mask.shape[0])
    checks.same_size(
      features_tokens=features.shape[1], mask_tokens=mask.shape[1]
    )

"""Images cut into square patches and put together again."""

from tokjax import checks
from tokjax.typing import Array, Float

__all__ = ["patchify", "unpatchify"]


def patchify(
  images: Float[Array, "B height width C"], patch_size: int
) -> Float[Array, "B P F"]:
  """Cuts images into square patches, row by row.

  Pixels at the right and at the bottom that fill no patch are left out, as by
  the convolution of the published encoders (SigLIP has patches of 14 at 384).

  Args:
    images: channels last.
    patch_size: pixels a side, static.

  Returns:
    The F = patch_size^2 C pixels of each patch, row by row, channels last.

  Raises:
    ValueError: if the image is smaller than a patch.

  Example:
    >>> import jax.numpy as jnp
    >>> patchify(jnp.ones((1, 4, 6, 3)), 2).shape
    (1, 6, 12)

  Source: Dosovitskiy et al. (2021), "An image is worth 16x16 words".
  """
  checks.has_rank(4, images=images)
  batch, height, width, channels = images.shape
  checks.in_range(1, min(height, width), patch_size=patch_size)
  rows, columns = height // patch_size, width // patch_size
  images = images[:, : rows * patch_size, : columns * patch_size]
  # One axis is split or joined at a time: more at once is an error where the
  # batch is laid out over an explicit mesh.
  x = images.reshape(batch, rows, patch_size, -1, channels)
  x = x.reshape(batch, rows, patch_size, columns, patch_size, channels)
  x = x.swapaxes(2, 3)  # [B, rows, columns, p, p, C]
  x = x.reshape(batch, rows, columns, -1)
  return x.reshape(batch, rows * columns, -1)


def unpatchify(
  patches: Float[Array, "B P F"], grid: tuple[int, int], patch_size: int
) -> Float[Array, "B height width C"]:
  """Puts patches together: the inverse of `patchify` on whole patches.

  Args:
    patches: the F = patch_size^2 C pixels of each, row by row.
    grid: how many patches from top to bottom and from left to right, static.
    patch_size: pixels a side, static.

  Returns:
    Images, channels last.

  Raises:
    ValueError: if the patches do not fill the grid or are of another size.

  Example:
    >>> import jax.numpy as jnp
    >>> unpatchify(jnp.ones((1, 6, 12)), (2, 3), 2).shape
    (1, 4, 6, 3)
  """
  rows, columns = grid
  checks.same_size(patches=patches.shape[1], places_of_grid=rows * columns)
  checks.divisible(patch_size**2, patch_width=patches.shape[2])
  batch = patches.shape[0]
  x = patches.reshape(batch, rows, columns, -1)
  x = x.reshape(batch, rows, columns, patch_size, x.shape[3] // patch_size)
  x = x.swapaxes(2, 3)  # [B, rows, p, columns, p C]
  x = x.reshape(batch, rows * patch_size, *x.shape[3:])
  x = x.reshape(*x.shape[:3], patch_size, -1)
  return x.reshape(batch, x.shape[1], columns * patch_size, x.shape[-1])

"""What a reduction left of a picture, as a picture."""

import colorsys

import numpy as np

from tokjax import checks
from tokjax.ops import plans
from tokjax.reduction.types import Reduced

__all__ = ["groups", "overlay"]

# Brightness of what is gone, and how much of a group's colour covers it.
_DIM, _TINT = 0.25, 0.45
_GOLDEN = 0.618034  # of the colour circle, between one group and the next


def groups(reduced: Reduced, num_tokens: int) -> np.ndarray:
  """Which output each token of one example went into.

  Args:
    reduced: of one example, or of a batch of one.
    num_tokens: N.

  Returns:
    int32 [N], -1 where a token was dropped. Where a token went into several
    outputs, the one with its largest share.

  Raises:
    ValueError: for a batch of more than one.

  Example:
    >>> import jax.numpy as jnp
    >>> from tokjax.reduction.types import selected
    >>> groups(selected(jnp.ones((3, 1)), jnp.array([2, 0])), 3).tolist()
    [0, -1, 1]
  """
  if reduced.index.ndim == 2:
    checks.in_range(1, 1, batch=reduced.index.shape[0])
  index, mask = (np.asarray(x).reshape(-1) for x in reduced[1:3])
  plan = reduced.plan
  if isinstance(plan, plans.Merge):
    slot = np.asarray(plan.slot).reshape(-1)
    found = np.where(slot < len(index), slot, 0)
    return np.where((slot < len(index)) & mask[found], found, -1)
  if isinstance(plan, plans.Transform):
    share = np.asarray(plan.share).reshape(len(index), num_tokens)
    share = np.where(mask[:, None], share, 0)
    return np.where(share.max(axis=0) > 0, share.argmax(axis=0), -1)
  found = np.full(num_tokens, -1)
  found[index[mask]] = np.flatnonzero(mask)
  return found


def overlay(
  image: np.ndarray, reduced: Reduced, grid: tuple[int, int]
) -> np.ndarray:
  """Shows kept tokens bright, dropped ones dark, and fused ones in colours.

  A patch whose token was kept alone is left as it is; one that was dropped is
  darkened; patches that were fused share a colour. The patch that stands for
  a group has a white frame.

  Args:
    image: uint8 [height, width, 3].
    reduced: of one example, or of a batch of one.
    grid: rows and columns of the tokens.

  Returns:
    uint8, cut to whole patches.

  Raises:
    ValueError: if the image has fewer pixels than patches along a side.

  Example:
    >>> import jax.numpy as jnp
    >>> from tokjax.reduction.types import selected
    >>> kept = selected(jnp.ones((4, 1)), jnp.array([3]))
    >>> shown = overlay(np.full((4, 4, 3), 200, np.uint8), kept, (2, 2))
    >>> int(shown[0, 0, 0]), int(shown[2, 2, 0])
    (50, 200)
  """
  rows, columns = grid
  checks.in_range(rows, float("inf"), image_height=image.shape[0])
  checks.in_range(columns, float("inf"), image_width=image.shape[1])
  height, width = image.shape[0] // rows, image.shape[1] // columns
  shown = image[: rows * height, : columns * width].astype(np.float32)
  shown = shown.reshape(rows, height, columns, width, 3).swapaxes(1, 2)
  shown = shown.reshape(rows * columns, height, width, 3)
  found = groups(reduced, rows * columns)
  sizes = np.bincount(found[found >= 0], minlength=reduced.index.shape[-1])
  stands = np.asarray(reduced.index).reshape(-1)
  for token, group in enumerate(found):
    if group < 0:
      shown[token] *= _DIM
    elif sizes[group] > 1:
      colour = colorsys.hsv_to_rgb(group * _GOLDEN % 1, 0.8, 1.0)
      tint = 255 * np.array(colour, np.float32)
      shown[token] = (1 - _TINT) * shown[token] + _TINT * tint
      if stands[group] == token and min(height, width) > 2:
        frame = np.ones((height, width), bool)
        frame[1:-1, 1:-1] = False
        shown[token][frame] = 255
  shown = shown.reshape(rows, columns, height, width, 3).swapaxes(1, 2)
  shown = shown.reshape(rows * height, columns * width, 3)
  return np.clip(shown, 0, 255).astype(np.uint8)

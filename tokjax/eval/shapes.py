"""How close a shape is to another: F-score, chamfer distance, volume overlap.

F-score and chamfer distance compare points of two surfaces, drawn evenly over
their area. They have a scale: by convention shapes are moved so that the
longest side of the bounding box of the right shape is 1, and a threshold of .01
means one hundredth of that. Where coordinates fill -1..1 double it.

All are exact, chunked, in float32, and take padded sets with masks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.typing import Array, Bool, Float

__all__ = [
  "FScore",
  "chamfer",
  "f_score",
  "nearest_distances",
  "volume_iou",
]


class FScore(NamedTuple):
  """Share of points of one surface that lie near another, both ways.

  Attributes:
    f_score: harmonic mean of the two.
    precision: of the points of the shape in question.
    recall: of the points of the right shape.
  """

  f_score: Float[Array, "*batch"]
  precision: Float[Array, "*batch"]
  recall: Float[Array, "*batch"]


def nearest_distances(
  points: Float[Array, "*batch P D"],
  others: Float[Array, "*batch R D"],
  other_mask: Bool[Array, "*batch R"] | None = None,
  *,
  block_size: int = 1024,
) -> Float[Array, "*batch P"]:
  """Euclidean distance from each point to the nearest of others.

  Args:
    points: where to measure.
    others: what to look for.
    other_mask: True where one of the others counts; None means all.
    block_size: others looked at at once, static.

  Returns:
    float32; inf where nothing counts. The gradient goes to points and to the
    nearest others, and is zero where they coincide.

  Raises:
    ValueError: if shapes disagree.

  Example:
    >>> x, y = jnp.array([[0.0], [4.0]]), jnp.array([[1.0], [9.0]])
    >>> jax.jit(nearest_distances)(x, y).tolist()
    [1.0, 3.0]

  Cost: 3 P R D FLOPs; holds P x `block_size` numbers at most.
  """
  checks.same_size(width_of_points=points.shape[-1], others=others.shape[-1])
  checks.in_range(1, 1 << 30, block_size=block_size)
  if other_mask is None:
    other_mask = jnp.ones(others.shape[:-1], bool)
  checks.same_size(others=others.shape[-2], other_mask=other_mask.shape[-1])
  function = _nearest_distances
  for _ in range(points.ndim - 2):
    function = jax.vmap(function, in_axes=(0, 0, 0, None))
  return function(points, others, other_mask, block_size)


def _nearest_distances(points, others, mask, block_size):
  points, others = points.astype(jnp.float32), others.astype(jnp.float32)
  missing = -others.shape[0] % block_size
  others = jnp.pad(others, ((0, missing), (0, 0)))
  mask = jnp.pad(mask, (0, missing))
  others = jnp.where(mask[:, None], others, 0)  # NaN padding must not spread
  blocks = others.reshape(-1, block_size, others.shape[-1])
  start = jnp.zeros_like(points[:, 0]) + jnp.inf

  def nearer(best, block):
    others, mask = block
    # Coordinates apart: differences lose no digits, and nothing has 3 axes.
    square = sum(
      jnp.square(points[:, None, axis] - others[None, :, axis])
      for axis in range(points.shape[-1])
    )
    square = jnp.where(mask[None], square, jnp.inf)
    return jnp.minimum(best, jnp.min(square, axis=1)), None

  square, _ = jax.lax.scan(
    nearer, start, (blocks, mask.reshape(-1, block_size))
  )
  # The inner `where` keeps sqrt away from 0 and inf, with their gradients.
  some = (square > 0) & (square < jnp.inf)
  root = jnp.sqrt(jnp.where(some, square, 1))
  return jnp.where(some, root, square)


def f_score(
  points: Float[Array, "*batch P D"],
  targets: Float[Array, "*batch R D"],
  mask: Bool[Array, "*batch P"] | None = None,
  target_mask: Bool[Array, "*batch R"] | None = None,
  *,
  threshold: float | Float[Array, ""],
  block_size: int = 1024,
) -> FScore:
  """Precision, recall and their harmonic mean within a distance.

  Args:
    points: of the surface in question, drawn evenly over its area.
    targets: of the right surface.
    mask: True where a point counts; None means all.
    target_mask: True where a target counts; None means all.
    threshold: distance up to which a point is right, in the unit of the
      coordinates; the usual .01 to .05 are for a bounding box of side 1.
    block_size: points looked at at once, static.

  Returns:
    float32 in 0..1, 0 where one of the sets is empty. No gradient flows.

  Raises:
    ValueError: if shapes disagree.

  Example:
    >>> x, y = jnp.array([[0.0], [1], [2]]), jnp.array([[0.0], [1.05], [5]])
    >>> found = jax.jit(f_score)(x, y, threshold=0.1)
    >>> round(found.f_score.item(), 4)
    0.6667

  Cost: 6 P R D FLOPs.

  Source: Tatarchenko et al. (2019), "What Do Single-view 3D Reconstruction
  Networks Learn?".
  """
  there, back, mask, target_mask = _both_ways(
    points, targets, mask, target_mask, block_size
  )
  precision = _mean(there <= threshold, mask)
  recall = _mean(back <= threshold, target_mask)
  total = precision + recall
  score = 2 * precision * recall / jnp.where(total > 0, total, 1)
  return FScore(score, precision, recall)


def chamfer(
  points: Float[Array, "*batch P D"],
  targets: Float[Array, "*batch R D"],
  mask: Bool[Array, "*batch P"] | None = None,
  target_mask: Bool[Array, "*batch R"] | None = None,
  *,
  squared: bool = False,
  block_size: int = 1024,
) -> Float[Array, "*batch"]:
  """Mean distance to the nearest of the other set, both ways added.

  Args:
    points: of one surface.
    targets: of the other.
    mask: True where a point counts; None means all.
    target_mask: True where a target counts; None means all.
    squared: static, means of squared distances.
    block_size: points looked at at once, static.

  Returns:
    float32, with gradients to both sets; inf where one of the sets is empty,
    and 0 where both are.

  Raises:
    ValueError: if shapes disagree.

  Example:
    >>> x, y = jnp.array([[0.0], [4.0]]), jnp.array([[1.0]])
    >>> jax.jit(chamfer)(x, y).item()
    3.0

  Cost: 6 P R D FLOPs.

  Source: Fan, Su and Guibas (2017), "A Point Set Generation Network", with
  squares; sums, means and halves all have the name.
  """
  there, back, mask, target_mask = _both_ways(
    points, targets, mask, target_mask, block_size
  )
  power = jnp.square if squared else lambda x: x
  return _mean(power(there), mask) + _mean(power(back), target_mask)


def volume_iou(
  occupied: Bool[Array, "*batch M"],
  target: Bool[Array, "*batch M"],
  mask: Bool[Array, "*batch M"] | None = None,
) -> Float[Array, "*batch"]:
  """Volume of what two shapes share over that of what either fills.

  Args:
    occupied: whether each of M places, spread evenly over a volume that holds
      both, lies in the shape in question.
    target: whether it lies in the right shape.
    mask: True where a place counts; None means all.

  Returns:
    float32 in 0..1; 1 where both are empty.

  Raises:
    ValueError: if shapes disagree.

  Example:
    >>> x, y = jnp.array([True, True, False]), jnp.array([False, True, True])
    >>> round(jax.jit(volume_iou)(x, y).item(), 4)
    0.3333
  """
  checks.same_size(occupied=occupied.shape[-1], target=target.shape[-1])
  if mask is None:
    mask = jnp.ones_like(occupied)
  checks.same_size(occupied=occupied.shape[-1], mask=mask.shape[-1])
  shared = jnp.sum(occupied & target & mask, axis=-1)
  either = jnp.sum((occupied | target) & mask, axis=-1)
  ratio = shared / jnp.maximum(either, 1)
  return jnp.where(either > 0, ratio, 1).astype(jnp.float32)


def _both_ways(points, targets, mask, target_mask, block_size):
  if mask is None:
    mask = jnp.ones(points.shape[:-1], bool)
  if target_mask is None:
    target_mask = jnp.ones(targets.shape[:-1], bool)
  checks.same_size(points=points.shape[-2], mask=mask.shape[-1])
  there = nearest_distances(points, targets, target_mask, block_size=block_size)
  back = nearest_distances(targets, points, mask, block_size=block_size)
  return there, back, mask, target_mask


def _mean(x, mask):
  """Mean of what counts; 0 if nothing does."""
  total = jnp.sum(jnp.where(mask, x, 0), axis=-1, dtype=jnp.float32)
  return total / jnp.maximum(jnp.sum(mask, axis=-1), 1)

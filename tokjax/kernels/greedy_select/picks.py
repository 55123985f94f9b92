"""What a greedy selection is given and what it returns."""

from typing import NamedTuple

import jax.numpy as jnp

from tokjax import checks
from tokjax.typing import Array, Bool, Float, Int32

__all__ = ["Picks", "check_settings", "finish", "open_with"]


class Picks(NamedTuple):
  """What a greedy selection chose, in the order it chose.

  Attributes:
    index: position of each pick, each at most once; the last position where
      `mask` is False.
    gain: score of each pick when it was picked; 0 where `mask` is False.
    mask: False where there was no candidate left.
  """

  index: Int32[Array, "*batch K"]
  gain: Float[Array, "*batch K"]
  mask: Bool[Array, "*batch K"]


def check_settings(
  batch, num_tokens, mask, bonus, first, num_keep, objective, trade_off
):
  """Raises for what does not fit the objective or the sizes.

  Args:
    batch: B.
    num_tokens: N.
    mask: as in `greedy_select`, and so on.
    bonus: likewise.
    first: likewise.
    num_keep: likewise.
    objective: likewise.
    trade_off: likewise.
  """
  checks.in_range(1, num_tokens, num_keep=num_keep)
  if bonus is not None and objective in ("max_min", "max_sum"):
    raise ValueError(f"bonus has no meaning for objective {objective!r}")
  if bonus is None and objective == "mmr":
    raise ValueError("objective 'mmr' needs bonus, the importance of tokens")
  if trade_off is not None and objective != "mmr":
    raise ValueError(f"trade_off has no meaning for objective {objective!r}")
  if trade_off is not None:
    checks.in_range(0, 1, trade_off=trade_off)
  shape = (batch, num_tokens)
  for name, x, want in (
    ("mask", mask, shape),
    ("bonus", bonus, shape),
    ("first", first, shape[:1]),
  ):
    if x is not None and x.shape != want:
      raise ValueError(f"{name} must have shape {want}, got {x.shape}")


def open_with(natural, mask, first):
  """Scores of the first pick: -inf where a column must never be picked.

  Args:
    natural: float32[B, N], scores without `first`.
    mask: bool[B, N] or None.
    first: int32[B] or None.

  Returns:
    float32[B, N].
  """
  if first is not None:
    position = jnp.arange(natural.shape[1], dtype=jnp.int32)
    given = position[None, :] == first[:, None]
    natural = jnp.where(given, jnp.zeros_like(natural), -1.0)
  return natural if mask is None else jnp.where(mask, natural, -jnp.inf)


def finish(index, gain, natural, first):
  """Picks from the raw results of an implementation.

  Args:
    index: int32[B, K].
    gain: float32[B, K], -inf where no candidate was left.
    natural: float32[B, N], scores of the first pick.
    first: int32[B] or None; given, its score takes the place of its gain.

  Returns:
    The picks.
  """
  found = gain > -jnp.inf
  if first is not None:
    opened = jnp.take_along_axis(natural, index[:, :1], axis=1)
    gain = jnp.concatenate([opened, gain[:, 1:]], axis=1)
  return Picks(
    index=jnp.where(found, index, natural.shape[1] - 1),
    gain=jnp.where(found, gain, 0),
    mask=found,
  )

"""Errors for bad arguments, raised when a function is traced.

Every message names the argument, what was expected and what came. They look
at shapes and Python values only, never at the values of a traced array.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = [
  "divisible",
  "has_dtype",
  "has_rank",
  "has_sides",
  "in_range",
  "one_of",
  "same_size",
]


def same_size(**sizes: int) -> None:
  """Raises ValueError unless all the sizes agree; the message names each.

  Args:
    **sizes: the sizes to compare, by the name the message shall use.

  Raises:
    ValueError: if two of them differ.

  Example:
    >>> same_size(features_tokens=4, mask_tokens=4)
  """
  if len(set(sizes.values())) > 1:
    got = ", ".join(f"{name}={size}" for name, size in sizes.items())
    raise ValueError(f"sizes must agree, got {got}")


def in_range(
  low: int | float, high: int | float, /, **values: int | float
) -> None:
  """Raises ValueError unless low <= value <= high for every value.

  Args:
    low: smallest value allowed.
    high: largest value allowed.
    **values: the values to check, by the name the message shall use.

  Raises:
    ValueError: if a value lies outside.

  Example:
    >>> in_range(1, 10, num_keep=3)
  """
  for name, value in values.items():
    if not low <= value <= high:
      raise ValueError(f"{name} must lie in {low}..{high}, got {value}")


def one_of(accepted: Sequence[Any], **values: Any) -> None:
  """Raises ValueError unless every value is among the accepted ones.

  Args:
    accepted: the values allowed.
    **values: the values to check, by the name the message shall use.

  Raises:
    ValueError: if a value is not accepted; the message lists those that are.

  Example:
    >>> one_of(("sign", "sketch"), inner="sign")
  """
  for name, value in values.items():
    if value not in accepted:
      names = ", ".join(repr(choice) for choice in accepted)
      raise ValueError(f"{name} must be one of {names}, got {value!r}")


def has_rank(rank: int, **arrays: Any) -> None:
  """Raises ValueError unless every array has this many axes; None passes.

  Args:
    rank: number of axes expected.
    **arrays: the arrays to check, by the name the message shall use.

  Raises:
    ValueError: if an array has another number of axes.

  Example:
    >>> import numpy as np
    >>> has_rank(1, lengths=np.zeros(3))
  """
  for name, array in arrays.items():
    if array is not None and len(array.shape) != rank:
      raise ValueError(
        f"{name} must have {rank} axes, got shape {tuple(array.shape)}"
      )


def has_sides(size: int, **images: Any) -> None:
  """Raises ValueError unless every array is [B, size, size, C].

  Args:
    size: pixels a side.
    **images: the batches to check, by name.

  Raises:
    ValueError: if one is not.

  Example:
    >>> has_sides(4, images=np.zeros((2, 4, 4, 3)))
  """
  for name, batch in images.items():
    shape = tuple(batch.shape)
    if len(shape) != 4 or shape[1:3] != (size, size):
      raise ValueError(f"{name} must be [B, {size}, {size}, C], got {shape}")


def has_dtype(dtype: Any, **arrays: Any) -> None:
  """Raises TypeError unless every array has this dtype; None passes.

  Args:
    dtype: what NumPy takes for one.
    **arrays: the arrays to check, by the name the message shall use.

  Raises:
    TypeError: if an array has another dtype.

  Example:
    >>> import numpy as np
    >>> has_dtype(np.uint32, word_ids=np.zeros(3, np.uint32))
  """
  for name, array in arrays.items():
    if array is not None and array.dtype != dtype:
      raise TypeError(
        f"{name} must be {np.dtype(dtype).name}, got {array.dtype}"
      )


def divisible(divisor: int, **values: int) -> None:
  """Raises ValueError unless every value is a multiple of the divisor.

  Args:
    divisor: positive integer.
    **values: the values to check, by the name the message shall use.

  Raises:
    ValueError: if a value is not a multiple.

  Example:
    >>> divisible(128, block_documents=256)
  """
  for name, value in values.items():
    if value % divisor:
      raise ValueError(f"{name} must be a multiple of {divisor}, got {value}")

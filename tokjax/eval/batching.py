"""A function of batches over a whole set that lies in memory."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tokjax import checks

__all__ = ["in_batches"]


def in_batches(
  function: Callable[..., Any], *arrays: np.ndarray, batch_size: int
) -> Iterator[np.ndarray]:
  """Results of a function, batch after batch.

  All batches have one size, so that a jitted function compiles once: the last
  one is filled up with its last row, whose results are left out.

  Args:
    function: takes as many batches as there are arrays, returns one row for
      each of theirs.
    *arrays: of the set, row by row.
    batch_size: rows at once.

  Yields:
    The rows of each batch.

  Raises:
    ValueError: if the arrays disagree or are empty, or the function returns
      another number of rows.

  Example:
    >>> [x.tolist() for x in in_batches(np.sqrt, np.array([1, 4, 9]),
    ...                                 batch_size=2)]
    [[1.0, 2.0], [3.0]]
  """
  sizes = {f"array_{i}": len(array) for i, array in enumerate(arrays)}
  checks.same_size(**sizes)
  size = len(arrays[0])
  checks.in_range(1, float("inf"), size=size, batch_size=batch_size)
  batch_size = min(batch_size, size)
  for start in range(0, size, batch_size):
    rows = np.minimum(np.arange(start, start + batch_size), size - 1)
    found = np.asarray(function(*(array[rows] for array in arrays)))
    if found.shape[:1] != (batch_size,):
      raise ValueError(
        f"function must return {batch_size} rows, got shape {found.shape}"
      )
    yield found[: size - start]

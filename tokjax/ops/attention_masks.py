"""Who may read whom: masks of attention as constants.

Each function returns a NumPy array of bools, [queries, keys], True where a
query may read a key; `tokjax.ops.attention` takes them. They are made on the
host from sizes alone.
"""

from collections.abc import Sequence

import numpy as np

from tokjax import checks

__all__ = ["causal", "of_groups", "scale_causal"]


def causal(num_tokens: int) -> np.ndarray:
  """Each token reads itself and those before it, bool[N, N].

  Args:
    num_tokens: N.

  Example:
    >>> causal(2).tolist()
    [[True, False], [True, True]]
  """
  checks.in_range(0, 1 << 20, num_tokens=num_tokens)
  return np.tril(np.ones((num_tokens, num_tokens), bool))


def of_groups(groups: Sequence[int]) -> np.ndarray:
  """Each token reads its own group and those of a lower number, bool[N, N].

  Args:
    groups: number of the group of each token.

  Example:
    >>> of_groups([0, 1, 1]).astype(int).tolist()
    [[1, 0, 0], [1, 1, 1], [1, 1, 1]]
  """
  groups = np.asarray(groups)
  checks.has_rank(1, groups=groups)
  return groups[None, :] <= groups[:, None]


def scale_causal(sides: Sequence[int]) -> np.ndarray:
  """Square maps, coarse to fine: each reads itself and coarser ones.

  Args:
    sides: side of each map; its tokens stand one after the other.

  Returns:
    bool[N, N] for the N = sum of side^2 tokens.

  Raises:
    ValueError: if a side is not positive.

  Example:
    >>> int(scale_causal((1, 2)).sum())
    21

  Source: Tian et al. (2024), "Visual Autoregressive Modeling".
  """
  for side in sides:
    checks.in_range(1, 1 << 10, side=side)
  groups = np.repeat(np.arange(len(sides)), np.square(sides))
  return of_groups(groups.tolist())

"""Vectors of items from who stands near whom, where there is no text.

    features = cooccurrence.features(split.train, dim=64)

Source: Levy and Goldberg, 2014, "Neural word embedding as implicit matrix
factorization": positive pointwise mutual information and its singular vectors
times the square roots of the singular values. That sequences of items are read
like sentences is ours here.
"""

import numpy as np
from scipy import sparse
from scipy.sparse import linalg

from tokjax import checks
from tokjax.data.interactions import Interactions

__all__ = ["features"]


def features(
  data: Interactions, *, dim: int = 64, window: int = 5
) -> np.ndarray:
  """One vector an item, of the items within the window around it.

  Args:
    data: the training part of a split, so that targets stay unseen.
    dim: width, below the number of items; what the matrix does not have is
      zero.
    window: how many items before and after count.

  Returns:
    float32 [m, dim], the same each time; zeros for an item that is not there.

  Raises:
    ValueError: for sizes out of range.

  Example:
    >>> from tokjax.data import interactions
    >>> sequences = [[0, 1], [1, 0], [2, 3]]
    >>> data = interactions.from_sequences(sequences, num_items=5)
    >>> x = features(data, dim=2)
    >>> np.round(x @ x.T, 2)[4].tolist(), x.shape
    ([0.0, 0.0, 0.0, 0.0, 0.0], (5, 2))
  """
  checks.in_range(1, data.num_items - 1, dim=dim)
  checks.in_range(1, 1 << 20, window=window)
  user = np.repeat(np.arange(data.num_users), data.lengths)
  pairs = []
  for away in range(1, min(window, len(user) - 1) + 1):
    same = user[away:] == user[:-away]
    pairs.append((data.items[:-away][same], data.items[away:][same]))
  left = np.concatenate([a for a, _ in pairs] + [b for _, b in pairs])
  right = np.concatenate([b for _, b in pairs] + [a for a, _ in pairs])
  shape = (data.num_items, data.num_items)
  counts = sparse.coo_array((np.ones(len(left)), (left, right)), shape).tocsr()
  counts = counts.tocoo()
  total, row = counts.sum(), counts.sum(axis=1)
  # log p(i, j) / (p(i) p(j)), of the pairs that are there.
  information = np.log(
    counts.data * total / (row[counts.row] * row[counts.col])
  )
  matrix = sparse.csr_array(
    (np.maximum(information, 0), (counts.row, counts.col)), shape
  )
  start = np.random.default_rng(0).standard_normal(data.num_items)
  vectors, values, _ = linalg.svds(matrix, k=dim, v0=start)
  vectors, values = vectors[:, ::-1], values[::-1]  # largest first
  place = np.argmax(np.abs(vectors), axis=0)
  sign = np.sign(vectors[place, np.arange(dim)])
  found = vectors * (sign * np.sqrt(np.maximum(values, 0)))[None]
  return np.where((row > 0)[:, None], found, 0).astype(np.float32)

"""Which examples, documents and padded length each step of an epoch has.

- Every example draws one of its positives and some of its negatives.
- Examples that do not fill a batch are left out, other ones each epoch.
- The others are grouped by their longest document, in steps of `bucket`
  tokens, and cut into batches. What a group leaves over joins the next longer
  one, so that rare lengths are trained too.
- Batches of all lengths are shuffled.

All of it is a function of seed and epoch. (Grain's own shuffle and batch see
no lengths.)
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tokjax import checks
from tokjax.data.training_set import Scores, TrainingSet

__all__ = ["Choices", "Epoch", "from_training_set", "plan"]


class Choices(NamedTuple):
  """What each example may draw from; rows are filled up with -1.

  Attributes:
    positives: rows of documents, int32 [examples, P].
    negatives: rows of documents, int32 [examples, M].
    positive_scores: the teacher's, float32 [examples, P]; None for none.
    negative_scores: the teacher's, float32 [examples, M]; None for none.
  """

  positives: np.ndarray
  negatives: np.ndarray
  positive_scores: np.ndarray | None
  negative_scores: np.ndarray | None


class Epoch(NamedTuple):
  """The batches of one epoch, in order.

  Attributes:
    members: examples of each batch, int64 [steps, B].
    width: padded length of the documents of each batch, int64 [steps].
    documents: rows of the documents each example drew, the positive first,
      int32 [examples, n].
    teacher: their scores, float32 [examples, n]; None for none.
  """

  members: np.ndarray
  width: np.ndarray
  documents: np.ndarray
  teacher: np.ndarray | None


def from_training_set(train: TrainingSet) -> Choices:
  """The examples of a training set as arrays.

  Args:
    train: the examples.

  Returns:
    Its positives, negatives and scores.

  Example:
    >>> train = TrainingSet(
    ...   ["q"] * 2, ["d"] * 3, [0, 1], [[0, 1], [2]], [[], []]
    ... )
    >>> from_training_set(train).positives
    array([[ 0,  1],
           [ 2, -1]], dtype=int32)
  """
  positive_scores = negative_scores = None
  if train.teacher_scores is not None:
    halves = [
      (scores[: len(good)], scores[len(good) :])
      for scores, good in zip(
        train.teacher_scores, train.positives, strict=True
      )
    ]
    positive_scores = _table([good for good, _ in halves], np.float32)
    negative_scores = _table([bad for _, bad in halves], np.float32)
  return Choices(
    _table(train.positives, np.int32),
    _table(train.negatives, np.int32),
    positive_scores,
    negative_scores,
  )


def plan(
  choices: Choices,
  document_length: np.ndarray,
  *,
  batch_size: int,
  num_negatives: int,
  bucket: int,
  max_width: int,
  seed: int,
  epoch: int,
) -> Epoch:
  """The schedule of one epoch.

  Args:
    choices: what each example may draw from; at least `num_negatives`.
    document_length: tokens of each document, int [documents].
    batch_size: examples of a batch.
    num_negatives: documents each example draws besides its positive; they
      keep their order.
    bucket: granularity of padded lengths.
    max_width: no document is longer; padded lengths end here.
    seed: of all draws and orders.
    epoch: which one; each has other draws and orders.

  Returns:
    examples // batch_size batches.

  Raises:
    ValueError: if there are fewer examples than a batch has.

  Example:
    >>> train = TrainingSet(
    ...   ["q"] * 4, ["d"] * 4, range(4), [[0], [1], [2], [3]], [[]] * 4
    ... )
    >>> epoch = plan(from_training_set(train), np.array([3, 9, 4, 12]),
    ...              batch_size=2, num_negatives=0, bucket=8, max_width=12,
    ...              seed=0, epoch=0)
    >>> sorted(zip(epoch.width.tolist(), np.sort(epoch.members).tolist()))
    [(8, [0, 2]), (12, [1, 3])]
  """
  num_examples = len(choices.positives)
  checks.in_range(1, num_examples, batch_size=batch_size)
  # Raw bits, as NumPy promises never to change their stream.
  bits = np.random.PCG64([seed, epoch])
  columns = (
    _draw(choices.positives, 1, bits),
    _draw(choices.negatives, num_negatives, bits),
  )
  documents = _take((choices.positives, choices.negatives), columns)
  teacher = None
  if choices.positive_scores is not None:
    scores = (choices.positive_scores, choices.negative_scores)
    teacher = _take(scores, columns)
  longest = document_length[documents].max(axis=1)
  width = np.minimum(-(-longest // bucket) * bucket, max_width)
  steps = num_examples // batch_size
  chosen = _shuffled(num_examples, bits)[: steps * batch_size]
  batches, widths, left = [], [], chosen[:0]
  for each in np.unique(width[chosen]):
    group = np.concatenate([left, chosen[width[chosen] == each]])
    full = len(group) // batch_size
    left = group[full * batch_size :]
    batches.append(group[: full * batch_size].reshape(full, batch_size))
    widths.append(np.full(full, each))
  order = _shuffled(steps, bits)
  return Epoch(
    np.concatenate(batches)[order],
    np.concatenate(widths)[order],
    documents,
    teacher,
  )


def _table(lists: Sequence[Scores], dtype) -> np.ndarray:
  lengths = np.array([len(row) for row in lists])
  table = np.full((len(lists), lengths.max()), -1, dtype)
  table[np.arange(table.shape[1]) < lengths[:, None]] = np.concatenate(lists)
  return table


def _draw(table: np.ndarray, count: int, bits: np.random.PCG64) -> np.ndarray:
  """Columns of `count` entries of each row, ascending; never the filling."""
  order = bits.random_raw(table.size).reshape(table.shape) >> np.uint64(1)
  order[table < 0] = np.iinfo(np.uint64).max
  drawn = np.argsort(order, axis=1, kind="stable")[:, :count]
  return np.sort(drawn, axis=1)


def _take(tables, columns) -> np.ndarray:
  """Positives and negatives at the columns drawn, side by side."""
  parts = zip(tables, columns, strict=True)
  return np.concatenate(
    [np.take_along_axis(table, column, axis=1) for table, column in parts],
    axis=1,
  )


def _shuffled(size: int, bits: np.random.PCG64) -> np.ndarray:
  return np.argsort(bits.random_raw(size), kind="stable")

"""Who chose what, in order: sequences of items, their split and batches.

    data = interactions.load("rec-amazon-beauty")
    split = interactions.leave_one_out(data)
    batches = interactions.targets(split.train, batch_size=256, seed=0)
    batches[0]["history"], batches[0]["target"]  # [256, 50], [256]

Items are 0 .. num_items - 1, and -1 stands where there is none. There are no
negatives: a loss over all items needs none.
"""

import dataclasses
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from tokjax import checks

__all__ = [
  "HISTORY",
  "Interactions",
  "Split",
  "from_sequences",
  "last_items",
  "leave_one_out",
  "load",
  "next_items",
  "targets",
]

HISTORY = 50  # items of a history, as SASRec and its successors have it


@dataclasses.dataclass(frozen=True, eq=False)
class Interactions:
  """Sequences of items, one a user. Checked when it is made.

  Attributes:
    items: int32 [n], the sequences back to back, oldest first.
    starts: int64 [users + 1], where each sequence begins and the last ends.
    num_items: m; every item is below.
    texts: what is said of each item, or None.

  Raises:
    ValueError: for items out of range or sizes that disagree.

  Example:
    >>> data = from_sequences([[0, 2], [1]], num_items=3)
    >>> data.num_users, data.items.tolist()
    (2, [0, 2, 1])
  """

  items: np.ndarray
  starts: np.ndarray
  num_items: int
  texts: tuple[str, ...] | None = None

  def __post_init__(self):
    checks.has_rank(1, items=self.items, starts=self.starts)
    checks.in_range(1, 1 << 31, num_items=self.num_items)
    if not len(self.starts) or self.starts[0] != 0:
      raise ValueError("starts must begin with 0")
    if (np.diff(self.starts) < 0).any():
      raise ValueError("starts must not decrease")
    checks.same_size(items=len(self.items), last_start=int(self.starts[-1]))
    if len(self.items):
      last = self.num_items - 1
      checks.in_range(0, last, smallest_item=int(self.items.min()))
      checks.in_range(0, last, largest_item=int(self.items.max()))
    if self.texts is not None:
      checks.same_size(texts=len(self.texts), num_items=self.num_items)

  @property
  def num_users(self) -> int:
    """Number of sequences, empty ones included."""
    return len(self.starts) - 1

  @property
  def lengths(self) -> np.ndarray:
    """Items of each user, int64 [users]."""
    return np.diff(self.starts)


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
  """What is trained on, and what is asked.

  Attributes:
    train: what stands before the last two items of a user; also the history
      of the validation target.
    history: that of the test target, the validation item included.
    validation: int32 [users], the item before the last; -1: nothing is asked.
    test: int32 [users], the last item; -1: nothing is asked.
    cold: bool [m], items that stand in no history, only among the targets.
  """

  train: Interactions
  history: Interactions
  validation: np.ndarray
  test: np.ndarray
  cold: np.ndarray


def from_sequences(
  sequences: Sequence[Sequence[int]],
  *,
  num_items: int,
  texts: Sequence[str] | None = None,
) -> Interactions:
  """Interactions of lists, one a user.

  Args:
    sequences: items of each user, oldest first.
    num_items: m.
    texts: one for each item, or None.

  Raises:
    ValueError: as `Interactions`.

  Example:
    >>> from_sequences([[0, 2], [], [1]], num_items=3).starts.tolist()
    [0, 2, 2, 3]
  """
  lengths = np.array([len(items) for items in sequences], np.int64)
  starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
  items = [np.asarray(items, np.int64) for items in sequences if len(items)]
  items = np.concatenate(items) if items else np.zeros(0, np.int64)
  texts = None if texts is None else tuple(texts)
  if len(items):
    # Before they are cut to 32 bits.
    checks.in_range(0, num_items - 1, largest_item=int(items.max()))
  return Interactions(items.astype(np.int32), starts, num_items, texts)


def load(path: str | os.PathLike) -> Interactions:
  """Reads lines of `user item item ...`, ids from 1, oldest first.

  Args:
    path: the file, or a folder that holds `sequences.txt`.

  Returns:
    One sequence a line. Item i of the file is item i - 1 here, so that rows
    of tables and labels are counted alike.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: for a line that is no such line, or a user who comes twice;
      names the line.

  Source: the files of Zhou et al. (2020), "S3-Rec", and what follows them.
  """
  path = pathlib.Path(path).expanduser()
  if path.is_dir():
    path /= "sequences.txt"
  if not path.is_file():
    raise FileNotFoundError(f"{path} must be a file of sequences")
  sequences, users = [], set()
  with path.open(encoding="utf-8") as file:
    for number, line in enumerate(file, 1):
      user, *items = _numbers(line, f"{path}, line {number}")
      if user in users:
        raise ValueError(f"{path}, line {number}: user {user} came before")
      users.add(user)
      sequences.append([item - 1 for item in items])
  if not sequences:
    raise ValueError(f"{path} must hold at least one sequence")
  largest = max(max(items) for items in sequences)
  return from_sequences(sequences, num_items=largest + 1)


def leave_one_out(
  data: Interactions, *, cold_ratio: float = 0.0, seed: int = 0
) -> Split:
  """The last item of a user is for the test, the one before for validation.

  Users of fewer than three items are trained on whole. Cold items are drawn
  and taken out of everything but the targets, so that no system has met them;
  who has no history then is asked nothing.

  Args:
    data: all interactions.
    cold_ratio: share of the items that are cold, 0..1.
    seed: of that draw.

  Returns:
    Training part, histories and targets, users in the same order.

  Raises:
    ValueError: for a ratio outside 0..1.

  Example:
    >>> data = from_sequences([[0, 1, 2, 3], [3, 1]], num_items=4)
    >>> split = leave_one_out(data)
    >>> split.train.items.tolist(), split.history.items.tolist()
    ([0, 1, 3, 1], [0, 1, 2, 3, 1])
    >>> split.validation.tolist(), split.test.tolist()
    ([2, -1], [3, -1])

  Source: the split as in Kang & McAuley (2018), "Self-attentive sequential
    recommendation". Ours: which items are cold (published splits by time).
  """
  checks.in_range(0, 1, cold_ratio=cold_ratio)
  order = np.random.default_rng(seed).permutation(data.num_items)
  cold = np.zeros(data.num_items, bool)
  cold[order[: round(cold_ratio * data.num_items)]] = True
  asked = data.lengths >= 3
  user = np.repeat(np.arange(data.num_users), data.lengths)
  left = data.starts[user + 1] - np.arange(len(data.items))  # 1: the last
  warm = ~cold[data.items]
  train = _kept(data, warm & (~asked[user] | (left > 2)))
  history = _kept(data, warm & (~asked[user] | (left > 1)))

  def target(part, before_end):
    place = np.where(asked, data.starts[1:] - before_end, 0)
    found = np.where(asked & (part.lengths > 0), data.items[place], -1)
    return found.astype(np.int32)

  return Split(train, history, target(train, 2), target(history, 1), cold)


def last_items(
  data: Interactions, *, length: int = HISTORY, stop: np.ndarray | None = None
) -> np.ndarray:
  """The last items of each user, at the end of rows of one length.

  Args:
    data: the sequences.
    length: N.
    stop: int [n], places in `data.items` where histories end; None: the ends
      of all users.

  Returns:
    int32 [users or n, N], -1 in front of short histories.

  Raises:
    ValueError: for a length below 1.

  Example:
    >>> data = from_sequences([[0, 1, 2], [3]], num_items=4)
    >>> last_items(data, length=2).tolist()
    [[1, 2], [-1, 3]]
  """
  checks.in_range(1, 1 << 20, length=length)
  if stop is None:
    start, stop = data.starts[:-1], data.starts[1:]
  else:
    start = data.starts[np.searchsorted(data.starts, stop, side="right") - 1]
  if not len(data.items):
    return np.full((len(stop), length), -1, np.int32)
  place = stop[:, None] - length + np.arange(length)[None]
  found = data.items[np.maximum(place, 0)]
  return np.where(place >= start[:, None], found, -1).astype(np.int32)


def targets(
  data: Interactions, *, batch_size: int, seed: int, **settings: Any
) -> grain.MapDataset:
  """Batches of one history and the item that came next, for every item.

  Item `step` holds `history` int32 [B, N], -1 in front, and `target` int32
  [B]. Every item but the first of a user is a target once an epoch.

  Args:
    data: the training part.
    batch_size: targets of a step over all processes, a multiple of
      `process_count`.
    seed: of the orders.
    **settings: `length`, N, 50; `num_epochs`, None for no end;
      `process_index` and `process_count`, each gets its rows of each batch.

  Returns:
    A `grain.MapDataset`; what does not fill a batch is left out of an epoch.

  Raises:
    ValueError: for settings out of range.

  Example:
    >>> data = from_sequences([[0, 1, 2], [3]], num_items=4)
    >>> batch = targets(data, batch_size=2, seed=0, length=2)[0]
    >>> sorted(zip(batch["history"].tolist(), batch["target"].tolist()))
    [([-1, 0], 1), ([0, 1], 2)]
  """
  first = np.zeros(len(data.items) + 1, bool)
  first[data.starts] = True
  rows = np.flatnonzero(~first[:-1])

  def make(rows, length):
    # A target is its own stop: the history ends before it.
    history = last_items(data, length=length, stop=rows)
    return {"history": history, "target": data.items[rows]}

  return _batches(rows, make, batch_size=batch_size, seed=seed, **settings)


def next_items(
  data: Interactions, *, batch_size: int, seed: int, **settings: Any
) -> grain.MapDataset:
  """Batches of whole sequences and what comes next at each of their places.

  Item `step` holds `history` and `target`, int32 [B, N], -1 in front; every
  user of two items or more comes once an epoch.

  Args:
    data: the training part.
    batch_size: users of a step over all processes, a multiple of
      `process_count`.
    seed: of the orders.
    **settings: as of `targets`.

  Returns:
    A `grain.MapDataset`; what does not fill a batch is left out of an epoch.

  Raises:
    ValueError: for settings out of range.

  Example:
    >>> data = from_sequences([[0, 1, 2], [3]], num_items=4)
    >>> batch = next_items(data, batch_size=1, seed=0, length=3)[0]
    >>> batch["history"].tolist(), batch["target"].tolist()
    ([[-1, 0, 1]], [[-1, 1, 2]])
  """
  users = np.flatnonzero(data.lengths >= 2)

  def make(users, length):
    ends = data.starts[users + 1]
    history = last_items(data, length=length, stop=ends - 1)
    # One longer, so that a user's end is not taken for the next one's start.
    target = np.concatenate([history[:, 1:], data.items[ends - 1][:, None]], 1)
    return {"history": history, "target": np.where(history < 0, -1, target)}

  return _batches(users, make, batch_size=batch_size, seed=seed, **settings)


def _batches(
  rows: np.ndarray,
  make: Callable[[np.ndarray, int], dict[str, np.ndarray]],
  *,
  batch_size: int,
  seed: int,
  length: int = HISTORY,
  num_epochs: int | None = None,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.MapDataset:
  checks.in_range(1, len(rows), batch_size=batch_size)
  checks.in_range(0, float("inf"), seed=seed)
  checks.in_range(0, process_count - 1, process_index=process_index)
  checks.divisible(process_count, batch_size=batch_size)
  per_epoch = len(rows) // batch_size
  if num_epochs is not None:
    checks.in_range(1, sys.maxsize // per_epoch, num_epochs=num_epochs)
  share = batch_size // process_count

  def batch(step):
    epoch, place = divmod(step, per_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(len(rows))
    start = place * batch_size + process_index * share
    return make(rows[order[start : start + share]], length)

  num_steps = sys.maxsize if num_epochs is None else num_epochs * per_epoch
  return grain.MapDataset.range(num_steps).map(batch)


def _numbers(line: str, where: str) -> list[int]:
  words = line.split()
  if len(words) < 2 or not all(word.isdecimal() for word in words):
    raise ValueError(
      f"{where} must be a user and at least one item, got {line[:60]!r}"
    )
  numbers = [int(word) for word in words]
  if not all(1 <= number < 1 << 31 for number in numbers[1:]):
    raise ValueError(f"{where}: items must lie in 1..2147483647")
  return numbers


def _kept(data: Interactions, keep: np.ndarray) -> Interactions:
  """The same users with only some of their items."""
  count = np.concatenate([np.zeros(1, np.int64), np.cumsum(keep)])
  return dataclasses.replace(
    data, items=data.items[keep], starts=count[data.starts]
  )

"""Texts of many lengths through one compiled program per padded length.

Rows are sorted by length, longest first, and cut into batches of about equal
padded size. The host prepares and collects while the devices compute.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import rich.progress
from jax.sharding import AxisType

from tokjax import checks

__all__ = ["LengthBatch", "length_batches", "run"]


class LengthBatch(NamedTuple):
  """Rows of about the same length.

  Attributes:
    members: which of the caller's rows these are; may be fewer than the batch
      has rows, the rest is filler of length 0.
    ids: token ids, 0 after the end of a row.
    lengths: tokens of each row.
  """

  members: np.ndarray  # int64 [n], n <= R
  ids: np.ndarray  # int32 [R, N]
  lengths: np.ndarray  # int32 [R]


def length_batches(
  rows: Sequence[np.ndarray],
  *,
  bucket: int,
  batch_tokens: int,
  max_length: int,
  multiple: int = 1,
) -> Iterator[LengthBatch]:
  """Cuts rows into batches, longest first, in few shapes.

  A batch is padded to its longest row, rounded up to a multiple of `bucket`
  (but not beyond `max_length`), and has batch_tokens // padded length rows.
  The last batch has the next power of two, if that is fewer.

  Args:
    rows: token ids of each text.
    bucket: granularity of padded lengths.
    batch_tokens: padded tokens per batch, about.
    max_length: no row is longer.
    multiple: the number of rows is a multiple of this (devices).

  Yields:
    Every row once.

  Example:
    >>> rows = [np.arange(n) for n in (3, 9, 4, 2)]
    >>> for batch in length_batches(
    ...     rows, bucket=4, batch_tokens=24, max_length=10):
    ...   print(batch.members, batch.ids.shape)
    [1 2] (2, 10)
    [0 3] (2, 4)
  """
  checks.in_range(1, float("inf"), bucket=bucket, batch_tokens=batch_tokens)
  lengths = np.array([len(row) for row in rows], np.int32)
  order = np.argsort(-lengths, kind="stable")
  start = 0
  while start < len(order):
    longest = int(lengths[order[start]])
    padded = min(max(-(-longest // bucket), 1) * bucket, max_length)
    size = max(batch_tokens // padded // multiple, 1) * multiple
    left = len(order) - start
    if left < size:
      size = min(
        size, -(-(1 << (left - 1).bit_length()) // multiple) * multiple
      )
    members = order[start : start + size]
    start += size
    ids = np.zeros((size, padded), np.int32)
    for i, member in enumerate(members):
      ids[i, : lengths[member]] = rows[member]
    batch_lengths = np.zeros(size, np.int32)
    batch_lengths[: len(members)] = lengths[members]
    yield LengthBatch(members, ids, batch_lengths)


def run(
  function: Callable[..., Any],
  weights: Any,
  rows: Sequence[np.ndarray],
  *,
  bucket: int,
  batch_tokens: int,
  max_length: int,
  devices: Sequence[jax.Device] | None = None,
  title: str | None = None,
) -> Iterator[tuple[np.ndarray, Any]]:
  """Applies a jitted function to rows in batches, sharded over devices.

  Args:
    function: `function(weights, ids, lengths)`, jitted; returns a pytree of
      arrays with the batch axis first.
    weights: pytree of arrays, copied to every device.
    rows: token ids of each text.
    bucket: see `length_batches`.
    batch_tokens: padded tokens per batch and device.
    max_length: no row is longer.
    devices: where to run; None for all local ones.
    title: of the progress bar; None for no bar.

  Yields:
    Which rows, and their results as NumPy arrays, filler removed.
  """
  devices = jax.local_devices() if devices is None else list(devices)
  mesh = jax.make_mesh(
    (len(devices),), ("data",), (AxisType.Auto,), devices=devices
  )
  by_row = jax.NamedSharding(mesh, jax.P("data"))
  weights = jax.device_put(weights, jax.NamedSharding(mesh, jax.P()))
  batches = length_batches(
    rows,
    bucket=bucket,
    batch_tokens=batch_tokens * len(devices),
    max_length=max_length,
    multiple=len(devices),
  )
  waiting = []  # started, not yet collected: one, while the next one runs
  with rich.progress.Progress(
    rich.progress.TextColumn("{task.description}"),
    rich.progress.BarColumn(),
    rich.progress.MofNCompleteColumn(),
    rich.progress.TimeRemainingColumn(),
    disable=title is None,
  ) as bar:
    task = bar.add_task(title or "", total=len(rows))

    def collect():
      members, results = waiting.pop(0)
      results = jax.tree.map(
        lambda x: np.asarray(x)[: len(members)], jax.device_get(results)
      )
      bar.advance(task, len(members))
      return members, results

    for batch in batches:
      ids, lengths = jax.device_put((batch.ids, batch.lengths), by_row)
      waiting.append((batch.members, function(weights, ids, lengths)))
      if len(waiting) > 1:
        yield collect()
    while waiting:
      yield collect()

"""Sequences of items: reading, splitting, batches."""

import numpy as np
import pytest

from tokjax.data import cooccurrence, interactions
from tokjax.data.interactions import Interactions, from_sequences

SEQUENCES = [[0, 1, 2, 3], [4], [], [3, 1], [5, 0, 2, 4, 1, 3]]


def data():
  return from_sequences(SEQUENCES, num_items=6)


def lists(found):
  ends = zip(found.starts[:-1], found.starts[1:], strict=True)
  return [found.items[start:stop].tolist() for start, stop in ends]


def test_reads_what_was_written(tmp_path):
  path = tmp_path / "sequences.txt"
  path.write_text("7 1 2 3\n9 3\n")
  found = interactions.load(tmp_path)
  assert lists(found) == [[0, 1, 2], [2]]
  assert found.num_items == 3 and found.items.dtype == np.int32


@pytest.mark.parametrize(
  "text,message",
  [
    ("1 2\n2\n", "line 2 must be a user and at least one item, got '2"),
    ("1 2\n2 x\n", "line 2 must be a user"),
    ("1 0\n", "line 1: items must lie in"),
    ("1 2\n1 3\n", "line 2: user 1 came before"),
    ("", "at least one sequence"),
  ],
)
def test_damaged_files(tmp_path, text, message):
  path = tmp_path / "sequences.txt"
  path.write_text(text)
  with pytest.raises(ValueError, match=message):
    interactions.load(path)


def test_missing_file(tmp_path):
  with pytest.raises(FileNotFoundError, match="must be a file of sequences"):
    interactions.load(tmp_path)


def test_real_file(shared_data):
  found = interactions.load(shared_data / "rec-amazon-beauty")
  assert (found.num_users, found.num_items) == (22363, 12101)
  assert len(found.items) == 198502
  assert lists(found)[1] == [5, 6, 7, 8, 9, 3, 10]


def test_leave_one_out():
  split = interactions.leave_one_out(data())
  assert lists(split.train) == [[0, 1], [4], [], [3, 1], [5, 0, 2, 4]]
  assert lists(split.history) == [[0, 1, 2], [4], [], [3, 1], [5, 0, 2, 4, 1]]
  assert split.validation.tolist() == [2, -1, -1, -1, 1]
  assert split.test.tolist() == [3, -1, -1, -1, 3]
  assert not split.cold.any()


def test_cold_items_stand_in_no_history():
  rng = np.random.default_rng(0)
  sequences = [rng.permutation(20)[: rng.integers(1, 9)] for _ in range(60)]
  whole = from_sequences(sequences, num_items=20)
  split = interactions.leave_one_out(whole, cold_ratio=0.25, seed=1)
  assert split.cold.sum() == 5
  for part in (split.train, split.history):
    assert not split.cold[part.items].any()
  for user, items in enumerate(sequences):
    if len(items) < 3:
      assert split.test[user] == split.validation[user] == -1
      continue
    history = [x for x in items[:-1] if not split.cold[x]]
    assert lists(split.history)[user] == history
    assert split.test[user] == (items[-1] if history else -1)
  assert split.cold[split.test[split.test >= 0]].any()
  again = interactions.leave_one_out(whole, cold_ratio=0.25, seed=2)
  assert (again.cold != split.cold).any()


def test_last_items():
  found = interactions.last_items(data(), length=3)
  assert found.tolist() == [
    [1, 2, 3], [-1, -1, 4], [-1, -1, -1], [-1, 3, 1], [4, 1, 3],
  ]  # fmt: skip
  assert interactions.last_items(data()).shape == (5, interactions.HISTORY)


def test_an_epoch_of_targets_is_every_next_item():
  batches = interactions.targets(
    data(), batch_size=3, seed=1, length=2, num_epochs=2
  )
  assert len(batches) == 6
  want = []
  for items in SEQUENCES:
    for end in range(1, len(items)):
      history = ([-1, -1] + items[:end])[-2:]
      want.append((*history, items[end]))
  orders = []
  for epoch in range(2):
    found = []
    for step in range(3 * epoch, 3 * epoch + 3):
      batch = batches[step]
      rows = np.concatenate([batch["history"], batch["target"][:, None]], 1)
      found += map(tuple, rows.tolist())
    assert sorted(found) == sorted(want)
    orders.append(found)
  assert orders[0] != orders[1]


def test_next_items_are_the_items_shifted():
  batches = interactions.next_items(data(), batch_size=3, seed=0, length=4)
  batch = batches[0]
  found = sorted(
    zip(batch["history"].tolist(), batch["target"].tolist(), strict=True)
  )
  assert found == [
    ([-1, -1, -1, 3], [-1, -1, -1, 1]),
    ([-1, 0, 1, 2], [-1, 1, 2, 3]),
    ([0, 2, 4, 1], [2, 4, 1, 3]),
  ]


def test_processes_share_a_batch():
  def rows(**settings):
    batches = interactions.targets(
      data(), batch_size=4, seed=3, length=2, **settings
    )
    return batches[5]["history"].tolist()

  parts = [rows(process_index=i, process_count=2) for i in (0, 1)]
  assert parts[0] + parts[1] == rows()


def test_features_are_the_svd_of_pointwise_information():
  whole = from_sequences([[0, 1, 2], [1, 0], [2, 1, 3]], num_items=5)
  counts = np.zeros((5, 5))
  for items in ([0, 1, 2], [1, 0], [2, 1, 3]):
    for a, b in zip(items[:-1], items[1:], strict=True):
      counts[a, b] += 1
      counts[b, a] += 1
  with np.errstate(divide="ignore", invalid="ignore"):
    row = counts.sum(1)
    ratio = counts * counts.sum() / (row[:, None] * row[None])
    want = np.where(counts > 0, np.maximum(np.log(ratio), 0), 0)
  u, s, _ = np.linalg.svd(want)
  got = cooccurrence.features(whole, dim=2, window=1)
  assert got.dtype == np.float32 and not got[4].any()
  np.testing.assert_allclose(
    got @ got.T, (u[:, :2] * s[:2]) @ u[:, :2].T, atol=1e-5
  )


def test_errors():
  with pytest.raises(ValueError, match="largest_item must lie in 0..2, got 5"):
    from_sequences([[5]], num_items=3)
  with pytest.raises(ValueError, match="texts=1, num_items=3"):
    from_sequences([[1]], num_items=3, texts=["a"])
  with pytest.raises(ValueError, match="starts must begin with 0"):
    Interactions(np.zeros(1, np.int32), np.array([1]), 1)
  with pytest.raises(ValueError, match="must not decrease"):
    Interactions(np.zeros(1, np.int32), np.array([0, 2, 1]), 1)
  with pytest.raises(ValueError, match="cold_ratio must lie in 0..1"):
    interactions.leave_one_out(data(), cold_ratio=2)
  with pytest.raises(ValueError, match="batch_size must lie in 1..9"):
    interactions.targets(data(), batch_size=10, seed=0)

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from tokjax.data import schedule
from tokjax.data.training_set import TrainingSet

SETTINGS = {"num_negatives": 0, "bucket": 8, "max_width": 30}


def one_document_each(lengths):
  """Example i has query i and document i, of the given length."""
  rows = range(len(lengths))
  return schedule.from_training_set(
    TrainingSet(
      query_texts=["q"] * len(lengths),
      document_texts=["d"] * len(lengths),
      query_index=rows,
      positives=[[row] for row in rows],
      negatives=[[] for _ in rows],
    )
  )


def plan(lengths, *, batch_size, seed=0, epoch=0):
  return schedule.plan(
    one_document_each(lengths),
    np.array(lengths),
    batch_size=batch_size,
    seed=seed,
    epoch=epoch,
    **SETTINGS,
  )


@hypothesis.given(
  lengths=strategies.lists(strategies.integers(1, 30), min_size=5, max_size=40),
  batch_size=strategies.integers(1, 5),
  epoch=strategies.integers(0, 3),
)
def test_batches_hold_different_examples_at_their_padded_length(
  lengths, batch_size, epoch
):
  got = plan(lengths, batch_size=batch_size, epoch=epoch)
  assert got.members.shape == (len(lengths) // batch_size, batch_size)
  assert len(set(got.members.ravel().tolist())) == got.members.size
  for members, width in zip(got.members, got.width, strict=True):
    longest = max(lengths[i] for i in members)
    assert width == min(-(-longest // 8) * 8, 30)


def test_only_what_a_group_leaves_over_is_padded_beyond_its_own_length():
  lengths = [5] * 10 + [20] * 7 + [29] * 3
  for epoch in range(5):
    got = plan(lengths, batch_size=4, epoch=epoch)
    assert sorted(got.width.tolist()) == [8, 8, 24, 24, 30]
    # 2 short ones are left over, so 1 middle one is left over as well.
    in_middle = got.members[got.width == 24]
    assert (in_middle < 10).sum() == 2
    assert set(got.members[got.width == 30].ravel()) >= {17, 18, 19}


def test_the_examples_left_out_change_from_epoch_to_epoch():
  lengths = [5] * 10 + [29]  # the only long one must not always be left out
  left_out = []
  for epoch in range(60):
    used = plan(lengths, batch_size=4, epoch=epoch).members.ravel()
    left_out.append(set(range(11)) - set(used.tolist()))
  assert {len(rows) for rows in left_out} == {3}
  # 3 of 11 each time: 16.4 of 60, with a standard deviation of 3.5.
  counts = np.bincount([row for rows in left_out for row in rows])
  assert counts.shape == (11,) and 4 < counts.min() and counts.max() < 30


def test_order_and_draws_depend_on_seed_and_epoch():
  lengths = list(range(1, 25))
  first = plan(lengths, batch_size=4)
  np.testing.assert_array_equal(
    first.members, plan(lengths, batch_size=4).members
  )
  for other in ({"seed": 1}, {"epoch": 1}):
    members = plan(lengths, batch_size=4, **other).members
    assert (members != first.members).any()


def test_short_and_long_batches_are_mixed():
  got = plan([5] * 40 + [29] * 40, batch_size=2)
  half = got.width[:20]
  assert 4 < (half == 8).sum() < 16


def test_draws_take_each_document_and_its_score_and_never_the_filling():
  train = TrainingSet(
    query_texts=["q"] * 3,
    document_texts=["d"] * 30,
    query_index=[0, 1, 2],
    positives=[[0], [10, 11, 12], [20, 21]],
    negatives=[[1, 2], [13, 14, 15, 16], [22, 23, 24]],
    # Ten times the row, so that a score tells its document.
    teacher_scores=[
      [0, 10, 20],
      [100, 110, 120, 130, 140, 150, 160],
      [200, 210, 220, 230, 240],
    ],
  )
  choices = schedule.from_training_set(train)
  drawn = [set(), set(), set()]
  for epoch in range(40):
    got = schedule.plan(
      choices,
      np.ones(30, int),
      batch_size=3,
      num_negatives=2,
      bucket=8,
      max_width=8,
      seed=3,
      epoch=epoch,
    )
    np.testing.assert_array_equal(got.teacher, 10 * got.documents)
    assert (got.teacher.dtype, got.documents.dtype) == (np.float32, np.int32)
    for example, (positive, *negatives) in enumerate(got.documents.tolist()):
      assert positive in train.positives[example]
      assert negatives == sorted(set(negatives))
      assert set(negatives) <= set(train.negatives[example])
      drawn[example] |= {positive, *negatives}
  assert drawn == [{0, 1, 2}, set(range(10, 17)), set(range(20, 25))]


def test_errors():
  with pytest.raises(ValueError, match=r"batch_size must lie in 1\.\.3, got 4"):
    plan([1, 2, 3], batch_size=4)

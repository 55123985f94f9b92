import dataclasses

import numpy as np
import pytest

from tokjax.data import beir, hard_negatives, near_duplicates, training_set
from tokjax.data.training_set import TrainingSet
from tokjax.eval import bm25
from tokjax.retrieval import search, token_index

# Query 1 has no example; query 2 has two, with different positives.
TRAIN = TrainingSet(
  query_texts=["q0", "q1", "q2"],
  document_texts=[f"d{i}" for i in range(8)],
  query_index=[2, 0, 2],
  positives=[[5], [1, 2], [6]],
  negatives=[[], [], []],
)
RANKINGS = np.array(
  [[2, 0, 3, 1, 4, 7, 5], [0, 1, 2, 3, 4, 5, 6], [6, 5, 7, 0, -1, -1, -1]]
)


def mine(num_negatives=2, train=TRAIN, **kwargs):
  mined = hard_negatives.mine(
    train, RANKINGS, num_negatives=num_negatives, **kwargs
  )
  return [rows.tolist() for rows in mined.negatives]


def test_the_best_ranks_that_are_not_relevant():
  # Query 2: ranks 6 and 5 are positives of one or the other example.
  assert mine() == [[7, 0], [0, 3], [7, 0]]
  assert mine(skip_top=2) == [[7, 0], [3, 4], [7, 0]]
  assert mine(skip_top=3)[1] == [4, 7]
  assert mine(1, depth=2)[1] == [0]


def test_near_duplicates_of_relevant_documents_are_left_out():
  groups = np.array([0, 1, 2, 1, 4, 5, 6, 6])  # 3 is like 1, 7 is like 6
  found = mine(1, groups=groups)
  assert found == [[0], [0], [0]]
  assert mine(2, groups=groups)[1] == [0, 4]


def test_too_few_candidates_are_topped_up_from_the_corpus():
  found = mine(4)
  assert found[0][:2] == [7, 0]
  assert set(found[0][2:]) < {1, 2, 3, 4} and len(set(found[0])) == 4
  assert found[0] == found[2] == mine(4)[0]
  assert mine(4, seed=1)[0] != mine(4, seed=2)[0]
  assert sorted(mine(6)[0]) == [0, 1, 2, 3, 4, 7]
  with pytest.raises(ValueError, match="query 2 leaves 6 .* num_negatives=7"):
    mine(7)


def test_random_draws_depend_on_seed_and_query_alone():
  one = TrainingSet(
    TRAIN.query_texts, TRAIN.document_texts, [0], [[1, 2]], [[]]
  )
  drawn = [mine(2, seed=seed)[1] for seed in range(40)]
  assert drawn == [mine(2, train=one, seed=seed)[0] for seed in range(40)]
  order = RANKINGS[0].tolist()
  for rows in drawn:
    assert set(rows) < {0, 3, 4, 7, 5}
    assert order.index(rows[0]) < order.index(rows[1])
  assert {row for rows in drawn for row in rows} == {0, 3, 4, 7, 5}


def test_queries_of_equal_rankings_draw_differently():
  rows = range(1, 101)
  train = TrainingSet(["q"] * 2, ["d"] * 101, [0, 1], [[0], [0]], [[], []])
  mined = hard_negatives.mine(
    train, np.array([rows, rows]), num_negatives=10, seed=0
  )
  one, two = mined.negatives
  assert one.tolist() != two.tolist()


def test_teacher_scores_go_with_the_old_negatives():
  scored = dataclasses.replace(TRAIN, teacher_scores=[[1], [1, 2], [1]])
  mined = hard_negatives.mine(scored, RANKINGS, num_negatives=1)
  assert mined.teacher_scores is None
  assert mined.positives == TRAIN.positives


@pytest.mark.parametrize(
  "kwargs,message",
  [
    ({"num_negatives": 0}, r"num_negatives must lie in 1\.\.8"),
    ({"depth": 8}, r"depth must lie in 0\.\.7, got 8"),
    ({"depth": 2, "skip_top": 3}, r"skip_top must lie in 0\.\.2, got 3"),
    ({"groups": np.zeros(3, int)}, "groups=3, document_texts=8"),
    ({"rankings": RANKINGS[:2]}, "rankings=2, query_texts=3"),
    ({"rankings": RANKINGS + 2}, "rankings must hold rows below 8, got 9"),
  ],
)
def test_errors(kwargs, message):
  kwargs = {"rankings": RANKINGS, "num_negatives": 1} | kwargs
  with pytest.raises(ValueError, match=message):
    hard_negatives.mine(TRAIN, **kwargs)


def test_a_run_becomes_rows_best_first():
  run = {"b": {"x": 1.0, "z": 3.0, "y": 1.0}, "other": {"w": 1.0}}
  found = hard_negatives.from_run(run, ["a", "b"], ["x", "y", "z"])
  assert found.tolist() == [[-1, -1, -1], [2, 1, 0]]  # ties: higher id first
  with pytest.raises(ValueError, match="'b' has 2 documents .* such as 'y'"):
    hard_negatives.from_run(run, ["b"], ["x"])


def test_rankings_of_our_own_index():
  # Token vectors of document i point along axis i; query q looks along 3, 1.
  index = token_index.build(np.eye(5, dtype=np.float32), np.arange(6))
  queries = np.array([[[0, 0.9, 0, 1, 0.1]]], np.float32)
  found = search.search_batches(index, queries, np.ones((1, 1), bool), k=3)
  train = TrainingSet(["q"], ["d"] * 5, [0], [[1]], [[]])
  mined = hard_negatives.mine(train, found.index, num_negatives=2)
  assert mined.negatives[0].tolist() == [3, 4]


def test_bm25_on_scifact(shared_data):
  judged = beir.load(shared_data / "scifact", "train")
  train = training_set.from_retrieval_set(judged)
  index = bm25.build(judged.document_ids, judged.document_texts)
  run = bm25.search(index, judged.query_ids, judged.query_texts, k=30)
  rankings = hard_negatives.from_run(run, judged.query_ids, judged.document_ids)
  groups = near_duplicates.group(judged.document_texts)
  mined = hard_negatives.mine(train, rankings, num_negatives=8, groups=groups)
  best = [
    rankings[query].tolist().index(rows[0])
    for query, rows in zip(mined.query_index, mined.negatives, strict=True)
  ]
  # A positive is often the best rank, a negative one of the next few.
  assert max(best) < 10 and 0 < np.mean(best) < 2
  for query, rows in zip(mined.query_index, mined.negatives, strict=True):
    assert len(set(rows.tolist())) == 8
    judgements = judged.qrels[judged.query_ids[query]]
    assert all(judged.document_ids[row] not in judgements for row in rows)

import numpy as np
import pytest

from tokjax.data import beir, training_set
from tokjax.data.retrieval_set import RetrievalSet
from tokjax.data.training_set import TrainingSet

GOOD = {
  "query_texts": ["q0", "q1", "q2"],
  "document_texts": ["d0", "d1", "d2", "d3"],
  "query_index": [2, 0, 2],
  "positives": [[3, 0], [1], np.array([1, 0])],
  "negatives": [[1], [], [2]],
}


def lists(rows):
  return [np.asarray(row).tolist() for row in rows]


def test_relevant_documents_are_those_of_all_examples_of_a_query():
  train = TrainingSet(**GOOD)
  assert train.num_examples == 3
  found = train.relevant()
  assert {q: rows.tolist() for q, rows in found.items()} == {
    0: [1],
    2: [0, 1, 3],
  }


@pytest.mark.unchecked
@pytest.mark.parametrize(
  "changes,message",
  [
    ({"positives": [[0]]}, "query_index=3, positives=1, negatives=3"),
    ({"query_index": [], "positives": [], "negatives": []}, "one example"),
    ({"query_index": [2, 0, 3]}, r"query_index must .* 0\.\.2, got 3"),
    ({"positives": [[0], [4], [0]]}, r"positives must .* 0\.\.3, got 4"),
    ({"negatives": [[1], [], [-1]]}, r"negatives must .* 0\.\.3, got -1"),
    ({"positives": [[0], [], [0]]}, "positives of example 1 must not be empty"),
    ({"negatives": [[1], [2, 1], [2]]}, "of example 1 .* but row 1 is"),
    ({"teacher_scores": [[1.0]]}, "query_index=3, teacher_scores=1"),
    (
      {"teacher_scores": [[3, 2, 1], [1, 2], [3, 2, 1]]},
      "teacher_scores of example 1 must be 1, .* got 2",
    ),
    (
      {"teacher_scores": [[3, 2, 1], [1], [3, float("nan"), 1]]},
      "teacher_scores of example 2 must be finite",
    ),
  ],
)
def test_errors_name_the_example(changes, message):
  with pytest.raises(ValueError, match=message):
    TrainingSet(**(GOOD | changes))


def judged(qrels, documents=("a", "b", "c")):
  return RetrievalSet(
    name="three",
    document_ids=documents,
    document_titles=[""] * len(documents),
    document_texts=[f"text {key}" for key in documents],
    query_ids=["1", "2", "3"],
    query_texts=["one", "two", "three"],
    qrels=qrels,
  )


def test_judgements_become_examples_with_the_rows_of_the_set():
  qrels = {"3": {"c": 2, "b": 0, "a": 1}, "2": {"b": 0}, "1": {"b": 1, "x": 1}}
  train = training_set.from_retrieval_set(judged(qrels))
  assert train.query_index.tolist() == [0, 2]
  assert lists(train.positives) == [[1], [0, 2]]  # "x" is not in the corpus
  assert lists(train.negatives) == [[], []]
  assert train.query_texts == ["one", "two", "three"]
  assert train.document_texts == ["text a", "text b", "text c"]
  with pytest.raises(ValueError, match="three: no query has a relevant"):
    training_set.from_retrieval_set(judged({"2": {"b": 0}, "1": {"x": 1}}))


def test_scifact_train(shared_data):
  judgements = beir.load(shared_data / "scifact", "train")
  train = training_set.from_retrieval_set(judgements)
  assert (train.num_examples, len(train.document_texts)) == (809, 5183)
  assert sum(map(len, train.positives)) == 919
  for query, rows in train.relevant().items():
    ids = {judgements.document_ids[row] for row in rows}
    assert ids == judgements.qrels[judgements.query_ids[query]].keys()

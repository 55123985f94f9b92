import json

import numpy as np
import pytest

from tokjax.data import triples


def lists(rows):
  return [np.asarray(row).tolist() for row in rows]


@pytest.fixture
def write(tmp_path):
  def write(name, *lines):
    path = tmp_path / name
    encoded = [s if isinstance(s, str) else json.dumps(s) for s in lines]
    path.write_text("\n".join(encoded) + "\n", encoding="utf-8")
    return path

  return write


@pytest.fixture
def collection(write):
  """Ids that are not the rows, in both formats."""
  return {
    "queries": write("queries.tsv", "q2\twhat flies", "q1\twhat swims"),
    "documents": write(
      "corpus.jsonl",
      {"_id": "9", "title": "Duck", "text": "a bird"},
      {"_id": "7", "text": "a fish"},
      {"_id": "8", "text": "a stone"},
    ),
  }


def test_texts_between_tabs_are_named_once(write):
  train = triples.read(
    write("t.tsv", "what\tthis\tthat", "", "who\tthat\tthis", "what\tit\tthat")
  )
  assert train.query_texts == ["what", "who"]
  assert train.document_texts == ["this", "that", "it"]
  assert train.query_index.tolist() == [0, 1, 0]
  assert lists(train.positives) == [[0], [1], [2]]
  assert lists(train.negatives) == [[1], [0], [1]]
  assert train.teacher_scores is None


def test_texts_in_json_objects_with_one_or_many_documents(write):
  train = triples.read(
    write(
      "t.jsonl",
      {"query": "what", "positive": "this", "negative": "that"},
      {"query": "who", "positives": ["this", "me"], "negatives": ["it", "no"]},
      {"query": "why", "positive": "me"},
    )
  )
  assert train.document_texts == ["this", "that", "me", "it", "no"]
  assert lists(train.positives) == [[0], [0, 2], [2]]
  assert lists(train.negatives) == [[1], [3, 4], []]


def test_ids_keep_the_rows_of_the_collection(write, collection):
  for path in (
    write("ids.tsv", "q1\t7\t9", "q2\t9\t8"),
    write(
      "ids.jsonl",
      {"query": "q1", "positive": 7, "negative": "9"},
      {"query": "q2", "positives": ["9"], "negatives": [8]},
    ),
    write("ids.json", ["q1", 7, 9], ["q2", "9", "8"]),
  ):
    train = triples.read(path, **collection)
    assert train.query_texts == ["what flies", "what swims"]
    assert train.document_texts == ["Duck a bird", "a fish", "a stone"]
    assert train.query_index.tolist() == [1, 0]
    assert lists(train.positives) == [[1], [0]]
    assert lists(train.negatives) == [[0], [2]]


def test_lists_with_scores_put_the_positive_first(write, collection):
  path = write(
    "examples.json",
    ["q1", [7, 4.5], [8, -1], [9, 5.25]],
    ["q2", ["9", 3], ["7", 2.0], ["8", 1.0]],
  )
  train = triples.read(path, **collection)
  assert lists(train.positives) == [[1], [0]]
  assert lists(train.negatives) == [[2, 0], [1, 2]]
  assert lists(train.teacher_scores) == [[4.5, -1, 5.25], [3, 2, 1]]


def test_a_collection_between_tabs_may_have_titles(write):
  train = triples.read(
    write("ids.tsv", "1\t1\t2"),
    queries=write("queries.tsv", "1\twho"),
    documents=write("collection.tsv", "1\tof a wing\tLift", "2\tdrag"),
  )
  assert train.document_texts == ["Lift of a wing", "drag"]


BROKEN_TEXTS = [
  ("t.tsv", ["a\tb\tc", "a\tb"], r"t\.tsv:2: expected 3 columns .* got 2"),
  ("t.tsv", ["a\t\tc"], r"t\.tsv:1: expected 3 columns"),
  ("t.tsv", ["a\tb\tb"], r"t\.tsv:1: a positive is among the negatives"),
  ("t.tsv", ["a\tb\t "], r"t\.tsv:1: document must not be blank"),
  ("t.tsv", [""], r"t\.tsv: no examples"),
  ("t.csv", ["a,b,c"], r"suffix of .*t\.csv must be one of '\.tsv', .*'\.csv'"),
  ("t.jsonl", [["a", "b"], "", "{oops"], r"t\.jsonl:3: not JSON"),
  ("t.jsonl", ["3"], r"t\.jsonl:1: expected a JSON object or list, got int"),
  ("t.jsonl", [{"positive": "b"}], r"t\.jsonl:1: missing field query"),
  ("t.jsonl", [{"query": "a"}], r"t\.jsonl:1: expected at least one positive"),
  (
    "t.jsonl",
    [{"query": "a", "positive": "b", "positives": ["c"]}],
    r"t\.jsonl:1: expected positive or positives, got both",
  ),
  ("t.jsonl", [["a"]], r"t\.jsonl:1: expected a query and documents"),
  # Ids without their collection are not taken for texts.
  ("t.jsonl", [[1, "b"]], r"t\.jsonl:1: query must be a string, got 1"),
  ("t.jsonl", [["a", 2]], r"t\.jsonl:1: document must be a string, got 2"),
  ("t.jsonl", [["a", ["b", 1], "c"]], r"must be \[document, score\]"),
  ("t.jsonl", [["a", ["b", "1"]]], r"score must be a finite number, got '1'"),
  ("t.jsonl", ['["a", ["b", NaN]]'], r"score must be a finite number, got nan"),
  ("t.jsonl", [["a", ["b", True]]], r"score must be a finite number, got True"),
  (
    "t.jsonl",
    [["a", ["b", 1.0]], ["a", "b"]],
    r"t\.jsonl:2: either all lines must have scores or none",
  ),
]


@pytest.mark.parametrize("name,lines,message", BROKEN_TEXTS)
def test_errors_name_file_and_line(write, name, lines, message):
  with pytest.raises(ValueError, match=message):
    triples.read(write(name, *lines))


def test_errors_of_ids_and_collections(write, collection):
  path = write("ids.tsv", "q1\t7\t8", "q1\t7\t6")
  with pytest.raises(ValueError, match=r"ids\.tsv:2: no document has .* '6'"):
    triples.read(path, **collection)
  with pytest.raises(ValueError, match="must be given together"):
    triples.read(path, queries=collection["queries"])
  twice = write("twice.tsv", "7\ta", "7\tb")
  with pytest.raises(ValueError, match=r"twice.tsv:2: id '7' was used at .*:1"):
    triples.read(path, queries=collection["queries"], documents=twice)
  single = write("single.tsv", "7")
  with pytest.raises(ValueError, match=r"single.tsv:1: expected an id, a text"):
    triples.read(path, queries=collection["queries"], documents=single)
  with pytest.raises(ValueError, match="blank.tsv: no texts"):
    triples.read(path, queries=write("blank.tsv"), documents=twice)
  with pytest.raises(ValueError, match=r"no\.tsv: no such file"):
    triples.read(path.with_name("no.tsv"))

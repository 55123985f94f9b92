import random

import ir_measures
import numpy as np
import pytest
from ir_measures import AP, RR, P, R, Success, nDCG

from tokjax.eval import runs

MEASURES = {
  "nDCG@10": nDCG @ 10, "nDCG@3": nDCG @ 3, "R@20": R @ 20, "MRR": RR,
  "MAP": AP, "MAP@10": AP @ 10, "P@5": P @ 5, "Success@5": Success @ 5,
}  # fmt: skip


def example(seed, scores):
  """Graded and negative judgements; queries that only one side has."""
  draw = random.Random(seed)
  documents = [f"d{i}" for i in range(60)]
  qrels = {
    f"q{i}": {
      d: draw.choice([-1, 0, 0, 1, 2, 3])
      for d in draw.sample(documents, draw.randint(1, 20))
    }
    for i in range(30)
  }
  qrels["none"] = {"d1": 0}
  run = {
    f"q{i}": {
      d: scores(draw) for d in draw.sample(documents, draw.randint(1, 50))
    }
    for i in range(3, 34)
  }
  return run, qrels


@pytest.mark.parametrize("seed", range(3))
def test_equals_trec_eval_with_ties(seed):
  def tied(draw):  # 3 + 1e-9 is 3 in float32
    return draw.choice([1.0, 2.0, 2.5, 3.0, 3.0 + 1e-9])

  run, qrels = example(seed, tied)
  want = ir_measures.calc_aggregate(MEASURES.values(), qrels, run)
  got = runs.evaluate(run, qrels, list(MEASURES))
  for name, measure in MEASURES.items():
    np.testing.assert_allclose(got[name], want[measure], atol=1e-6)


def test_cut_reciprocal_rank_equals_a_library_without_ties():
  # ir-measures takes RR@10 from a provider that orders ties its own way.
  run, qrels = example(0, lambda draw: draw.random())
  want = ir_measures.calc_aggregate([RR @ 10], qrels, run)[RR @ 10]
  got = runs.evaluate(run, qrels, ["MRR@10"])["MRR@10"]
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_ties_put_the_higher_id_first():
  run = {"q": {"a": 1.0, "b": 1.0}}
  assert runs.evaluate(run, {"q": {"b": 1}}, ["MRR"]) == {"MRR": 1.0}
  assert runs.evaluate(run, {"q": {"a": 1}}, ["MRR"]) == {"MRR": 0.5}


def test_missing_queries_count_as_zero():
  run, qrels = {"q": {"a": 1.0}}, {"q": {"a": 1}, "r": {"a": 1}}
  assert runs.evaluate(run, qrels, ["R@1"]) == {"R@1": 0.5}
  got = runs.evaluate_queries(run, qrels, ["R@1"])
  assert got == {"R@1": {"q": 1.0, "r": 0.0}}


def test_capped_recall_and_removed_query_id():
  qrels = {"q": {"a": 1, "b": 1, "c": 1}}
  run = {"q": {"q": 3.0, "a": 2.0, "b": 1.0}}
  assert runs.evaluate(run, qrels, ["R_cap@2"]) == {"R_cap@2": 0.5}
  got = runs.evaluate(run, qrels, ["R_cap@2"], remove_query_id=True)
  assert got == {"R_cap@2": 1.0}


def test_runs_from_arrays():
  index, scores = np.array([[1, 0], [0, -1]]), np.array([[2.0, 1], [3, 0]])
  got = runs.from_arrays(["q", "r"], ["a", "b"], index, scores)
  assert got == {"q": {"b": 2.0, "a": 1.0}, "r": {"a": 3.0}}
  with pytest.raises(ValueError, match="below 1 documents, got 1"):
    runs.from_arrays(["q", "r"], ["a"], index, scores)


ERRORS = [
  ({"q": {"a": 1.0}}, {"q": {"a": 1}}, "nDCG", "got 'nDCG'"),
  ({"q": {"a": 1.0}}, {"q": {"a": 1}}, "ERR@5", "got 'ERR@5'"),
  ({"q": {"a": 1.0}}, {"q": {"a": 1}}, "P@0", "got 'P@0'"),
  ({"q": {"a": 1.0}}, {}, "P@1", "qrels judge no query"),
  ({"q": {"a": 1.0}}, {"7": {"a": 1}}, "P@1", "the run has 'q', the qrels '7'"),
  ({"q": {"a": np.nan}}, {"q": {"a": 1}}, "P@1", "query 'q' is NaN"),
]


@pytest.mark.parametrize("run,qrels,metric,message", ERRORS)
def test_errors(run, qrels, metric, message):
  with pytest.raises(ValueError, match=message):
    runs.evaluate(run, qrels, [metric])

import math

import numpy as np
import pytest

from tokjax.data import beir
from tokjax.eval import bm25, runs


def test_scores_equal_the_formula():
  texts = ["alpha beta alpha", "beta gamma", "gamma delta epsilon zeta"]
  index = bm25.build(["a", "b", "c"], texts, k1=1.2, b=0.5, language=None)
  got = bm25.search(index, ["q"], ["alpha beta unknown"])["q"]

  def weight(count, holding, length):
    rarity = math.log(1 + (3 - holding + 0.5) / (holding + 0.5))
    return rarity * count / (count + 1.2 * (0.5 + 0.5 * length / 3))

  assert got.keys() == {"a", "b"}  # "c" shares no word
  np.testing.assert_allclose(got["a"], weight(2, 1, 3) + weight(1, 2, 3), 1e-5)
  np.testing.assert_allclose(got["b"], weight(1, 2, 2), 1e-5)


def test_queries_without_known_words_find_nothing():
  index = bm25.build(["a", "b"], ["wings lift", ""])
  got = bm25.search(index, ["q", "r", "s"], ["lifting", "heat", ""], k=1)
  assert [list(hits) for hits in got.values()] == [["a"], [], []]
  assert bm25.search(index, [], []) == {}


def test_errors():
  with pytest.raises(ValueError, match="document_ids=1, texts=2"):
    bm25.build(["a"], ["one", "two"])
  with pytest.raises(ValueError, match="texts hold no word, in 1 documents"):
    bm25.build(["a"], ["the"])
  with pytest.raises(ValueError, match="b must lie in 0..1, got 2.0"):
    bm25.build(["a"], ["one"], b=2.0)
  with pytest.raises(ValueError, match="language must be one of .*'english'"):
    bm25.build(["a"], ["one"], language="klingon")
  index = bm25.build(["a"], ["wings"])
  with pytest.raises(ValueError, match="k must be at least 1"):
    bm25.search(index, ["q"], ["wings"], k=0)


@pytest.mark.parametrize(
  "name,want", [("scifact", 0.6863), ("vaswani", 0.4279)]
)
def test_published_values_on_real_sets(shared_data, name, want):
  data = beir.load(shared_data / name)
  index = bm25.build(data.document_ids, data.document_texts)
  run = bm25.search(index, data.query_ids, data.query_texts)
  got = runs.evaluate(run, data.qrels, ["nDCG@10"])["nDCG@10"]
  assert abs(got - want) < 0.002

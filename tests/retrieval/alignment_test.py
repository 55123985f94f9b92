"""Matches become whole words, strongest first, specials left out."""

import numpy as np
import pytest

from tokjax.retrieval import alignment

TEXT = "Lift of a swept wing."
# [CLS] lift of a swe ##pt wing . [SEP]
SPANS = np.array(
  [[0, 0], [0, 4], [5, 7], [8, 9], [10, 13], [13, 15], [16, 20], [20, 21],
   [0, 0]]
)  # fmt: skip


def words(matches):
  return [TEXT[m.start : m.end] for m in matches]


def test_subwords_become_the_whole_word():
  found = alignment.matched_words(
    TEXT, SPANS, np.array([5, 6]), np.array([0.5, 0.75]), ["swept", "wings"]
  )
  assert words(found) == ["swept", "wing"]
  assert found[1] == alignment.Match(16, 20, 0.75, "wings")


def test_strongest_query_token_names_the_word():
  found = alignment.matched_words(
    TEXT, SPANS, np.array([4, 5]), np.array([0.9, 0.3]), ["swept", "arrow"]
  )
  assert [(m.similarity, m.query_token) for m in found] == [(0.9, "swept")]


def test_special_tokens_mark_nothing():
  found = alignment.matched_words(
    TEXT, SPANS, np.array([0, 1, 8]), np.ones(3), ["lift", "", "wing"]
  )
  assert found == []


def test_text_order_and_no_overlap():
  found = alignment.matched_words(
    TEXT, SPANS, np.array([6, 1, 7]), np.ones(3), ["a", "b", "c"]
  )
  assert words(found) == ["Lift", "wing", "."]
  assert all(a.end <= b.start for a, b in zip(found, found[1:], strict=False))


def test_empty_text_has_no_words():
  none = alignment.matched_words(
    "", np.zeros((2, 2), int), np.array([1]), np.ones(1), ["x"]
  )
  assert none == []


def test_errors_name_the_sizes():
  with pytest.raises(ValueError, match="got 2, 1 and 1"):
    alignment.matched_words(TEXT, SPANS, np.array([1, 2]), np.ones(1), ["x"])
  with pytest.raises(ValueError, match=r"index must lie in 0\.\.8, got 9\.\.9"):
    alignment.matched_words(TEXT, SPANS, np.array([9]), np.ones(1), ["x"])

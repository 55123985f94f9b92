"""Matches become whole words, strongest first, specials left out."""

import dataclasses

import numpy as np
import pytest
import tokenizers

from tokjax.retrieval import alignment, colbert

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


@pytest.fixture
def tokenizer():
  names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused0]",
           "[unused1]", "swe", "##pt", "wing", ".", "lift", "of"]  # fmt: skip
  built = tokenizers.Tokenizer(
    tokenizers.models.WordPiece(
      {name: i for i, name in enumerate(names)}, unk_token="[UNK]"
    )
  )
  built.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
  built.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
  built.post_processor = tokenizers.processors.BertProcessing(
    ("[SEP]", 3), ("[CLS]", 2)
  )
  return built


def test_document_spans_follow_marker_and_skiplist(tokenizer):
  config = colbert.ColbertConfig(document_length=8)
  found = alignment.document_spans("Swept wing. Lift", tokenizer, config)
  # [CLS] [D] swe ##pt wing (. is not scored) lift [SEP]
  assert found.tolist() == [[0, 0], [0, 0], [0, 3], [3, 5], [6, 10], [12, 16],
                            [0, 0]]  # fmt: skip


def test_document_spans_without_specials(tokenizer):
  config = dataclasses.replace(
    colbert.ColbertConfig.zero_shot(4), score_specials=False
  )
  found = alignment.document_spans("wing of swept", tokenizer, config)
  assert found.tolist() == [[0, 4], [5, 7]]  # cut to four with [CLS], [SEP]


def test_query_spans_stop_before_the_padding(tokenizer):
  config = colbert.ColbertConfig(query_length=32)
  found = alignment.query_spans("lift", tokenizer, config)
  assert found.tolist() == [[0, 0], [0, 0], [0, 4], [0, 0]]


def test_empty_text_has_only_specials(tokenizer):
  config = colbert.ColbertConfig.zero_shot()
  assert alignment.query_spans("", tokenizer, config).tolist() == [[0, 0]] * 2


def test_align_joins_spans_and_similarities(tokenizer):
  config = colbert.ColbertConfig.zero_shot()
  # [CLS] lift [SEP] and padding; [CLS] swe ##pt wing [SEP]
  query = np.eye(5, dtype=np.float32)[[0, 1, 2, 4]]
  document = np.eye(5, dtype=np.float32)[[0, 3, 1, 3, 2]]
  found = alignment.align(
    "lift", "swept wing", query, document, tokenizer, config
  )
  assert found == [alignment.Match(0, 5, 1.0, "lift")]

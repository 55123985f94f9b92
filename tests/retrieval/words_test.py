import hashlib

import numpy as np
import pytest
import Stemmer
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from tokjax.retrieval import words

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "token", "##s", "##ize", "##d"]
PIECES += ["run", "##ning", "the", ".", ",", "'", "abc", "ete", "中", "国"]
PAD, UNK, CLS, SEP = range(4)


@pytest.fixture(scope="module")
def tokenizer():
  model = models.WordPiece(
    {piece: i for i, piece in enumerate(PIECES)}, unk_token="[UNK]"
  )
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.normalizer = normalizers.BertNormalizer()
  tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  tokenizer.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
  )
  return tokenizer


def hash_of(word):
  digest = hashlib.sha256(word.encode()).digest()
  return int.from_bytes(digest[:4], "little")


def pieces_of(row):
  """(piece, word) of each token, words as hashes."""
  hashes = [0, *row.words.tolist()]
  return [
    (PIECES[i], hashes[k])
    for i, k in zip(row.ids.tolist(), row.slot.tolist(), strict=True)
  ]


def test_tokens_get_the_stem_of_their_word(tokenizer):
  (row,) = words.tokenize_words(
    ["Tokenized the tokens, the runs."], tokenizer, length=99
  )
  token, the, comma, run, stop = map(hash_of, ["token", "the", ",", "run", "."])
  assert pieces_of(row) == [
    ("[CLS]", 0),
    ("token", token), ("##ize", token), ("##d", token),
    ("the", the),
    ("token", token), ("##s", token),
    (",", comma),
    ("the", the),
    ("run", run), ("##s", run),
    (".", stop),
    ("[SEP]", 0),
  ]  # fmt: skip
  assert row.words.tolist() == [token, the, comma, run, stop]
  assert (row.ids.dtype, row.slot.dtype) == (np.int32, np.int32)
  assert row.words.dtype == np.uint32


def test_hash_is_the_first_four_bytes_of_sha256(tokenizer):
  (row,) = words.tokenize_words(["abc"], tokenizer, length=9)
  assert row.words.tolist() == [0xBF1678BA]  # sha256("abc") is ba7816bf...


def test_hash_zero_becomes_one(tokenizer, monkeypatch):
  class Zero:
    def digest(self):
      return bytes(32)

  monkeypatch.setattr(words.hashlib, "sha256", lambda data: Zero())
  (row,) = words.tokenize_words(["the"], tokenizer, length=9)
  assert row.words.tolist() == [1] and row.slot.tolist() == [0, 1, 0]


def test_equal_hashes_are_one_word(tokenizer, monkeypatch):
  class Same:
    def digest(self):
      return bytes([5] + [0] * 31)

  monkeypatch.setattr(words.hashlib, "sha256", lambda data: Same())
  (row,) = words.tokenize_words(["the run"], tokenizer, length=9)
  assert row.words.tolist() == [5] and row.slot.tolist() == [0, 1, 1, 0]


def test_without_stemming_only_case_is_ignored(tokenizer):
  (row,) = words.tokenize_words(
    ["Run runs RUN running"], tokenizer, length=99, stem=False
  )
  assert row.slot.tolist() == [0, 1, 2, 2, 1, 3, 3, 0]
  assert row.words.tolist() == [*map(hash_of, ["run", "runs", "running"])]


def test_every_text_equals_a_loop_over_tokens_and_words(tokenizer):
  texts = [
    "Running, the tokenized: abc'S\tété the  run.",
    "été été. ÉTÉ",
    "the 中国 abc-the",  # not split by the words' rule, but by the tokens'
    "  ...  ",
    "",
    "the the the",
  ]
  stem = Stemmer.Stemmer("porter").stemWord
  split = pre_tokenizers.BertPreTokenizer().pre_tokenize_str
  rows = words.tokenize_words(texts, tokenizer, length=99)
  for text, row in zip(texts, rows, strict=True):
    encoding = tokenizer.encode(text)
    assert row.ids.tolist() == encoding.ids
    want, unique = [], []
    for (start, end), special in zip(
      encoding.offsets, encoding.special_tokens_mask, strict=True
    ):
      found = 0
      for word, (first, last) in split(text):
        if first <= start and end <= last and not special:
          found = hash_of(stem(word.lower()))
      want.append(found)
      if found and found not in unique:
        unique.append(found)
    assert [word for _, word in pieces_of(row)] == want
    assert row.words.tolist() == unique


def test_a_cut_text_keeps_the_words_of_its_tokens(tokenizer):
  texts = ["the tokenized run", "the run", "the"]
  rows = words.tokenize_words(texts, tokenizer, length=4)
  # "tokenized" is cut after its first piece and keeps its whole spelling.
  assert pieces_of(rows[0])[1:] == [
    ("the", hash_of("the")), ("token", hash_of("token")), ("[SEP]", 0)
  ]  # fmt: skip
  assert rows[0].words.tolist() == [hash_of("the"), hash_of("token")]
  assert [row.ids.tolist()[-1] for row in rows] == [SEP] * 3
  assert [len(row.ids) for row in rows] == [4, 4, 3]


def test_tokenizers_without_special_tokens_are_cut_too():
  model = models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, "[UNK]")
  plain = tokenizers.Tokenizer(model)
  plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  (row,) = words.tokenize_words(["a b a"], plain, length=2)
  assert row.ids.tolist() == [1, 2] and row.slot.tolist() == [1, 2]


def test_spaces_before_a_token_do_not_count_and_borders_do():
  model = models.WordLevel({"[UNK]": 0, "▁a": 1}, "[UNK]")
  spaced = tokenizers.Tokenizer(model)
  spaced.pre_tokenizer = pre_tokenizers.Metaspace()
  (row,) = words.tokenize_words(["a a x.x"], spaced, length=9)
  assert spaced.encode("a a").offsets[1] == (1, 3)  # with its space
  assert row.slot.tolist() == [1, 1, 0]  # "x.x" is one token of three words
  assert row.words.tolist() == [hash_of("a")]


def test_arrays_are_padded_with_zero(tokenizer):
  got = words.word_ids(["the runs", ""], tokenizer, length=6, num_words=3)
  the, run = hash_of("the"), hash_of("run")
  ids = [[CLS, PIECES.index("the"), PIECES.index("run"), 5, SEP, 0],
         [CLS, SEP, 0, 0, 0, 0]]  # fmt: skip
  assert got.ids.tolist() == ids
  assert got.attention_mask.tolist() == [
    [True] * 5 + [False],
    [True] * 2 + [False] * 4,
  ]
  assert got.word_of_token.tolist() == [[0, the, run, run, 0, 0], [0] * 6]
  assert got.unique_words.tolist() == [[the, run, 0], [0] * 3]
  assert got.overflow.tolist() == [0, 0]
  assert got.word_of_token.dtype == got.unique_words.dtype == np.uint32


def test_words_without_a_slot_are_counted(tokenizer):
  texts = ["the run abc.", "the"]
  got = words.word_ids(texts, tokenizer, length=8, num_words=2)
  full = words.word_ids(texts, tokenizer, length=8)
  assert got.overflow.tolist() == [2, 0] and full.overflow.tolist() == [0, 0]
  assert full.unique_words.shape == (2, 8)
  np.testing.assert_array_equal(got.unique_words, full.unique_words[:, :2])
  np.testing.assert_array_equal(got.word_of_token, full.word_of_token)


def test_index_numbers_the_words_of_each_text(tokenizer):
  texts = ["the run the", "run abc"]
  index = words.word_ids(texts, tokenizer, length=6, ids="index")
  assert index.word_of_token.tolist() == [
    [0, 1, 2, 1, 0, 0],
    [0, 1, 2, 0, 0, 0],
  ]
  assert index.unique_words[:, :3].tolist() == [[1, 2, 0]] * 2
  hashed = words.word_ids(texts, tokenizer, length=6)
  assert hashed.word_of_token[0, 2] == hashed.word_of_token[1, 1]


def test_blocks_of_texts_do_not_show(tokenizer, monkeypatch):
  texts = ["the run", "abc", "", "the.", "tokens"]
  whole = words.tokenize_words(texts, tokenizer, length=9)
  monkeypatch.setattr(words, "_BLOCK_TEXTS", 2)
  parts = words.tokenize_words(texts, tokenizer, length=9)
  for one, two in zip(whole, parts, strict=True):
    for x, y in zip(one, two, strict=True):
      np.testing.assert_array_equal(x, y)
  assert words.tokenize_words([], tokenizer, length=9) == []


@pytest.mark.unchecked
def test_errors_name_the_argument(tokenizer):
  with pytest.raises(ValueError, match="length must exceed the 2 special"):
    words.tokenize_words(["a"], tokenizer, length=2)
  with pytest.raises(ValueError, match="ids must be one of 'hash', 'index'"):
    words.word_ids(["a"], tokenizer, length=9, ids="text")
  with pytest.raises(ValueError, match="num_words must lie in"):
    words.word_ids(["a"], tokenizer, length=9, num_words=0)
  padding = tokenizers.Tokenizer.from_str(tokenizer.to_str())
  padding.enable_padding()
  with pytest.raises(ValueError, match="must not truncate or pad"):
    words.tokenize_words(["a"], padding, length=9)

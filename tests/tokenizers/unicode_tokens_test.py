"""Code points as ids: round trips, layout, and merges against byte pairs."""

import json

import hypothesis
import numpy as np
import pytest
import tokenizers
from hypothesis import strategies

from tokjax.tokenizers import unicode_tokens
from tokjax.tokenizers.unicode_tokens import SPECIALS, UnicodeTokenizer

NGRAMS = ("ab", "bc", "ca", "abc", "bca", "абв", "аб", "中文", "  ", "the")
TOKENIZER = UnicodeTokenizer(NGRAMS)
SPELLING = UnicodeTokenizer(NGRAMS, fallback="hex")

covered = strategies.one_of(
  strategies.sampled_from("abcthe абв中文<>"),
  strategies.characters(max_codepoint=0xD7FF),
  strategies.characters(min_codepoint=0xF900, max_codepoint=0xFFFE),
)
anything = strategies.integers(0, 0x10FFFF).map(chr)  # surrogates, too


@hypothesis.given(strategies.text(covered))
def test_covered_text_comes_back(text):
  ids = TOKENIZER.encode(text)
  assert ids.dtype == np.int32 and len(ids) <= len(text)
  assert TOKENIZER.decode(ids) == text


@hypothesis.given(strategies.text(strategies.one_of(covered, anything)))
def test_spelling_brings_every_str_back(text):
  assert SPELLING.decode(SPELLING.encode(text)) == text


def test_every_covered_code_point_is_its_own_id():
  points = [*range(0xD800), *range(0xF900, 0xFFFF)]
  text = "".join(map(chr, points))
  plain = UnicodeTokenizer()
  assert plain.encode(text).tolist() == points
  assert plain.decode(points) == text
  ascii = "".join(map(chr, range(128)))
  assert plain.encode(ascii).tolist() == [ord(c) for c in ascii]


def test_what_has_no_id_is_unknown_and_said_so():
  unknown = 0xE003
  text = "a😀\ud800\ue000\uf8ff\uffff b"
  want = [97, *[unknown] * 5, 32, 98]
  assert TOKENIZER.encode(text).tolist() == want
  assert TOKENIZER.decode(want) == "a" + 5 * "<unk>" + " b"
  assert TOKENIZER.decode(want, keep_specials=False) == "a b"
  for character in text:
    known = unicode_tokens.is_covered(character)
    assert known == (character in "a b")


def test_spelled_code_points():
  ids = SPELLING.encode("😀")  # U+1F600
  assert (ids - 0xE0F0).tolist() == [0, 1, 0xF, 6, 0, 0]
  assert SPELLING.decode(ids[1:]) == "\ufffd"
  assert SPELLING.decode(np.full(6, 0xE0FF)) == "\ufffd"  # above 10FFFF


def test_layout():
  tokens = TOKENIZER.tokens
  assert len(tokens) == len(set(tokens)) == 65536
  by_length = ["abc", "bca", "the", "абв", "  ", "ab", "bc", "ca", "аб", "中文"]
  assert list(tokens[0xD800 : 0xD800 + 10]) == by_length
  assert tokens[0xD80A] == "<unused_55306>" and tokens[-1] == "<unused_65535>"
  assert tokens[0xE000 : 0xE000 + 23] == SPECIALS
  assert tokens[0xE017] == "<special_token_57367>"
  assert TOKENIZER.special_id("</s>") == 0xE002
  # More than 2,048: past the special tokens, then past the private use area.
  many = tuple(chr(97 + i // 100) + chr(500 + i % 100) for i in range(2050))
  tokens = UnicodeTokenizer(many).tokens
  assert tokens[0xDFFF] == many[2047] and tokens[0xE100] == many[2048]
  many = [chr(97 + i // 1000) + chr(500 + i % 1000) for i in range(8193)]
  assert UnicodeTokenizer(many, num_ids=65537).tokens[65536] == many[-1]
  with pytest.raises(
    ValueError, match=r"number_of_ngrams .* 0..8192, got 8193"
  ):
    UnicodeTokenizer(many)


def test_rank_goes_before_the_longest_match():
  tokenizer = UnicodeTokenizer(("xa", "ab"))
  assert [tokenizer.tokens[i] for i in tokenizer.encode("xab")] == ["x", "ab"]
  assert [tokenizer.tokens[i] for i in tokenizer.encode("xa")] == ["xa"]
  # A run of three whose parts are no tokens is never reached.
  assert len(TOKENIZER.encode("the")) == 3
  assert len(TOKENIZER.encode("abc")) == 1


def byte_pair_tokenizer(ngrams):
  """The published way: another library's byte pairs over the same tokens."""
  vocabulary = {
    token: i for i, token in enumerate(UnicodeTokenizer(ngrams).tokens)
  }
  merges = []
  for gram in sorted(ngrams, key=lambda x: (-len(x), x)):
    for cut in range(1, len(gram)):
      if gram[:cut] in vocabulary and gram[cut:] in vocabulary:
        merges.append((gram[:cut], gram[cut:]))
  model = tokenizers.models.BPE(vocabulary, merges, unk_token="<unk>")
  return tokenizers.Tokenizer(model)


LETTERS = [a + b for a in "abcd" for b in "abcd"]
MANY = tuple(LETTERS[::2]) + tuple(a + b for a in LETTERS[::3] for b in "abc")
MANY += tuple(a + "dab" for a in "abc")
OURS, THEIRS = UnicodeTokenizer(MANY), byte_pair_tokenizer(MANY)


@hypothesis.given(strategies.text("abcd😀", max_size=60))
def test_merges_equal_byte_pairs(text):
  assert OURS.encode(text).tolist() == THEIRS.encode(text).ids


def test_names_of_special_tokens_are_text_unless_asked_for():
  text = "<s>ab</s>"
  assert TOKENIZER.decode(TOKENIZER.encode(text), keep_specials=False) == text
  ids = TOKENIZER.encode(text, parse_specials=True)
  assert [TOKENIZER.tokens[i] for i in ids] == ["<s>", "ab", "</s>"]


def test_frequent_ngrams_are_counted_in_words():
  english, greek = ["aab aab ab", "b1b ba"], ["αβγ αβ", "αβ"]
  got = unicode_tokens.frequent_ngrams([english, greek], lengths=(2, 3), top=2)
  # ab 3, aa 2, ba 1; αβ 3, βγ 1; nothing across the space or the digit.
  assert got == ("aab", "αβγ", "aa", "ab", "αβ", "βγ")
  tied = unicode_tokens.frequent_ngrams([["cd ab"]], lengths=(2,), top=1)
  assert tied == ("ab",)
  assert unicode_tokens.frequent_ngrams([["𝒜𝒜 ab"]]) == ("ab",)


def test_files(tmp_path):
  path = tmp_path / "new" / "tokenizer.json"
  saved = UnicodeTokenizer(NGRAMS, ("<unk>", "<ä>"), "hex", 70000)
  unicode_tokens.save(saved, path)
  assert unicode_tokens.load(path) == saved
  settings = json.loads(path.read_text())
  for change, message in (
    ({"format": "other"}, "must hold a 'tokjax unicode tokenizer 1'"),
    ({"more": 1}, "must hold"),
    ({"num_ids": "many"}, "num_ids must be int"),
    ({"ngrams": [1]}, "ngrams must be list"),
    ({"fallback": "x"}, "fallback must be one of 'unk', 'hex'"),
  ):
    path.write_text(json.dumps(settings | change))
    with pytest.raises(ValueError, match=message):
      unicode_tokens.load(path)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"ngrams": ("a",)}, "two or more characters with ids, got 'a'"),
    ({"ngrams": ("a😀",)}, "two or more characters"),
    ({"specials": ("<s>",)}, "must have '<unk>'"),
    ({"specials": ("<unk>", "<unk>")}, "specials must differ"),
    ({"num_ids": 100}, "num_ids must lie in 65536..131072, got 100"),
  ],
)
def test_errors_name_the_setting(settings, message):
  with pytest.raises(ValueError, match=message):
    UnicodeTokenizer(**settings)


def test_decode_refuses_what_is_no_id():
  with pytest.raises(
    ValueError, match="highest must lie in 0..65535, got 65536"
  ):
    TOKENIZER.decode([1, 65536])
  with pytest.raises(ValueError, match="name must be one of"):
    TOKENIZER.special_id("<x>")

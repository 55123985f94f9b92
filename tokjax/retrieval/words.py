"""Whole words of a text, and the sub-word tokens that each is made of.

Runs on the host. A word is what stands between spaces or punctuation, and
each punctuation mark; spellings that differ by case or ending count as one.
Word ids are what `tokjax.retrieval.colberter` pools tokens by, and compares.
"""

import hashlib
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import Stemmer as snowball
import tokenizers

from tokjax import checks

__all__ = ["TextWords", "WordIds", "tokenize_words", "word_ids"]

# Texts tokenised at a time: an encoding with its offsets is large.
_BLOCK_TEXTS = 4096


class TextWords(NamedTuple):
  """Tokens and unique words of one text.

  Attributes:
    ids: token ids, special tokens included.
    slot: position in `words` of each token's word, counted from 1; 0 for
      special tokens.
    words: hash of each unique word, in the order of first appearance; never 0.
  """

  ids: np.ndarray  # int32 [N]
  slot: np.ndarray  # int32 [N]
  words: np.ndarray  # uint32 [n]


class WordIds(NamedTuple):
  """Tokens and unique words of a batch of texts, padded to one shape.

  Attributes:
    ids: token ids, 0 after the end.
    attention_mask: True where there is a token.
    word_of_token: id of each token's word; 0 for special tokens and padding.
    unique_words: each word of the text once, in the order of first
      appearance, 0 after the last.
    overflow: words of each text that found no place in `unique_words`. Their
      tokens keep their word ids, which no slot gathers.
  """

  ids: np.ndarray  # int32 [B, N]
  attention_mask: np.ndarray  # bool [B, N]
  word_of_token: np.ndarray  # uint32 [B, N]
  unique_words: np.ndarray  # uint32 [B, W]
  overflow: np.ndarray  # int32 [B]


def word_ids(
  texts: Sequence[str],
  tokenizer: tokenizers.Tokenizer,
  *,
  length: int,
  num_words: int | None = None,
  stem: bool = True,
  ids: Literal["hash", "index"] = "hash",
) -> WordIds:
  """Token ids and word ids of texts, as arrays of one shape.

  Args:
    texts: one string per row; may be empty strings.
    tokenizer: as in `tokenize_words`.
    length: N, tokens of every row, special tokens included; longer texts are
      cut.
    num_words: W, slots for unique words; None for `length`, which suffices
      for every text. 128 is enough for most texts of 200 tokens.
    stem: as in `tokenize_words`.
    ids: "hash" numbers a word the same in every text, which matching words of
      queries and documents needs; "index" counts from 1 in each text.

  Returns:
    NumPy arrays.

  Raises:
    ValueError: as `tokenize_words`, or for an unknown `ids`.

  Example:
    >>> words = tokenizers.models.WordLevel(
    ...   {"[UNK]": 0, "run": 1, "ran": 2, "runs": 3}, "[UNK]")
    >>> tokenizer = tokenizers.Tokenizer(words)
    >>> tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    >>> found = word_ids(["runs run ran"], tokenizer, length=4, ids="index")
    >>> found.word_of_token.tolist(), found.unique_words.tolist()
    ([[1, 1, 2, 0]], [[1, 2, 0, 0]])

  Source: as `tokenize_words`.
  """
  checks.one_of(("hash", "index"), ids=ids)
  num_words = length if num_words is None else num_words
  checks.in_range(1, 1 << 20, num_words=num_words)
  rows = tokenize_words(texts, tokenizer, length=length, stem=stem)
  batch = WordIds(
    ids=np.zeros((len(rows), length), np.int32),
    attention_mask=np.zeros((len(rows), length), bool),
    word_of_token=np.zeros((len(rows), length), np.uint32),
    unique_words=np.zeros((len(rows), num_words), np.uint32),
    overflow=np.zeros(len(rows), np.int32),
  )
  for i, row in enumerate(rows):
    count, size = len(row.ids), len(row.words)
    words = np.arange(1, size + 1) if ids == "index" else row.words
    batch.ids[i, :count] = row.ids
    batch.attention_mask[i, :count] = True
    batch.word_of_token[i, :count] = np.concatenate([[0], words])[row.slot]
    batch.unique_words[i, :size] = words[:num_words]
    batch.overflow[i] = max(0, size - num_words)
  return batch


def tokenize_words(
  texts: Sequence[str],
  tokenizer: tokenizers.Tokenizer,
  *,
  length: int,
  stem: bool = True,
) -> list[TextWords]:
  """Token ids of each text, and which unique word each token is a part of.

  Texts are split at white space and around punctuation, words lower-cased and
  stemmed, and a word is hashed to the first four bytes of its SHA-256 as a
  little-endian number (0 becomes 1). A token belongs to the word whose
  characters hold all of its own, white space aside; one that reaches over the
  border of a word belongs to none. A text cut at `length` keeps the words of
  the tokens that are left, by their whole spelling.

  Two words of the same hash count as one: 303 pairs among the 1.6 million
  words of MS MARCO.

  Args:
    texts: one string per row; may be empty strings.
    tokenizer: adds the special tokens; must not cut or pad by itself.
    length: most ids of a row, special tokens included; those after the text
      are kept when it is cut.
    stem: whether to take off endings (Porter's rules); False only lower-cases.

  Returns:
    One entry per text.

  Raises:
    ValueError: if `length` has no room for one token, or the tokenizer cuts
      or pads.

  Example:
    >>> model = tokenizers.models.WordLevel({"[UNK]": 0, "Cat": 1}, "[UNK]")
    >>> tokenizer = tokenizers.Tokenizer(model)
    >>> tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    >>> row, = tokenize_words(["Cat, cats"], tokenizer, length=9)
    >>> row.ids.tolist(), row.slot.tolist(), len(row.words)
    ([1, 0, 0], [1, 2, 1], 2)

  Source: Hofstaetter et al., 2022, "ColBERTer", and its published tokenizer,
  which stems with NLTK's extension of Porter's rules (and only when told to);
  here they are Snowball's "porter".
  """
  if tokenizer.truncation is not None or tokenizer.padding is not None:
    raise ValueError(
      "tokenizer must not truncate or pad: call no_truncation() and "
      "no_padding() on it"
    )
  special = tokenizer.encode("a").special_tokens_mask
  closing = special[::-1].index(0)
  room = length - closing
  if room <= special.index(0):
    raise ValueError(
      f"length must exceed the {sum(special)} special tokens, got {length}"
    )
  split = tokenizers.pre_tokenizers.BertPreTokenizer().pre_tokenize_str
  hashes = _Hashes(stem)

  def row(text, encoding):
    ids, spans = encoding.ids, encoding.offsets
    if len(ids) > length:
      end = len(ids) - closing
      ids, spans = ids[:room] + ids[end:], spans[:room] + spans[end:]
    spelled = split(text)
    places = np.array([place for _, place in spelled]).reshape(-1, 2)
    words = _word_of_span(np.array(spans).reshape(-1, 2), places).tolist()
    slots: dict[int, int] = {}  # by hash
    slot_of_word = {
      word: slots.setdefault(hashes[spelled[word][0]], len(slots) + 1)
      for word in dict.fromkeys(words)
      if word >= 0
    }
    return TextWords(
      ids=np.array(ids, np.int32),
      slot=np.array([slot_of_word.get(word, 0) for word in words], np.int32),
      words=np.fromiter(slots, np.uint32, len(slots)),
    )

  rows = []
  for start in range(0, len(texts), _BLOCK_TEXTS):
    block = list(texts[start : start + _BLOCK_TEXTS])
    rows.extend(map(row, block, tokenizer.encode_batch(block)))
  return rows


class _Hashes(dict):
  """Hash of a word as it is spelled, worked out once per spelling."""

  def __init__(self, stem: bool):
    super().__init__()
    self._stem = snowball.Stemmer("porter").stemWord if stem else str

  def __missing__(self, word: str) -> int:
    digest = hashlib.sha256(self._stem(word.lower()).encode()).digest()
    value = int.from_bytes(digest[:4], "little") or 1
    self[word] = value
    return value


def _word_of_span(spans, places):
  """Word that holds each token, -1 for none: int[N, 2], int[n, 2] -> int[N].

  Words hold every character but white space, so the first word that ends
  after a token starts holds the token if it reaches as far.
  """
  if not len(places):
    return np.full(len(spans), -1)
  start, end = spans.T
  word = np.searchsorted(places[:, 1], start, side="right")
  inside = np.minimum(word, len(places) - 1)
  holds = (word < len(places)) & (start < end) & (end <= places[inside, 1])
  return np.where(holds, inside, -1)

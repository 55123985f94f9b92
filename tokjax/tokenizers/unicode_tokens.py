"""Every code point is a token: a tokenizer without training, only counting.

    ngrams = frequent_ngrams([english_texts, russian_texts])
    tokenizer = UnicodeTokenizer(ngrams)
    ids = tokenizer.encode("любовь")  # int32
    text = tokenizer.decode(ids)

The id of a character is its code point. Where Unicode has surrogates and
private use, which texts do not hold, stand special tokens and frequent runs of
two or three characters. Pure Python and NumPy, on the host.

Source: Bochkov, 2025, "Emergent Semantics Beyond Token Embeddings: Transformer
LMs with Frozen Visual Unicode Representations", and its notebooks that build
the tokenizers bvv241-2-3 and bvv241-max: layout of the ids, names of the
special tokens and order of the merges are theirs. Spelling of what has no id,
and that names of special tokens in a text are text unless asked for, are ours.
"""

import collections
import dataclasses
import functools
import heapq
import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import numpy as np

from tokjax import checks, files
from tokjax.typing import Int

__all__ = [
  "SPECIALS",
  "UnicodeTokenizer",
  "frequent_ngrams",
  "is_covered",
  "load",
  "save",
]

Fallback = Literal["unk", "hex"]

SPECIALS = (
  "<pad>", "<s>", "</s>", "<unk>", "<think>", "</think>", "<emotions>",
  "</emotions>", "<tool_call>", "</tool_call>", "<tool_response>",
  "</tool_response>", "[INST]", "[/INST]", "[EOT]", "[USER]", "[ASSISTANT]",
  "[FIM_PREFIX]", "[FIM_MIDDLE]", "[FIM_SUFFIX]", "[FIM_PAD]", "[REPO_NAME]",
  "[FILE_SEP]",
)  # fmt: skip

_FIRST_SPECIAL, _NUM_SPECIALS = 0xE000, 256
_FIRST_HEX = 0xE0F0  # the last 16 special tokens
_HEX_DIGITS = 6  # of the largest code point, 10FFFF
_REPLACEMENT = "\ufffd"
_FORMAT = "tokjax unicode tokenizer 1"


def is_covered(character: str) -> bool:
  """Whether a character has an id: U+0000 to D7FF and F900 to FFFE.

  Example:
    >>> is_covered("a"), is_covered("😀")
    (True, False)
  """
  point = ord(character)
  return point < 0xD800 or 0xF900 <= point < 0xFFFF


@dataclasses.dataclass(frozen=True)
class UnicodeTokenizer:
  """Text to ids and back.

  Ids by their number, in hexadecimal:

      0000-D7FF, F900-FFFE   the character with this code point
      D800-DFFF, E100-F8FF   ngrams, longer ones first, then by code points
      E000-E0FF              special tokens
      10000 and above        more ngrams, if `num_ids` allows

  Characters are merged as in byte pair encoding, without a look at words. The
  pairs that may merge are all ways to cut an ngram into two tokens; an ngram
  that comes earlier goes first, of its cuts the one with the shorter left part,
  and in a text the pair further left. This is not the longest match from the
  left: with "ab" and "xa", "xab" is x, ab.

  `decode(encode(text))` is the text if all its characters are covered (see
  `is_covered`), and with the fallback "hex" for every str.

  Attributes:
    ngrams: runs of at least two covered characters; put in order, once each.
    specials: names of the first special tokens; "<unk>" must be among them.
      The others are called `<special_token_57367>` by their number.
    fallback: what a character without an id becomes, such as an emoji: "unk",
      one "<unk>", as published; "hex", six special tokens that spell its code
      point.
    num_ids: 65536 as bvv241-2-3, up to 131072 as bvv241-max.

  Example:
    >>> tokenizer = UnicodeTokenizer(("ab", "xa"))
    >>> tokenizer.encode("xab").tolist() == [ord("x"), 0xD800]
    True
    >>> tokenizer.decode(tokenizer.encode("a 😀"))
    'a <unk>'
  """

  ngrams: tuple[str, ...] = ()
  specials: tuple[str, ...] = SPECIALS
  fallback: Fallback = "unk"
  num_ids: int = 1 << 16

  def __post_init__(self):
    checks.one_of(get_args(Fallback), fallback=self.fallback)
    checks.in_range(1 << 16, 1 << 17, num_ids=self.num_ids)
    named = _NUM_SPECIALS - (16 if self.fallback == "hex" else 0)
    checks.in_range(1, named, number_of_specials=len(self.specials))
    if len(set(self.specials)) < len(self.specials) or not all(self.specials):
      raise ValueError(f"specials must differ, got {self.specials}")
    if "<unk>" not in self.specials:
      raise ValueError(f"specials must have '<unk>', got {self.specials}")
    for ngram in self.ngrams:
      if len(ngram) < 2 or not all(map(is_covered, ngram)):
        raise ValueError(
          f"ngrams must be two or more characters with ids, got {ngram!r}"
        )
    ordered = sorted(set(self.ngrams), key=lambda x: (-len(x), x))
    object.__setattr__(self, "ngrams", tuple(ordered))
    object.__setattr__(self, "specials", tuple(self.specials))
    slots = sum(map(len, self._slots))
    checks.in_range(0, slots, number_of_ngrams=len(self.ngrams))

  def encode(
    self, text: str, *, parse_specials: bool = False
  ) -> Int[np.ndarray, " N"]:
    """The ids of a text.

    Args:
      text: any str.
      parse_specials: names of `specials` in the text become their tokens, as
        the published tokenizer does; without, they are text like any other.

    Returns:
      int32; nothing is put before or behind.

    Cost: N log N steps of Python, about a microsecond each.
    """
    pieces = [text]
    if parse_specials:
      longest_first = sorted(self.specials, key=len, reverse=True)
      pattern = "|".join(map(re.escape, longest_first))
      pieces = re.split(f"({pattern})", text)  # names at odd places
    ids = []
    for i, piece in enumerate(pieces):
      ids += [self.special_id(piece)] if i % 2 else self._merged(piece)
    return np.array(ids, np.int32)

  def decode(
    self,
    ids: Sequence[int] | Int[np.ndarray, " N"],
    *,
    keep_specials: bool = True,
  ) -> str:
    """The text of ids.

    Args:
      ids: in 0..num_ids - 1.
      keep_specials: write special and unused tokens by their names, such as
        "<unk>"; False leaves them out.

    Returns:
      The text. With the fallback "hex" digits that spell no code point become
      U+FFFD.

    Raises:
      ValueError: for a number that is no id.
    """
    ids = [int(x) for x in ids]
    if ids:
      checks.in_range(0, self.num_ids - 1, lowest=min(ids), highest=max(ids))
    parts = []
    for spelled, run in itertools.groupby(ids, self._is_hex):
      if spelled:
        parts += self._spelled(list(run))
        continue
      parts += [
        self.tokens[x] for x in run if keep_specials or x not in self._silent
      ]
    return "".join(parts)

  def special_id(self, name: str) -> int:
    """The id of a special token by its name.

    Args:
      name: one of `specials`.

    Raises:
      ValueError: for another; lists them.
    """
    checks.one_of(self.specials, name=name)
    return _FIRST_SPECIAL + self.specials.index(name)

  @functools.cached_property
  def tokens(self) -> tuple[str, ...]:
    """What each id stands for; a name where it is no text."""
    tokens = [f"<unused_{i}>" for i in range(self.num_ids)]
    for i in itertools.chain(range(0xD800), range(0xF900, 0xFFFF)):
      tokens[i] = chr(i)
    for i in range(_FIRST_SPECIAL, _FIRST_SPECIAL + _NUM_SPECIALS):
      tokens[i] = f"<special_token_{i}>"
    for i, name in enumerate(self.specials):
      tokens[_FIRST_SPECIAL + i] = name
    if self.fallback == "hex":
      for digit in range(16):
        tokens[_FIRST_HEX + digit] = f"<hex_{digit:x}>"
    for ngram, i in self._ngram_ids.items():
      tokens[i] = ngram
    return tuple(tokens)

  @property
  def _slots(self):
    more = range(1 << 16, self.num_ids)
    return range(0xD800, 0xE000), range(0xE100, 0xF900), more

  @functools.cached_property
  def _ngram_ids(self):
    # A zip stops with the shorter: the slots that are left are unused.
    slots = itertools.chain(*self._slots)
    return dict(zip(self.ngrams, slots, strict=False))

  @functools.cached_property
  def _silent(self):
    """Ids that stand for no text."""
    slots = set(itertools.chain(*self._slots)) - set(self._ngram_ids.values())
    specials = range(_FIRST_SPECIAL, _FIRST_SPECIAL + _NUM_SPECIALS)
    return slots | set(specials) | {0xFFFF}

  @functools.cached_property
  def _merges(self):
    """{(left id, right id): (rank, id of both together)}."""
    merges = {}
    for ngram, merged in self._ngram_ids.items():
      for cut in range(1, len(ngram)):
        pair = self._id_of(ngram[:cut]), self._id_of(ngram[cut:])
        if None not in pair:
          merges[pair] = (len(merges), merged)
    return merges

  def _id_of(self, token):
    return ord(token) if len(token) == 1 else self._ngram_ids.get(token)

  def _merged(self, text):
    """Merges pairs, the lowest rank first, then the one further left."""
    ids = list(itertools.chain.from_iterable(map(self._of_character, text)))
    before, after = list(range(-1, len(ids) - 1)), list(range(1, len(ids) + 1))
    queue = []

    def offer(left, right):
      if left >= 0 and right < len(ids):
        pair = ids[left], ids[right]
        if pair in self._merges:
          heapq.heappush(queue, (self._merges[pair][0], left, pair))

    for i in range(len(ids) - 1):
      offer(i, i + 1)
    while queue:
      _, left, pair = heapq.heappop(queue)
      right = after[left]
      # Either may have gone into another token meanwhile.
      if right >= len(ids) or (ids[left], ids[right]) != pair:
        continue
      ids[left], ids[right] = self._merges[pair][1], None
      after[left] = after[right]
      if after[left] < len(ids):
        before[after[left]] = left
      offer(before[left], left)
      offer(left, after[left])
    return [x for x in ids if x is not None]

  def _of_character(self, character):
    if is_covered(character):
      return (ord(character),)
    if self.fallback == "unk":
      return (self.special_id("<unk>"),)
    digits = f"{ord(character):0{_HEX_DIGITS}x}"
    return tuple(_FIRST_HEX + int(digit, 16) for digit in digits)

  def _is_hex(self, i):
    return self.fallback == "hex" and 0 <= i - _FIRST_HEX < 16

  def _spelled(self, run):
    for start in range(0, len(run), _HEX_DIGITS):
      digits = run[start : start + _HEX_DIGITS]
      point = int("".join(f"{x - _FIRST_HEX:x}" for x in digits), 16)
      whole = len(digits) == _HEX_DIGITS and point <= 0x10FFFF
      yield chr(point) if whole else _REPLACEMENT


def frequent_ngrams(
  corpora: Iterable[Iterable[str]],
  *,
  lengths: Sequence[int] = (2, 3),
  top: int = 338,
  words: str = r"[^\W\d_]+",
) -> tuple[str, ...]:
  """The runs of characters that are frequent inside words.

  Args:
    corpora: texts, one corpus for each language, so that each gets its share.
    lengths: of runs, in characters; (2, 3, 4, 5) for bvv241-max.
    top: how many of each length in each language, 906 for bvv241-max; of
      equally frequent ones the first by code points.
    words: regular expression of a word; ours, letters in a row. The published
      lists come from Wikipedia in 32 languages with a pattern for each script.

  Returns:
    Each once, longer ones first, then by code points.

  Example:
    >>> frequent_ngrams([["banana band"]], top=1)
    ('ana', 'an')
  """
  checks.in_range(1, 1 << 16, top=top, **{f"length_{n}": n for n in lengths})
  found = set()
  for texts in corpora:
    counts = collections.Counter()
    for text in texts:
      counts.update(re.findall(words, text))
    for length in lengths:
      grams = collections.Counter()
      for word, count in counts.items():
        if all(map(is_covered, word)):
          for start in range(len(word) - length + 1):
            grams[word[start : start + length]] += count
      ordered = sorted(grams, key=lambda gram: (-grams[gram], gram))
      found.update(ordered[:top])
  return tuple(sorted(found, key=lambda x: (-len(x), x)))


def save(tokenizer: UnicodeTokenizer, path: str | os.PathLike) -> None:
  """Writes a tokenizer as a JSON file.

  Args:
    tokenizer: what to write.
    path: the file; its folder is made.
  """
  settings = {"format": _FORMAT, **dataclasses.asdict(tokenizer)}
  with files.replacing(path) as aside:
    aside.write_text(json.dumps(settings, indent=1), encoding="utf-8")


def load(path: str | os.PathLike) -> UnicodeTokenizer:
  """Reads what `save` wrote, and checks it.

  Args:
    path: the file.

  Raises:
    ValueError: if the file holds something else; says what.
    FileNotFoundError: if there is none.
  """
  settings = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
  kinds = {"ngrams": list, "specials": list, "fallback": str, "num_ids": int}
  given = settings.keys() if isinstance(settings, dict) else set()
  if given != {"format", *kinds} or settings["format"] != _FORMAT:
    raise ValueError(f"{path} must hold a {_FORMAT!r}, got {sorted(given)}")
  for name, kind in kinds.items():
    value = settings[name]
    strings = kind is not list or all(isinstance(x, str) for x in value)
    if type(value) is not kind or not strings:
      raise ValueError(f"{path}: {name} must be {kind.__name__}, got {value!r}")
  return UnicodeTokenizer(
    tuple(settings["ngrams"]),
    tuple(settings["specials"]),
    settings["fallback"],
    settings["num_ids"],
  )

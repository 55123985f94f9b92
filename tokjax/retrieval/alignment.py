"""Which word of a document answered which word of the query.

MaxSim is a sum of matches, one a query token, so a score can be read: this
file turns the matches of `tokjax.maxsim_alignment` into marked pieces of text.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import tokenizers

from tokjax.kernels import maxsim
from tokjax.retrieval import colbert, masks

__all__ = ["Match", "align", "document_spans", "matched_words", "query_spans"]

_WORD = re.compile(r"\w+|[^\w\s]")


class Match(NamedTuple):
  """A word of the document and the query token that it matched best.

  Attributes:
    start: first character of the word in the document's text.
    end: one past its last character.
    similarity: of the best pair of tokens, -1..1 for unit vectors.
    query_token: text of the query token of that pair.
  """

  start: int
  end: int
  similarity: float
  query_token: str


def matched_words(
  text: str,
  token_spans: np.ndarray,
  index: np.ndarray,
  similarity: np.ndarray,
  query_tokens: Sequence[str],
) -> list[Match]:
  """Words of a text that at least one query token matched best.

  Sub-word tokens are widened to whole words; a word matched by several query
  tokens keeps the strongest. Tokens without characters of their own, such as
  [CLS] and [SEP], are left out on both sides: a query token whose text is
  empty counts as one of them.

  Args:
    text: the document as it was tokenised.
    token_spans: int[N, 2], the characters [start, end) of each document
      token; start == end for tokens that stand for no text.
    index: int[Q], the document token that each query token matched
      (`maxsim_alignment(...).index[i, j]`).
    similarity: float[Q], the similarity of each match.
    query_tokens: Q texts, empty for special tokens.

  Returns:
    The matches in the order of the text, without overlaps.

  Raises:
    ValueError: if the lengths disagree or an index lies outside the tokens.

  Example:
    >>> import numpy as np
    >>> spans = np.array([[0, 4], [5, 8], [8, 11]])
    >>> matched_words("wing lifting", spans, np.array([2]), np.array([0.9]),
    ...               ["lift"])
    [Match(start=5, end=12, similarity=0.9, query_token='lift')]

  Source: ours; the alignment itself is MaxSim's (Khattab and Zaharia 2020).
  """
  sizes = (len(index), len(similarity), len(query_tokens))
  if len(set(sizes)) > 1:
    raise ValueError(
      "index, similarity and query_tokens must have one entry per query "
      f"token, got {sizes[0]}, {sizes[1]} and {sizes[2]}"
    )
  if len(index) and not 0 <= np.min(index) <= np.max(index) < len(token_spans):
    raise ValueError(
      f"index must lie in 0..{len(token_spans) - 1}, got "
      f"{np.min(index)}..{np.max(index)}"
    )
  words = [match.span() for match in _WORD.finditer(text)]
  starts = np.array([start for start, _ in words])
  best: dict[int, Match] = {}
  for token, score, name in zip(index, similarity, query_tokens, strict=True):
    start, end = token_spans[token]
    if start == end or not name or not words:
      continue
    word = max(int(np.searchsorted(starts, start, side="right")) - 1, 0)
    if word not in best or best[word].similarity < score:
      best[word] = Match(*words[word], float(score), name)
  return [best[word] for word in sorted(best)]


def align(
  query: str,
  text: str,
  query_tokens: np.ndarray,
  document_tokens: np.ndarray,
  tokenizer: tokenizers.Tokenizer,
  config: colbert.ColbertConfig,
) -> list[Match]:
  """Words of a text that the words of a query matched best.

  Args:
    query: the query's text.
    text: the document's text.
    query_tokens: [Q, D], as `colbert.encode_queries` gives; rows of padding
      at the end name no word.
    document_tokens: [N, D], as `colbert.encode_documents` gives.
    tokenizer: as both were encoded with.
    config: as both were encoded with.

  Returns:
    What `matched_words` returns.
  """
  names = [query[a:b] for a, b in query_spans(query, tokenizer, config)]
  met = maxsim.maxsim_alignment(
    jnp.asarray(query_tokens)[None], jnp.asarray(document_tokens)[None]
  )
  return matched_words(
    text,
    document_spans(text, tokenizer, config),
    np.asarray(met.index[0, 0, : len(names)]),
    np.asarray(met.similarity[0, 0, : len(names)]),
    names,
  )


def document_spans(
  text: str, tokenizer: tokenizers.Tokenizer, config: colbert.ColbertConfig
) -> np.ndarray:
  """Characters of each row that `colbert.encode_documents` gives for a text.

  Args:
    text: the document.
    tokenizer: as it was encoded with.
    config: as it was encoded with.

  Returns:
    int[N, 2], [start, end) of each scored token; start == end for tokens that
    stand for no text.
  """
  ids, spans = _spans(
    text, tokenizer, config.document_length, config.document_marker
  )
  scored = ~np.isin(ids, masks.skip_ids(tokenizer, config.skip_words))
  if not config.score_specials:
    scored &= spans[:, 0] < spans[:, 1]
  return spans[scored]


def query_spans(
  text: str, tokenizer: tokenizers.Tokenizer, config: colbert.ColbertConfig
) -> np.ndarray:
  """Characters of each row that `colbert.encode_queries` gives for a text.

  Args:
    text: the query.
    tokenizer: as it was encoded with.
    config: as it was encoded with.

  Returns:
    int[Q, 2], [start, end) of each token, up to the closing special token;
    start == end for tokens that stand for no text. Rows of [MASK] padding,
    which follow in the encoded query, are left out.
  """
  return _spans(text, tokenizer, config.query_length, config.query_marker)[1]


def _spans(text, tokenizer, length, marker):
  """Token ids with special tokens, and the characters of each."""
  row, specials = colbert.tokenize(
    [text, ""], tokenizer, length=length, marker=marker
  )
  words = tokenizer.encode(text, add_special_tokens=False)
  count = len(row) - len(specials)
  first = next(
    place
    for place in range(len(specials) + 1)
    if list(row[place : place + count]) == words.ids[:count]
  )
  spans = np.zeros((len(row), 2), np.int64)
  spans[first : first + count] = np.reshape(words.offsets[:count], (-1, 2))
  return row, spans

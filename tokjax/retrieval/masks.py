"""Which tokens of a query or a document take part in late interaction.

A scoring mask is not the encoder's attention mask: punctuation is read by the
encoder but not scored, and a [MASK] that pads a query is scored although no
other token may attend to it. Both are boolean, True = takes part.
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import tokenizers

from tokjax import checks
from tokjax.typing import Array, Bool, Int

__all__ = [
  "ExpandedQueries",
  "expand_queries",
  "scoring_mask_document",
  "scoring_mask_query",
  "skip_ids",
]


class ExpandedQueries(NamedTuple):
  """Queries padded with [MASK] to one length.

  Attributes:
    ids: token ids, [MASK] after the last real token.
    attention_mask: what the encoder may attend to.
    scoring_mask: what MaxSim sums over; True everywhere.
  """

  ids: Int[Array, "*batch Q"]
  attention_mask: Bool[Array, "*batch Q"]
  scoring_mask: Bool[Array, "*batch Q"]


def scoring_mask_query(
  ids: Int[Array, "B Q"],
  attention_mask: Bool[Array, "B Q"],
  skip: Int[Array, " S"] | None = None,
) -> Bool[Array, "B Q"]:
  """Query tokens that are summed over: the real ones, less those in `skip`.

  For queries without [MASK] padding; `expand_queries` gives the mask of those
  with it. ColBERT filters no query token (`skip=None`).

  Args:
    ids: token ids.
    attention_mask: True where the token is real.
    skip: ids that are not scored, such as [CLS] and [SEP]; None for none.

  Returns:
    The scoring mask.

  Raises:
    ValueError: if the axes disagree.

  Example:
    >>> ids = jnp.array([[101, 1, 7592, 102, 0]])
    >>> scoring_mask_query(ids, ids > 0)
    Array([[ True,  True,  True,  True, False]], dtype=bool)
  """
  return scoring_mask_document(ids, attention_mask, skip)


def scoring_mask_document(
  ids: Int[Array, "B N"],
  attention_mask: Bool[Array, "B N"],
  skip: Int[Array, " S"] | None = None,
) -> Bool[Array, "B N"]:
  """Document tokens a query token may match: real and not in the skip list.

  Args:
    ids: token ids.
    attention_mask: True where the token is real.
    skip: ids that are read but not scored (`skip_ids`: punctuation); a small
      table, compared with every token; None for none.

  Returns:
    The scoring mask. A document of punctuation only may have no True left.

  Raises:
    ValueError: if the axes disagree.

  Example:
    >>> ids = jnp.array([[101, 2, 7592, 1012, 102, 0]])
    >>> scoring_mask_document(ids, ids > 0, jnp.array([1012]))
    Array([[ True,  True,  True, False,  True, False]], dtype=bool)

  Source:
    Khattab & Zaharia 2020, ColBERT: documents lose punctuation, queries
    nothing; [CLS], the marker and [SEP] are scored.
  """
  checks.has_rank(2, ids=ids, attention_mask=attention_mask)
  checks.same_size(ids_batch=ids.shape[0], mask_batch=attention_mask.shape[0])
  checks.same_size(ids_tokens=ids.shape[1], mask_tokens=attention_mask.shape[1])
  if skip is None:
    return attention_mask
  checks.has_rank(1, skip=skip)
  return attention_mask & ~jnp.isin(ids, skip)


def expand_queries(
  ids: Int[Array, "B N"],
  attention_mask: Bool[Array, "B N"],
  *,
  mask_id: int,
  length: int,
  attend: bool = False,
) -> ExpandedQueries:
  """Pads queries with [MASK] up to a fixed number of scored tokens.

  The encoder turns each [MASK] into a further query vector, a soft expansion
  and re-weighting of the query's words.

  Args:
    ids: token ids, markers included; real tokens come first in each row.
    attention_mask: True where the token is real.
    mask_id: id of [MASK].
    length: tokens per query afterwards, static, at least N. ColBERT: 32.
    attend: whether tokens may attend to the [MASK]s. False (ColBERT's
      default) leaves the real tokens' outputs as they were without expansion.

  Returns:
    Ids and both masks, each [B, length].

  Raises:
    ValueError: if the axes disagree or `length` is below N.

  Example:
    >>> ids = jnp.array([[101, 1, 7592, 102, 0]])
    >>> expanded = expand_queries(ids, ids > 0, mask_id=103, length=6)
    >>> expanded.ids
    Array([[ 101,    1, 7592,  102,  103,  103]], dtype=int32)
    >>> expanded.attention_mask.sum(), expanded.scoring_mask.sum()
    (Array(4, dtype=int32), Array(6, dtype=int32))

  Source:
    Khattab & Zaharia 2020, ColBERT, query augmentation.
  """
  checks.has_rank(2, ids=ids, attention_mask=attention_mask)
  checks.same_size(ids_batch=ids.shape[0], mask_batch=attention_mask.shape[0])
  checks.same_size(ids_tokens=ids.shape[1], mask_tokens=attention_mask.shape[1])
  checks.in_range(ids.shape[1], float("inf"), length=length)
  padding = ((0, 0), (0, length - ids.shape[1]))
  real = jnp.pad(attention_mask, padding)
  ids = jnp.where(real, jnp.pad(ids, padding), mask_id)
  scored = jnp.ones_like(real)
  return ExpandedQueries(ids, scored if attend else real, scored)


def skip_ids(
  tokenizer: tokenizers.Tokenizer, words: Iterable[str]
) -> np.ndarray:
  """Ids of words that are whole vocabulary entries, ascending.

  A word that is not in the vocabulary, or is the unknown token, is left out:
  skipping [UNK] for its sake would silently drop every unknown word.

  Args:
    tokenizer: the vocabulary.
    words: for ColBERT the 32 symbols of `string.punctuation`.

  Returns:
    int32 ids without repeats.

  Example:
    >>> words = tokenizers.models.WordLevel({"[UNK]": 0, "!": 5}, "[UNK]")
    >>> skip_ids(tokenizers.Tokenizer(words), ["!", "?", "[UNK]"])
    array([5], dtype=int32)
  """
  unknown = getattr(tokenizer.model, "unk_token", None)
  ids = {tokenizer.token_to_id(word) for word in words if word != unknown}
  return np.array(sorted(ids - {None}), np.int32)

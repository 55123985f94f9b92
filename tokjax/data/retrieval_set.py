"""What retrieval is measured on: documents, queries and judgements."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

from tokjax import checks

__all__ = ["RetrievalSet"]


@dataclasses.dataclass(frozen=True)
class RetrievalSet:
  """Documents, the queries of one split, and which documents answer them.

  Checked when it is made: lists of one length, no id twice, judgements only
  for queries that are there.

  Attributes:
    name: of the data set, for messages and file names.
    document_ids: one string per document, unique.
    document_titles: one title per document, "" where there is none.
    document_texts: what is encoded or indexed: title, a space, body.
    query_ids: one string per query, unique.
    query_texts: one text per query.
    qrels: {query id: {document id: grade}}; above 0 means relevant.
    metadata: what the set was made from (JSON values).

  Raises:
    ValueError: if lists disagree in length, an id comes twice, or `qrels`
      judges a query that is not in `query_ids`.

  Example:
    >>> RetrievalSet(
    ...   name="two", document_ids=["a", "b"], document_titles=["", ""],
    ...   document_texts=["apple", "pear"], query_ids=["1"],
    ...   query_texts=["red fruit"], qrels={"1": {"a": 1}},
    ... ).num_judgements
    1
  """

  name: str
  document_ids: Sequence[str]
  document_titles: Sequence[str]
  document_texts: Sequence[str]
  query_ids: Sequence[str]
  query_texts: Sequence[str]
  qrels: dict[str, dict[str, int]]
  metadata: dict[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    checks.same_size(
      document_ids=len(self.document_ids),
      document_titles=len(self.document_titles),
      document_texts=len(self.document_texts),
    )
    checks.same_size(
      query_ids=len(self.query_ids), query_texts=len(self.query_texts)
    )
    _unique(document_ids=self.document_ids)
    _unique(query_ids=self.query_ids)
    strangers = sorted(self.qrels.keys() - set(self.query_ids))
    if strangers:
      raise ValueError(
        f"qrels judge {len(strangers)} queries that query_ids lacks, "
        f"such as {', '.join(map(repr, strangers[:3]))}"
      )

  @property
  def num_judgements(self) -> int:
    """Number of (query, document) pairs with a grade."""
    return sum(len(grades) for grades in self.qrels.values())


def _unique(**lists: Sequence[str]) -> None:
  for name, ids in lists.items():
    if len(set(ids)) < len(ids):
      twice = [key for key, n in collections.Counter(ids).items() if n > 1]
      raise ValueError(
        f"{name} must be unique, but {len(twice)} come more than once, "
        f"such as {', '.join(map(repr, twice[:3]))}"
      )

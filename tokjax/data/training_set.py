"""What a retriever learns from: queries with documents that do and do not fit.

`from_retrieval_set` makes it from judgements, `tokjax.data.triples` reads it
from files, `tokjax.data.hard_negatives` adds negatives, and
`tokjax.data.batches` turns it into arrays.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

from tokjax import checks
from tokjax.data.retrieval_set import RetrievalSet

__all__ = ["TrainingSet", "from_retrieval_set"]

Rows = Sequence[int] | np.ndarray
Scores = Sequence[int | float] | np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingSet:
  """Training examples over lists of query and document texts.

  An example is a query, the documents that answer it and documents that do
  not; all are named by their rows in the lists. Checked when it is made.

  Attributes:
    query_texts: one text per query; not every query needs an example.
    document_texts: one text per document, usually a whole corpus, so that rows
      mean the same as in an index of it.
    query_index: row of the query of each example. A query may have several.
    positives: rows of the documents that answer it, at least one each.
    negatives: rows of documents that do not, may be none.
    teacher_scores: one number for each positive, then each negative, of each
      example, to be imitated; None for no teacher.

  Raises:
    ValueError: if lists disagree in length, there is no example, a row is out
      of range, an example has no positive or a negative that is one of its
      positives, or a score is missing or not finite.

  Example:
    >>> train = TrainingSet(
    ...   query_texts=["red fruit"], document_texts=["apple", "pear", "moss"],
    ...   query_index=[0], positives=[[0]], negatives=[[2, 1]],
    ... )
    >>> train.num_examples
    1
  """

  query_texts: Sequence[str]
  document_texts: Sequence[str]
  query_index: Rows
  positives: Sequence[Rows]
  negatives: Sequence[Rows]
  teacher_scores: Sequence[Scores] | None = None

  def __post_init__(self):
    checks.same_size(
      query_index=len(self.query_index),
      positives=len(self.positives),
      negatives=len(self.negatives),
    )
    if not len(self.query_index):
      raise ValueError("query_index must name at least one example")
    _check_rows("query_index", [self.query_index], len(self.query_texts))
    num_documents = len(self.document_texts)
    _check_rows("positives", self.positives, num_documents)
    _check_rows("negatives", self.negatives, num_documents)
    for example, (good, bad) in enumerate(
      zip(self.positives, self.negatives, strict=True)
    ):
      if not len(good):
        raise ValueError(f"positives of example {example} must not be empty")
      both = set(map(int, good)).intersection(map(int, bad))
      if both:
        raise ValueError(
          f"negatives of example {example} must not be among its positives, "
          f"but row {min(both)} is"
        )
    if self.teacher_scores is not None:
      self._check_teacher()

  @property
  def num_examples(self) -> int:
    """Number of examples."""
    return len(self.query_index)

  def relevant(self) -> dict[int, np.ndarray]:
    """Rows of all documents that answer each query, over all its examples.

    Returns:
      {row of the query: int32 rows of its documents, ascending}, for the
      queries that have an example.
    """
    found: dict[int, set[int]] = {}
    for query, rows in zip(self.query_index, self.positives, strict=True):
      found.setdefault(int(query), set()).update(map(int, rows))
    return {q: np.array(sorted(rows), np.int32) for q, rows in found.items()}

  def _check_teacher(self):
    checks.same_size(
      query_index=len(self.query_index),
      teacher_scores=len(self.teacher_scores),
    )
    for example, scores in enumerate(self.teacher_scores):
      num_documents = len(self.positives[example]) + len(
        self.negatives[example]
      )
      if len(scores) != num_documents:
        raise ValueError(
          f"teacher_scores of example {example} must be {num_documents}, one "
          f"per positive and negative, got {len(scores)}"
        )
      if not all(map(math.isfinite, scores)):
        raise ValueError(f"teacher_scores of example {example} must be finite")


def from_retrieval_set(retrieval_set: RetrievalSet) -> TrainingSet:
  """One example per query: all documents of grade above 0 are its positives.

  Documents and queries keep their rows, so that rankings of the set can be
  used as they are. Queries without a relevant document have no example, and
  judged documents that the corpus lacks are left out.

  Args:
    retrieval_set: usually a train split, such as `beir.load(folder, "train")`
      or `pydocs.load("train")`.

  Returns:
    A `TrainingSet` without negatives; `hard_negatives.mine` finds some.

  Raises:
    ValueError: if no query has a relevant document in the corpus.

  Example:
    >>> few = RetrievalSet(
    ...   name="few", document_ids=["a", "b"], document_titles=["", ""],
    ...   document_texts=["apple", "pear"], query_ids=["1", "2"],
    ...   query_texts=["stone", "green fruit"], qrels={"2": {"b": 1, "a": 0}},
    ... )
    >>> train = from_retrieval_set(few)
    >>> train.query_index, [rows.tolist() for rows in train.positives]
    (array([1], dtype=int32), [[1]])
  """
  row = {key: i for i, key in enumerate(retrieval_set.document_ids)}
  query_index, positives = [], []
  for query, key in enumerate(retrieval_set.query_ids):
    grades = retrieval_set.qrels.get(key, {})
    good = sorted(
      row[d] for d, grade in grades.items() if grade > 0 and d in row
    )
    if good:
      query_index.append(query)
      positives.append(np.array(good, np.int32))
  if not query_index:
    raise ValueError(
      f"{retrieval_set.name}: no query has a relevant document in the corpus"
    )
  return TrainingSet(
    query_texts=retrieval_set.query_texts,
    document_texts=retrieval_set.document_texts,
    query_index=np.array(query_index, np.int32),
    positives=positives,
    negatives=[np.zeros(0, np.int32)] * len(positives),
  )


def _check_rows(name: str, lists: Sequence[Rows], size: int) -> None:
  rows = np.fromiter(itertools.chain.from_iterable(lists), np.int64)
  if rows.size and not 0 <= rows.min() <= rows.max() < size:
    wrong = rows[(rows < 0) | (rows >= size)][0]
    raise ValueError(f"{name} must hold rows in 0..{size - 1}, got {wrong}")

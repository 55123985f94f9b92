"""Metrics of rankings with string ids, equal to trec_eval's.

A run is {query id: {document id: score}}, judgements are {query id: {document
id: grade}}. Documents are ordered by score, best first; equal scores by
document id, the higher string first, as trec_eval does.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from tokjax import checks
from tokjax.eval import ranking

__all__ = ["METRICS", "evaluate", "evaluate_queries", "from_arrays"]

Run = Mapping[str, Mapping[str, float]]
Qrels = Mapping[str, Mapping[str, int]]


def _ndcg(rows, k):
  return ranking.ndcg(rows["ranked"], rows["ideal"], rows["where"], k=k)


def _recall(rows, k, capped=False):
  return ranking.recall(
    rows["ranked"], rows["relevant"], rows["where"], k=k, capped=capped
  )


def _reciprocal_rank(rows, k):
  return ranking.reciprocal_rank(rows["ranked"], rows["where"], k=k)


def _average_precision(rows, k):
  return ranking.average_precision(
    rows["ranked"], rows["relevant"], rows["where"], k=k
  )


def _precision(rows, k):
  return ranking.precision(rows["ranked"], rows["where"], k=k)


def _success(rows, k):
  return ranking.success(rows["ranked"], rows["where"], k=k)


# name before the "@" -> function of the padded rows and the cut
METRICS: dict[str, Callable[..., jax.Array]] = {
  "nDCG": _ndcg,
  "R": _recall,
  "R_cap": functools.partial(_recall, capped=True),
  "MRR": _reciprocal_rank,
  "MAP": _average_precision,
  "P": _precision,
  "Success": _success,
}
_MAY_LACK_CUT = ("MRR", "MAP")


def evaluate(
  run: Run,
  qrels: Qrels,
  metrics: Sequence[str] = ("nDCG@10", "R@100", "MRR@10"),
  *,
  remove_query_id: bool = False,
) -> dict[str, float]:
  """Each metric, averaged over all judged queries.

  A judged query that the run lacks, or that has no relevant document, counts
  as 0; queries without judgements are ignored.

  Args:
    run: {query id: {document id: score}}; scores are compared in float32.
    qrels: {query id: {document id: grade}}; above 0 means relevant.
    metrics: names with a cut: nDCG@10, R@100, R_cap@100, MRR@10, MAP@100,
      P@5, Success@5; MRR and MAP also without.
    remove_query_id: leave out hits whose id is the query's, for data sets
      whose queries are documents of the corpus (ArguAna, Quora). False,
      unlike BEIR's default, because elsewhere queries and documents are often
      both numbered from 1.

  Returns:
    {name as given: mean in 0..1}.

  Raises:
    ValueError: if a metric is unknown, nothing is judged, a score is NaN, or
      no query of the run is judged (ids that do not match).

  Example:
    >>> qrels = {"q": {"d1": 2, "d2": 1, "d3": 1}}
    >>> run = {"q": {"d2": 3.0, "x": 2.0, "d1": 1.0}}
    >>> print(f"{evaluate(run, qrels, ['nDCG@3'])['nDCG@3']:.4f}")
    0.6388

  Source:
    trec_eval (NIST) for the order and the metrics; BEIR (Thakur et al. 2021)
    for R_cap.
  """
  values = evaluate_queries(
    run, qrels, metrics, remove_query_id=remove_query_id
  )
  return {
    name: math.fsum(of_query.values()) / len(of_query)
    for name, of_query in values.items()
  }


def evaluate_queries(
  run: Run,
  qrels: Qrels,
  metrics: Sequence[str] = ("nDCG@10", "R@100", "MRR@10"),
  *,
  remove_query_id: bool = False,
) -> dict[str, dict[str, float]]:
  """Each metric for each judged query; arguments as in `evaluate`.

  Args:
    run: as in `evaluate`.
    qrels: as in `evaluate`.
    metrics: as in `evaluate`.
    remove_query_id: as in `evaluate`.

  Returns:
    {metric: {query id: value}}, queries in the order of `qrels`.

  Raises:
    ValueError: as in `evaluate`.
  """
  cuts = tuple(_parse(name) for name in metrics)
  if not qrels:
    raise ValueError("qrels judge no query")
  if run.keys().isdisjoint(qrels):
    raise ValueError(
      f"no query of the run is judged: the run has {_some(run)}, "
      f"the qrels {_some(qrels)}"
    )
  lists = [
    _ranked_grades(query, run.get(query, {}), grades, remove_query_id)
    for query, grades in qrels.items()
  ]
  deepest = max(len(ranked) for ranked, _ in lists)
  if all(cut for _, cut in cuts):
    deepest = min(deepest, max((cut for _, cut in cuts), default=1))
  rows = {
    "ranked": _padded([ranked[:deepest] for ranked, _ in lists]),
    "where": _padded([[1] * len(ranked[:deepest]) for ranked, _ in lists]) > 0,
    "ideal": _padded([ideal for _, ideal in lists]),
    "relevant": np.array([len(ideal) for _, ideal in lists], np.int32),
  }
  values = jax.device_get(_compute(rows, cuts))
  return {
    name: dict(zip(qrels, of_query.tolist(), strict=True))
    for name, of_query in zip(metrics, values, strict=True)
  }


def from_arrays(
  query_ids: Sequence[str],
  document_ids: Sequence[str],
  index: np.ndarray | jax.Array,
  scores: np.ndarray | jax.Array,
) -> dict[str, dict[str, float]]:
  """A run from the arrays a search returns.

  Args:
    query_ids: one per row.
    document_ids: of the whole corpus, in the order it was indexed.
    index: int [Nq, K], positions in `document_ids`; negative: no hit.
    scores: float [Nq, K].

  Returns:
    {query id: {document id: score}}; of a document that comes twice for one
    query the higher score.

  Raises:
    ValueError: if the shapes disagree or a position is beyond the corpus.

  Example:
    >>> from_arrays(["q"], ["a", "b"], np.array([[1, -1]]), np.ones((1, 2)))
    {'q': {'b': 1.0}}
  """
  index, scores = np.asarray(index), np.asarray(scores)
  checks.has_rank(2, index=index, scores=scores)
  checks.same_size(
    query_ids=len(query_ids), index=index.shape[0], scores=scores.shape[0]
  )
  checks.same_size(index_hits=index.shape[1], scores_hits=scores.shape[1])
  if index.size and index.max() >= len(document_ids):
    raise ValueError(
      f"index must lie below {len(document_ids)} documents, got {index.max()}"
    )
  run: dict[str, dict[str, float]] = {}
  for query, row, values in zip(
    query_ids, index.tolist(), scores.tolist(), strict=True
  ):
    hits = run.setdefault(query, {})
    for at, score in zip(row, values, strict=True):
      if at >= 0:
        document = document_ids[at]
        hits[document] = max(score, hits.get(document, score))
  return run


@functools.partial(jax.jit, static_argnames="cuts")
def _compute(rows, cuts):
  return [METRICS[name](rows, cut) for name, cut in cuts]


def _parse(metric: str) -> tuple[str, int | None]:
  match = re.fullmatch(r"(\w+?)(?:@([1-9]\d*))?", metric)
  name, cut = match.groups() if match else (metric, None)
  if name not in METRICS or (cut is None and name not in _MAY_LACK_CUT):
    accepted = ", ".join(f"{known}@k" for known in METRICS)
    raise ValueError(
      f"metrics must be of the form {accepted}, {', '.join(_MAY_LACK_CUT)}, "
      f"got {metric!r}"
    )
  return name, int(cut) if cut else None


def _ranked_grades(
  query: str,
  hits: Mapping[str, float],
  grades: Mapping[str, int],
  remove_query_id: bool,
) -> tuple[list[int], list[int]]:
  """Grades by rank, and the positive grades of the query, descending."""
  # float32 as in trec_eval: what differs less is a tie.
  scores = np.array(list(hits.values()), np.float32)
  if np.isnan(scores).any():
    raise ValueError(f"run: a score of query {query!r} is NaN")
  best_first = sorted(zip(scores.tolist(), hits, strict=True), reverse=True)
  ranked = [
    grades.get(document, 0)
    for _, document in best_first
    if not (remove_query_id and document == query)
  ]
  ideal = sorted((g for g in grades.values() if g > 0), reverse=True)
  return ranked, ideal


def _padded(lists: Sequence[Sequence[int]]) -> np.ndarray:
  """float32 [len(lists), longest], 0 behind the end of each list."""
  table = np.zeros((len(lists), max(map(len, lists), default=0)), np.float32)
  for row, values in enumerate(lists):
    table[row, : len(values)] = values
  return table


def _some(ids: Mapping[str, object]) -> str:
  names = [repr(key) for key in list(ids)[:3]]
  return ", ".join(names) + (", ..." if len(ids) > 3 else "") or "none"

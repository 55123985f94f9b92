"""Hard negatives: documents a search ranks high that do not answer the query.

Rankings come from any search: `retrieval.search.search_batches` over our own
index gives them as they are taken here, `from_run` makes them of BM25's run.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from tokjax import checks
from tokjax.data.training_set import TrainingSet

__all__ = ["from_run", "mine"]


def mine(
  train: TrainingSet,
  rankings: np.ndarray,
  *,
  num_negatives: int,
  skip_top: int = 0,
  depth: int | None = None,
  groups: np.ndarray | None = None,
  seed: int | None = None,
) -> TrainingSet:
  """Gives every example negatives from the ranking of its query.

  The ranks skip_top..depth of a query, less what is relevant to it, are its
  candidates. Without a seed the best `num_negatives` of them are taken, with
  one as many at random, each draw depending on seed and query alone. Where
  candidates are too few, documents drawn at random from the rest of the
  corpus follow, so that every example gets the same number.

  Args:
    train: its negatives are replaced and its teacher's scores dropped, as
      they belong to the old negatives.
    rankings: int [queries, K], rows of documents, best first; negative: no
      hit. One row per query text of `train`.
    num_negatives: how many every example gets.
    skip_top: best ranks to leave out, since unjudged documents that answer
      the query gather there. Counted before relevant ones are removed.
    depth: ranks to look at; None for all K.
    groups: int, the group of each document (`near_duplicates.group`); what
      shares a group with a relevant document is no negative. None: only
      judged documents are left out.
    seed: of the draws; None takes the best ranks.

  Returns:
    A `TrainingSet` over the same texts; the negatives of an example are in
    the order of their ranks, random ones last.

  Raises:
    ValueError: if sizes disagree, a setting is out of range, a document row
      is unknown, or a query leaves too few documents of the whole corpus.

  Example:
    >>> train = TrainingSet(
    ...   ["red fruit"], ["apple", "pear", "moss", "plum"], [0], [[0]], [[]]
    ... )
    >>> mined = mine(train, np.array([[0, 3, 1, 2]]), num_negatives=2)
    >>> mined.negatives[0].tolist()
    [3, 1]

  Source:
    Karpukhin et al. 2020, "Dense Passage Retrieval for Open-Domain Question
    Answering" (from BM25); Xiong et al. 2021, "Approximate Nearest Neighbor
    Negative Contrastive Learning for Dense Text Retrieval" (from the model's
    own index). Leaving out near duplicates and topping up at random are ours.
  """
  rankings = np.asarray(rankings)
  num_documents = len(train.document_texts)
  checks.has_rank(2, rankings=rankings)
  checks.same_size(rankings=len(rankings), query_texts=len(train.query_texts))
  depth = rankings.shape[1] if depth is None else depth
  checks.in_range(1, num_documents, num_negatives=num_negatives)
  checks.in_range(0, rankings.shape[1], depth=depth)
  checks.in_range(0, depth, skip_top=skip_top)
  if rankings.size and rankings.max() >= num_documents:
    raise ValueError(
      f"rankings must hold rows below {num_documents}, got {rankings.max()}"
    )
  groups = np.arange(num_documents) if groups is None else np.asarray(groups)
  checks.same_size(groups=len(groups), document_texts=num_documents)
  of_query = {
    query: _choose(
      query,
      rankings[query, skip_top:depth],
      groups,
      groups[relevant],
      num_negatives,
      seed,
    )
    for query, relevant in train.relevant().items()
  }
  return dataclasses.replace(
    train,
    negatives=[of_query[int(query)] for query in train.query_index],
    teacher_scores=None,
  )


def from_run(
  run: Mapping[str, Mapping[str, float]],
  query_ids: Sequence[str],
  document_ids: Sequence[str],
) -> np.ndarray:
  """Rankings as rows of documents, from a run with string ids.

  Ordered by score, best first; equal scores by document id, the higher string
  first, as `eval.runs` orders them.

  Args:
    run: {query id: {document id: score}}, such as `eval.bm25.search` gives.
    query_ids: one per row of the result; those the run lacks have no hit.
    document_ids: of the whole corpus.

  Returns:
    int32 [queries, K] with K the longest of the rankings; -1: no hit.

  Raises:
    ValueError: if the run names documents that are not in the corpus.

  Example:
    >>> from_run({"q": {"a": 0.5, "b": 2.0}}, ["p", "q"], ["a", "b"])
    array([[-1, -1],
           [ 1,  0]], dtype=int32)
  """
  row = {key: i for i, key in enumerate(document_ids)}
  hits = [run.get(query, {}) for query in query_ids]
  rankings = np.full((len(hits), max(map(len, hits), default=0)), -1, np.int32)
  for query, scores in enumerate(hits):
    unknown = sorted(scores.keys() - row.keys())
    if unknown:
      raise ValueError(
        f"run: query {query_ids[query]!r} has {len(unknown)} documents that "
        f"document_ids lacks, such as {unknown[0]!r}"
      )
    best = sorted(scores, key=lambda key: (scores[key], key), reverse=True)
    rankings[query, : len(best)] = [row[key] for key in best]
  return rankings


def _choose(
  query: int,
  ranking: np.ndarray,
  groups: np.ndarray,
  relevant_groups: np.ndarray,
  count: int,
  seed: int | None,
) -> np.ndarray:
  """int32 [count]: from the ranking first, then from the whole corpus."""
  candidates = np.array(list(dict.fromkeys(ranking[ranking >= 0])), np.int64)
  candidates = candidates[~np.isin(groups[candidates], relevant_groups)]
  # Raw bits, as NumPy promises never to change their stream.
  bits = np.random.PCG64([seed or 0, query])
  if seed is not None and len(candidates) > count:
    drawn = np.argsort(bits.random_raw(len(candidates)), kind="stable")
    candidates = candidates[np.sort(drawn[:count])]
  chosen = candidates[:count]
  missing = count - len(chosen)
  if missing:
    rest = np.flatnonzero(~np.isin(groups, relevant_groups))
    rest = np.setdiff1d(rest, chosen, assume_unique=True)
    if len(rest) < missing:
      raise ValueError(
        f"query {query} leaves {len(rest) + len(chosen)} documents that are "
        f"not relevant, fewer than num_negatives={count}"
      )
    drawn = np.argsort(bits.random_raw(len(rest)), kind="stable")[:missing]
    chosen = np.concatenate([chosen, rest[drawn]])
  return chosen.astype(np.int32)

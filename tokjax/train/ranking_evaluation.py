"""Ranking quality of a retriever while it is trained.

`evaluator` makes the function that `retrieval_run.train` calls: it encodes
documents and queries as the trained method does, searches all documents and
gives the metrics, which the loop writes to terminal, JSON lines and
TensorBoard as `eval/<metric>`.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from tokjax.data.retrieval_set import RetrievalSet
from tokjax.eval import runs
from tokjax.models import checkpoints
from tokjax.retrieval import methods, token_index

__all__ = ["evaluator"]


def evaluator(
  dataset: RetrievalSet,
  *,
  metrics: Sequence[str] = ("nDCG@10", "R@100", "MRR@10"),
  k: int = 100,
  batch_size: int = 16,
) -> Callable[[checkpoints.Checkpoint, int], dict[str, float]]:
  """Makes `evaluate(checkpoint, step)` of `retrieval_run.train`.

  Every document is scored by the method of the checkpoint: by MaxSim, by both
  scores of ColBERTer, or from the tokens that XTR retrieves.

  Args:
    dataset: documents, queries and judgements; small, as all of it is encoded
      at every call.
    metrics: as in `tokjax.eval.runs.evaluate`.
    k: documents found per query, at least the largest cut of the metrics; at
      most all.
    batch_size: queries searched at a time.

  Returns:
    The function, which gives {metric: mean over the judged queries}.

  Raises:
    ValueError: for an unknown metric or a set without judgements.

  Example:
    >>> documents = ["red apple", "green pear"]
    >>> dataset = RetrievalSet(
    ...   name="two", document_ids=["a", "b"], document_titles=["", ""],
    ...   document_texts=documents, query_ids=["1"], query_texts=["red"],
    ...   qrels={"1": {"a": 1}})
    >>> evaluate = evaluator(dataset, metrics=["MRR@10"])
  """
  metrics = tuple(metrics)
  nothing = {query: {"": 0.0} for query in dataset.qrels}
  runs.evaluate(nothing, dataset.qrels, metrics)  # raises now, not hours later
  k = min(k, len(dataset.document_ids))

  def evaluate(checkpoint, step):
    del step
    documents = methods.encode_documents(
      dataset.document_texts, checkpoint, progress=False
    )
    queries = methods.encode_queries(dataset.query_texts, checkpoint)
    vectors = token_index.store_vectors(documents.pooled)
    index = token_index.build(
      documents.tokens,
      documents.offsets,
      candidates={checkpoint.method.vectors: vectors},
      word_ids=documents.word_ids,
    )
    found = methods.search(
      index,
      queries,
      checkpoint,
      mode=None if checkpoint.method.name == "xtr" else "exact",
      k=k,
      batch_size=batch_size,
    )
    run = runs.from_arrays(
      dataset.query_ids,
      dataset.document_ids,
      *(np.asarray(x) for x in jax.device_get(found)),
    )
    return runs.evaluate(run, dataset.qrels, metrics)

  return evaluate

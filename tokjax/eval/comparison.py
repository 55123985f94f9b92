"""Ways to search one data set, side by side: quality, bytes and time.

BM25, the mean token vector, exact MaxSim and MUVERA candidates re-ranked with
MaxSim, over the same documents and queries, encoded once. Of a ColBERTer model:
its vectors of texts, and both its scores.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tokjax import checks
from tokjax.data.retrieval_set import RetrievalSet
from tokjax.eval import bm25, runs
from tokjax.retrieval import codecs, colbert, muvera, search, token_index
from tokjax.retrieval import methods as text_methods

__all__ = ["METHODS", "WORD_METHODS", "Measured", "compare"]

# name -> what it is, one line, for tables and reports
METHODS = {
  "bm25": "BM25: words of the whole text, no model",
  "dense": "one mean vector per text",
  "maxsim": "MaxSim over all tokens of all documents",
  "dense+maxsim": "candidates by the mean vector, MaxSim re-rank",
  "fde+maxsim": "candidates by MUVERA, empty cells left empty, re-rank",
  "fde-filled+maxsim": "candidates by MUVERA as published, re-rank",
}

# The same for ColBERTer, whose vectors are those of words and of texts.
WORD_METHODS = {
  "bm25": METHODS["bm25"],
  "dense": "the vector of the text",
  "colberter": "both scores of all documents",
  "dense+colberter": "candidates by the vector of the text, both scores",
}


@dataclasses.dataclass(frozen=True)
class Measured:
  """What one method reached.

  Attributes:
    name: key of `METHODS` or `WORD_METHODS`.
    metrics: {metric: mean in 0..1}.
    bytes_per_document: of everything its search reads.
    ms_per_query: median over repeats, queries in batches, encoding the query
      not included.
    build_seconds: to make its index from encoded documents (BM25: from text).
    exact_overlap: share of the ten best of "maxsim" ("colberter") that are
      among its ten best, mean over queries; None where that was not measured.
    run: {query id: {document id: score}}, what it found.
  """

  name: str
  metrics: dict[str, float]
  bytes_per_document: float
  ms_per_query: float
  build_seconds: float
  exact_overlap: float | None
  run: dict[str, dict[str, float]] = dataclasses.field(repr=False)


def compare(
  dataset: RetrievalSet,
  documents: colbert.Documents,
  queries: colbert.Queries,
  *,
  model: text_methods.TextModel | None = None,
  methods: Sequence[str] | None = None,
  codec: str = "bfloat16",
  fde: int = 10240,
  num_candidates: int = 256,
  metrics: Sequence[str] = ("nDCG@10", "R@100", "MRR@10"),
  k: int = 100,
  repeats: int = 1,
) -> list[Measured]:
  """Measures the methods on one data set.

  Args:
    dataset: documents, queries, judgements.
    documents: its encoded documents, in its order.
    queries: its encoded queries, in its order.
    model: the ColBERTer model that encoded them; None for token vectors.
    methods: keys of `METHODS`, of a model keys of `WORD_METHODS`; None for all.
    codec: how tokens are stored; a name of `codecs.NAMES`.
    fde: width of the MUVERA encodings, a key of `muvera.PRESETS`.
    num_candidates: documents re-ranked per query.
    metrics: as in `tokjax.eval.runs.evaluate`.
    k: documents asked for, at least the largest cut of the metrics.
    repeats: timed runs after one that compiles; the median counts.

  Returns:
    One row a method, in the order given.

  Raises:
    ValueError: for an unknown method, codec or preset, or sizes that disagree.
  """
  known = tuple(METHODS if model is None else WORD_METHODS)
  methods = known if methods is None else methods
  for name in methods:
    checks.one_of(known, methods=name)
  checks.one_of(codecs.NAMES, codec=codec)
  checks.one_of(tuple(muvera.PRESETS), fde=fde)
  checks.same_size(
    documents=len(documents.offsets) - 1,
    dataset_documents=len(dataset.document_ids),
  )
  checks.same_size(
    queries=len(queries.tokens), dataset_queries=len(dataset.query_ids)
  )
  k = min(k, len(dataset.document_ids))
  index = None
  if not {"bm25", "dense"}.issuperset(methods):
    index = _Index(dataset, documents, codec, fde)
  rows = []
  for name in methods:
    if name == "bm25":
      find, size, seconds = _lexical(dataset, k)
    elif name == "dense":
      find, size, seconds = _dense(dataset, documents, queries, k)
    elif model is not None:
      find, size, seconds = index.word_finder(
        name, queries, model, k, num_candidates
      )
    else:
      find, size, seconds = index.finder(name, queries, k, num_candidates)
    run = find()  # compiles
    times = []
    for _ in range(repeats):
      start = time.perf_counter()
      find()
      times.append(time.perf_counter() - start)
    rows.append(
      Measured(
        name=name,
        metrics=runs.evaluate(run, dataset.qrels, metrics),
        bytes_per_document=size / len(dataset.document_ids),
        ms_per_query=1e3 * float(np.median(times)) / len(dataset.query_ids),
        build_seconds=seconds,
        exact_overlap=None,
        run=run,
      )
    )
  exact = [row.run for row in rows if row.name in ("maxsim", "colberter")]
  if not exact:
    return rows
  return [
    dataclasses.replace(row, exact_overlap=_overlap(row.run, exact[0]))
    for row in rows
  ]


class _Index:
  """The token index and its candidates, built once, each part timed."""

  def __init__(self, dataset, documents, codec, fde):
    start = time.perf_counter()
    trained = codecs.train(codec, jax.random.key(0), documents.tokens)
    index = token_index.build(
      documents.tokens,
      documents.offsets,
      trained,
      word_ids=documents.word_ids,
    )
    self.index = jax.block_until_ready(index)
    self.seconds = time.perf_counter() - start
    self.dataset, self.documents, self.fde = dataset, documents, fde

  def finder(self, name, queries, k, num_candidates):
    """A function that searches all queries, its bytes and build seconds."""
    start = time.perf_counter()
    index, mode, vectors = self.index, "exact", None
    if name == "dense+maxsim":
      mode, vectors = "dense", queries.pooled
      stored = token_index.store_vectors(self.documents.pooled)
    elif name.startswith("fde"):
      mode = "fde"
      config = muvera.FDEConfig(
        dim=index.codec.dim,
        fill_empty=name == "fde-filled+maxsim",
        **muvera.PRESETS[self.fde],
      )
      params = muvera.init(jax.random.key(0), config)
      stored = token_index.store_vectors(
        muvera.encode_corpus(
          params, config, self.documents.tokens, self.documents.offsets
        ),
        name="float16",
        fde_params=params,
        fde_config=config,
      )
    if mode != "exact":
      index = dataclasses.replace(index, candidates={mode: stored})
      jax.block_until_ready(index)
    seconds = self.seconds + time.perf_counter() - start

    def find():
      found = search.search_batches(
        index,
        queries.tokens,
        queries.mask,
        mode=mode,
        k=k,
        num_candidates=max(k, num_candidates),
        query_vectors=vectors,
      )
      return _run(self.dataset, found.index, found.scores)

    return find, index.num_bytes, seconds

  def word_finder(self, name, queries, model, k, num_candidates):
    """As `finder`, by both scores of ColBERTer."""
    start = time.perf_counter()
    stored = token_index.store_vectors(self.documents.pooled, name="float16")
    vectors = {model.method.vectors: stored}
    index = dataclasses.replace(self.index, candidates=vectors)
    jax.block_until_ready(index)
    seconds = self.seconds + time.perf_counter() - start

    def find():
      found = text_methods.search(
        index,
        queries,
        model,
        mode="exact" if name == "colberter" else None,
        k=k,
        num_candidates=max(k, num_candidates),
      )
      return _run(self.dataset, found.index, found.scores)

    return find, index.num_bytes, seconds


def _lexical(dataset, k):
  start = time.perf_counter()
  index = bm25.build(dataset.document_ids, dataset.document_texts)
  seconds = time.perf_counter() - start
  find = functools.partial(
    bm25.search, index, dataset.query_ids, dataset.query_texts, k=k
  )
  return find, index.num_bytes, seconds


def _dense(dataset, documents, queries, k):
  vectors = jnp.asarray(documents.pooled)
  top_k = jax.jit(
    lambda x, vectors: jax.lax.top_k(
      jnp.matmul(x, vectors.T, precision="highest"), k
    )
  )

  def find():
    scores, index = jax.device_get(top_k(queries.pooled, vectors))
    return _run(dataset, index, scores)

  return find, vectors.nbytes, 0.0


def _run(dataset, index, scores):
  return runs.from_arrays(
    dataset.query_ids, dataset.document_ids, index, scores
  )


def _overlap(run, exact, k=10):
  def best(hits):
    return set(sorted(hits, key=hits.get, reverse=True)[:k])

  shares = [
    len(best(hits) & best(run[query])) / max(1, len(best(hits)))
    for query, hits in exact.items()
  ]
  return float(np.mean(shares))

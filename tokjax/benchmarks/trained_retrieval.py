"""Retrievers trained side by side on one data set: quality against bytes.

    tokjax bench trained_retrieval --seeds 0 1 2 --out rows.jsonl
    tokjax bench trained_retrieval --seeds --out rows.jsonl --plot pareto.svg

All start from the same sentence encoder, see the same queries for the same
number of steps, and are asked the same test queries. The encoder is frozen
and its hidden states computed once, so that training a head takes half a
minute on a CPU; `--frozen-layers 5` trains its last block as well. The claims
of `configs/claims/` are statements about the rows.
"""

import argparse
import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from tokjax import checks
from tokjax.benchmarks import pareto
from tokjax.cli import evaluate
from tokjax.data import retrieval_set
from tokjax.eval import runs
from tokjax.models import checkpoints
from tokjax.retrieval import (
  colbert,
  colberter,
  colberter_texts,
  crisp,
  heads,
  search,
  token_index,
  token_pruning,
  token_retrieval,
  xtr,
)
from tokjax.train import features, loop, retrieval_run
from tokjax.train.late_interaction import LateInteraction, Objective
from tokjax.train.optimizer import OptimizerConfig

__all__ = ["VARIANTS", "Row", "TrainedConfig", "main", "measure", "on_seeds"]

# What is trained, by name; several rows may come from one of them.
VARIANTS = (
  "zero-shot",
  "colbert",
  "xtr",
  "crisp",
  "heads",
  "colberter",
)
_HEADS = {
  "linear": dict(),
  "ffn": dict(kind="ffn", expand=2.0, residual="first"),
  "glu": dict(kind="glu", expand=2.0, residual="first", activation="silu"),
}
_METRICS = ("nDCG@10", "R@100")


@dataclasses.dataclass(unsafe_hash=True)
class TrainedConfig:
  """One data set, one seed."""

  dataset: str = "pydocs"  # folder in BEIR layout with a train split, or pydocs
  model: str = evaluate.DEFAULT_MODEL  # where all start
  variants: tuple[str, ...] = VARIANTS
  seed: int = 0  # of new weights, orders and dropout
  num_steps: int = 300  # updates of each
  batch_size: int = 32  # queries of each
  learning_rate: float = 5e-4  # peak, after a tenth of the steps
  frozen_layers: int = 6  # lower blocks that stay as they are
  query_length: int = 32  # most tokens of a query
  document_length: int = 64  # most tokens of a document
  max_documents: int | None = 3000  # searched; None for all
  max_queries: int | None = 200  # test queries; None for all
  presets: tuple[str, ...] = ("C4x8", "C8x32")  # of CRISP
  k_train: int = 128  # of XTR: tokens retrieved from 32 x 64 of a batch
  # Of XTR: tokens each query token retrieves from the index. The paper's 40,000
  # of MS MARCO's 700 million would be 4 of the 70,000 here.
  k_primes: tuple[int, ...] = (10, 100)


@dataclasses.dataclass(frozen=True)
class Row:
  """What one way to search reached.

  Attributes:
    metrics: {name: mean in 0..1}.
    bytes_per_document: of float16 vectors, nothing else counted.
    vectors_per_document: mean number.
  """

  metrics: dict[str, float]
  bytes_per_document: float
  vectors_per_document: float


def measure(config: TrainedConfig, *, progress: bool = True) -> dict[str, Row]:
  """Trains and measures what a config asks for.

  Args:
    config: what to train.
    progress: print losses while training, and rows as they come.

  Returns:
    Rows by name: "dense", "zero-shot", "colbert", "xtr", "colbert by 10 tokens"
    and the like (scored from retrieved tokens only, as XTR does), for each
    preset "crisp P", "post-hoc P" and "first P" (the first tokens, as many),
    "head ...", and "colberter", "uni-colberter".

  Raises:
    ValueError: for an unknown variant, or data that is not there.
  """
  for name in config.variants:
    checks.one_of(VARIANTS, variants=name)
  bench = _Bench(config, progress)
  for name in config.variants:
    getattr(bench, "_" + name.replace("-", "_"))()
  return bench.rows


def on_seeds(
  variants: Sequence[str], data: str, *, seeds: Sequence[int] = (0, 1, 2)
) -> tuple[TrainedConfig, ...]:
  """The measurements of a claim: the same variants with other seeds.

  Args:
    variants: what is trained.
    data: folder of data sets, with `scifact` among them.
    seeds: one measurement of each data set for each.

  Returns:
    Configs of pydocs, otherwise the default, then of scifact: 150 steps, six
    passes over its training questions; all documents, cut at 128 tokens, and
    all test questions.

  Example:
    >>> [(c.dataset, c.seed) for c in on_seeds(["xtr"], "data", seeds=(0, 1))]
    [('pydocs', 0), ('pydocs', 1), ('data/scifact', 0), ('data/scifact', 1)]
  """
  pydocs = TrainedConfig(variants=tuple(variants))
  scifact = dataclasses.replace(
    pydocs,
    dataset=f"{data}/scifact",
    num_steps=150,
    document_length=128,
    max_documents=None,
    max_queries=None,
  )
  return tuple(
    dataclasses.replace(config, seed=seed)
    for config in (pydocs, scifact)
    for seed in seeds
  )


class _Setup(NamedTuple):
  """What all seeds and variants share."""

  test: retrieval_set.RetrievalSet
  run: retrieval_run.RetrievalRun
  prepared: retrieval_run.Prepared
  documents: features.Features  # of the test set
  queries: features.Features


@functools.cache  # the frozen blocks take a minute
def _setup(config: TrainedConfig, progress: bool) -> _Setup:
  test = evaluate.load(
    evaluate.EvaluateConfig(
      dataset=config.dataset,
      max_documents=config.max_documents,
      max_queries=config.max_queries,
    )
  )
  run = retrieval_run.RetrievalRun(
    model=config.model,
    query_length=config.query_length,
    document_length=config.document_length,
    frozen_layers=config.frozen_layers,
    data=retrieval_run.DataConfig(
      dataset=config.dataset, batch_size=config.batch_size
    ),
    trainer=loop.TrainConfig(
      num_steps=config.num_steps,
      optimizer=OptimizerConfig(
        learning_rate=config.learning_rate, warmup_steps=config.num_steps // 10
      ),
      log_every=50 if progress else 0,
    ),
  )
  prepared = retrieval_run.prepare(run, progress=progress)
  texts = prepared.data.document_texts
  place = {text: i for i, text in enumerate(texts)}
  known = [place.get(text) for text in test.document_texts]
  if None in known:
    raise ValueError(f"{config.dataset}: test documents differ from train's")
  queries = features.compute(
    test.query_texts,
    prepared.checkpoint.tokenizer,
    prepared.frozen.lower,
    length=config.query_length,
    progress=False,
  )
  documents = _select(prepared.frozen.documents, known)
  return _Setup(test, run, prepared, documents, queries)


class _Bench:
  """The rows of one measurement, in `rows`."""

  def __init__(self, config: TrainedConfig, progress: bool):
    self.config, self._progress = config, progress
    self.rows: dict[str, Row] = {}
    shared = dataclasses.replace(config, seed=0, variants=())
    setup = _setup(shared, progress)
    self._test, self._prepared = setup.test, setup.prepared
    self._documents, self._queries = setup.documents, setup.queries
    self._run = dataclasses.replace(setup.run, seed=config.seed)
    self._checkpoint = setup.prepared.checkpoint

  def _zero_shot(self):
    model = LateInteraction(self._prepared.frozen.upper, heads.Projection([]))
    documents, queries = self._encode(model)
    scores = queries.pooled @ documents.pooled.T
    best = np.argsort(-scores, axis=1, kind="stable")[:, :100]
    ranking = search.Ranking(best, np.take_along_axis(scores, best, axis=1))
    self._add("dense", ranking, documents.pooled, len(documents.pooled))
    self._exact("zero-shot", documents, queries)

  def _colbert(self):
    documents, queries = self._trained_colbert
    self._exact("colbert", documents, queries)

  def _xtr(self):
    self._by_tokens("colbert", *self._trained_colbert)
    # The mean of cosines lies in -1..1; 32 of them are ColBERT's logits.
    objective = Objective(
      method="xtr", k_train=self.config.k_train, temperature=1 / 32
    )
    documents, queries = self._encode(self._train(objective))
    self._exact("xtr", documents, queries)
    self._by_tokens("xtr", documents, queries)

  def _crisp(self):
    for preset in self.config.presets:
      clusters = crisp.CrispConfig(**crisp.PRESETS[preset])
      objective = Objective(method="crisp", clusters=clusters)
      trained = self._encode(self._train(objective))
      self._clustered(f"crisp {preset}", *trained, clusters)
      documents, queries = self._trained_colbert
      self._clustered(f"post-hoc {preset}", documents, queries, clusters)
      if clusters.document_clusters is not None:
        first = [
          token_pruning.keep_tokens_packed(
            side.tokens, side.offsets, num_keep=number
          )
          for side, number in (
            (documents, clusters.document_clusters),
            (queries, clusters.query_clusters),
          )
        ]
        self._exact(
          f"first {preset}",
          *(
            side._replace(tokens=tokens, offsets=offsets)
            for side, (tokens, offsets) in zip(
              (documents, queries), first, strict=True
            )
          ),
        )

  def _heads(self):
    width = self._checkpoint.encoder.config.width
    linear = heads.HeadConfig(input_dim=width, output_dim=128)
    for name, changes in _HEADS.items():
      head = dataclasses.replace(linear, **changes)
      model = self._train(Objective(), head=head)
      self._exact(f"head {name}", *self._encode(model))

  def _colberter(self):
    width = self._checkpoint.encoder.config.width
    for name, stage in (("colberter", 3), ("uni-colberter", 4)):
      config = colberter.ColberterConfig.stage(
        stage,
        hidden_dim=width,
        query_length=self.config.query_length,
        document_length=self.config.document_length,
        # Against cross-entropies near 1, not Margin-MSEs near 10.
        sparsity_weight=0.05,
        cls_weight=0.5,
      )
      run = dataclasses.replace(
        self._run, objective=Objective(method="colberter"), words=config
      )
      checkpoint, _ = retrieval_run.train(run, self._prepared)
      self._words(name, checkpoint)

  @functools.cached_property
  def _trained_colbert(self):
    return self._encode(self._train(Objective()))

  def _train(self, objective, head=None) -> LateInteraction:
    width = self._checkpoint.encoder.config.width
    identity = heads.HeadConfig(
      input_dim=width, output_dim=width, init="identity"
    )
    run = dataclasses.replace(
      self._run, objective=objective, head=identity if head is None else head
    )
    return retrieval_run.train(run, self._prepared)[1].state.model

  def _encode(self, model):
    return (
      features.encode(self._documents, model),
      features.encode(self._queries, model),
    )

  def _exact(self, name, documents, queries):
    index = token_index.build(documents.tokens, documents.offsets)
    found = search.search_batches(index, *_padded(queries), k=self._k)
    self._add(name, found, documents.tokens, len(documents.offsets) - 1)

  def _by_tokens(self, name, documents, queries):
    index = token_index.build(documents.tokens, documents.offsets)
    tokens, mask = _padded(queries)
    parts = [
      jax.device_get(
        _rankings(
          index,
          tokens[i : i + 8],
          mask[i : i + 8],
          k=self._k,
          k_primes=self.config.k_primes,
        )
      )
      for i in range(0, len(tokens), 8)
    ]
    for k_prime, *rankings in zip(self.config.k_primes, *parts, strict=True):
      found = search.Ranking(
        *(np.concatenate(arrays) for arrays in zip(*rankings, strict=True))
      )
      self._add(
        f"{name} by {k_prime} tokens",
        found,
        documents.tokens,
        len(documents.offsets) - 1,
      )

  def _clustered(self, name, documents, queries, clusters):
    tokens, offsets = crisp.cluster_packed(
      documents.tokens, documents.offsets, clusters
    )
    index = token_index.build(tokens, offsets)
    found = crisp.cluster_queries(*_padded(queries), clusters)
    found = search.search_batches(index, found.means, found.mask, k=self._k)
    self._add(name, found, tokens, len(offsets) - 1)

  def _words(self, name, checkpoint: checkpoints.Checkpoint):
    parts = (checkpoint.tokenizer, checkpoint.encoder, checkpoint.head)
    found = colberter_texts.encode_documents(
      self._test.document_texts, *parts, progress=False
    )
    queries = colberter_texts.encode_queries(self._test.query_texts, *parts)
    scores = []
    head, packed = checkpoint.head, found.documents
    everything = np.arange(len(packed.offsets) - 1)
    # All documents in one list, which is what the search of an index equals.
    chosen = colberter_texts.select_documents(found, everything[None])
    ids = head.config.exact_match
    score = jax.jit(colberter.score)
    for i in range(0, len(queries.word_ids), 8):
      rows = slice(i, i + 8)
      scores.append(
        score(
          queries.queries.pooled[rows],
          queries.queries.tokens[rows],
          queries.queries.mask[rows],
          chosen.cls[0],
          chosen.words[0],
          chosen.mask[0],
          head.fusion[...],
          queries.word_ids[rows] if ids else None,
          chosen.word_ids[0] if ids else None,
        ).scores
      )
    values, index = jax.lax.top_k(np.concatenate(scores), self._k)
    count = len(packed.offsets) - 1
    row = self._row(
      search.Ranking(np.asarray(index), np.asarray(values)),
      packed.tokens,
      count,
    )
    cls_bytes = 2 * packed.pooled.shape[1]
    id_bytes = 4 * row.vectors_per_document if ids else 0
    total = row.bytes_per_document + cls_bytes + id_bytes
    self._keep(name, dataclasses.replace(row, bytes_per_document=total))

  @property
  def _k(self):
    return min(100, len(self._test.document_ids))

  def _add(self, name, found, vectors, count):
    self._keep(name, self._row(found, vectors, count))

  def _row(self, found, vectors, count):
    run = runs.from_arrays(
      self._test.query_ids,
      self._test.document_ids,
      np.asarray(found.index),
      np.asarray(found.scores),
    )
    return Row(
      metrics=runs.evaluate(run, self._test.qrels, _METRICS),
      bytes_per_document=2 * vectors.size / count,
      vectors_per_document=len(vectors) / count,
    )

  def _keep(self, name, row):
    self.rows[name] = row
    if self._progress:
      numbers = "  ".join(f"{k} {v:.4f}" for k, v in row.metrics.items())
      print(f"{name:<20} {numbers}  {row.bytes_per_document:,.0f} B",
            flush=True)  # fmt: skip


@functools.partial(jax.jit, static_argnames=("k", "k_primes"))
def _rankings(index, tokens, mask, *, k, k_primes):
  """`xtr.search` for several numbers of tokens, which are found only once."""
  documents, scores = token_retrieval.nearest_tokens(
    index, tokens.reshape(-1, tokens.shape[2]), max(k_primes)
  )
  shape = (*mask.shape, -1)
  documents, scores = documents.reshape(shape), scores.reshape(shape)
  return [
    xtr.aggregate(documents[..., :few], scores[..., :few], mask, k=k)
    for few in k_primes
  ]


def _select(found: features.Features, rows: Sequence[int]):
  lengths = np.diff(found.offsets)[rows]
  place = np.concatenate(
    [np.arange(found.offsets[i], found.offsets[i + 1]) for i in rows]
  )
  offsets = np.concatenate([[0], np.cumsum(lengths)])
  return features.Features(found.hidden[place], offsets)


def _padded(packed: colbert.Documents) -> tuple[Any, Any]:
  """Token vectors and mask of texts, padded to the longest."""
  lengths = np.diff(packed.offsets)
  mask = np.arange(lengths.max()) < lengths[:, None]
  tokens = np.zeros((*mask.shape, packed.tokens.shape[1]), np.float32)
  tokens[mask] = packed.tokens
  return tokens, mask


def main(argv: list[str] | None = None) -> None:
  """Measures one data set and seed and appends the rows to a file.

  Args:
    argv: command line; None for the process's own.
  """
  parser = argparse.ArgumentParser(description=__doc__)
  default = TrainedConfig()
  add = parser.add_argument
  add("--dataset", default=default.dataset)
  add("--variants", default=",".join(VARIANTS))
  add("--seeds", type=int, nargs="*", default=[0], help="none measures none")
  add("--steps", type=int, default=default.num_steps)
  add("--document-length", type=int, default=default.document_length)
  add("--frozen-layers", type=int, default=default.frozen_layers)
  add("--learning-rate", type=float, default=default.learning_rate)
  add("--max-documents", type=int, default=default.max_documents)
  add("--max-queries", type=int, default=default.max_queries)
  add("--out", help="file to append JSON lines to")
  add("--plot", help="draws the rows of --out: a file .svg or .png")
  options = parser.parse_args(argv)
  if options.plot and not options.out:
    parser.error("--plot needs --out, whose rows it draws")
  for seed in options.seeds:
    config = TrainedConfig(
      dataset=options.dataset,
      variants=tuple(options.variants.split(",")),
      seed=seed,
      num_steps=options.steps,
      document_length=options.document_length,
      frozen_layers=options.frozen_layers,
      learning_rate=options.learning_rate,
      max_documents=options.max_documents,
      max_queries=options.max_queries,
    )
    rows = measure(config)
    if options.out:
      with open(options.out, "a", encoding="utf-8") as file:
        for name, row in rows.items():
          line = {"name": name, **dataclasses.asdict(row)}
          line["config"] = dataclasses.asdict(config)
          file.write(json.dumps(line) + "\n")
  if options.plot:
    pareto.plot(pareto.read(options.out), options.plot)


if __name__ == "__main__":
  main()

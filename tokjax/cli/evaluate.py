"""`tokjax evaluate`: ranking quality and cost on a BEIR folder or on pydocs."""

import argparse
import dataclasses
import json
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from tokjax import checks
from tokjax.data import beir, pydocs
from tokjax.data.retrieval_set import RetrievalSet
from tokjax.eval import comparison
from tokjax.models import checkpoints
from tokjax.retrieval import codecs, colbert, methods, muvera

__all__ = [
  "Encoded",
  "EvaluateConfig",
  "encode",
  "load",
  "main",
  "measure",
  "print_table",
]

DEFAULT_MODEL = "all-MiniLM-L6-v2"


@dataclasses.dataclass(unsafe_hash=True)
class EvaluateConfig:
  """What `tokjax evaluate` measures."""

  dataset: str = "pydocs"  # a folder in BEIR layout, or "pydocs"
  split: str = "test"  # whose queries are asked
  model: str = DEFAULT_MODEL  # folder, weights package or hub name
  # Keys of comparison.METHODS, of a ColBERTer model those of WORD_METHODS; None
  # for all.
  methods: tuple[str, ...] | None = None
  metrics: tuple[str, ...] = ("nDCG@10", "R@100", "MRR@10")
  codec: str = "float16"  # how tokens are stored
  fde: int = 10240  # width of the MUVERA encodings, a key of muvera.PRESETS
  # Documents re-ranked per query: the fewest, as a power of two, that hold 98 %
  # of the exact ten best on scifact, cranfield and vaswani.
  num_candidates: int = 512
  dtype: str = "float32"  # the encoder computes in this
  document_length: int | None = None  # most tokens of a document; None: model's
  max_documents: int | None = None  # take only some documents; None for all
  max_queries: int | None = None  # ask only the first queries; None for all


@dataclasses.dataclass(frozen=True)
class Encoded:
  """A data set with its documents and queries encoded by one checkpoint."""

  dataset: RetrievalSet
  checkpoint: checkpoints.Checkpoint
  documents: colbert.Documents
  queries: colbert.Queries


def load(config: EvaluateConfig) -> RetrievalSet:
  """The data set of a config, cut to `max_documents` and `max_queries`.

  A cut of the documents keeps those that answer the first queries, fills up
  with others, and drops the queries left without an answer.

  Args:
    config: names the data set.

  Returns:
    The data set.

  Raises:
    ValueError: if it is not there or damaged, or a cut is below 1.
  """
  if config.dataset == "pydocs":
    full = pydocs.load(config.split)
  else:
    full = beir.load(config.dataset, config.split)
  if config.max_documents is not None:
    checks.in_range(1, 1 << 40, max_documents=config.max_documents)
    full = _cut(full, config.max_documents)
  if config.max_queries is not None:
    checks.in_range(1, 1 << 40, max_queries=config.max_queries)
    full = _first_queries(full, config.max_queries)
  return full


def encode(config: EvaluateConfig, *, progress: bool = True) -> Encoded:
  """Loads data and checkpoint and encodes documents and queries.

  Args:
    config: what to load.
    progress: show a progress bar.

  Returns:
    Everything a comparison needs.

  Raises:
    ValueError: as `load`, or for a ColBERTer model and settings that only token
      vectors have.
  """
  checkpoint = checkpoints.load(config.model)
  settings = dict(dtype=config.dtype, progress=progress)
  if checkpoint.method.name == "colberter":
    return _encode_words(config, checkpoint, settings)
  # What is compared here are token vectors, whatever the model's own method.
  dataset = load(config)
  text_config = checkpoint.config
  if config.document_length is not None:
    text_config = dataclasses.replace(
      text_config, document_length=config.document_length
    )
  checkpoint = dataclasses.replace(checkpoint, config=text_config)
  parts = (
    checkpoint.tokenizer,
    checkpoint.encoder,
    checkpoint.head,
    checkpoint.config,
  )
  return Encoded(
    dataset=dataset,
    checkpoint=checkpoint,
    documents=colbert.encode_documents(
      dataset.document_texts, *parts, **settings
    ),
    queries=colbert.encode_queries(dataset.query_texts, *parts, **settings),
  )


def _encode_words(config, checkpoint, settings):
  """`encode` for ColBERTer, whose head says how texts are cut."""
  for name in config.methods or ():
    checks.one_of(tuple(comparison.WORD_METHODS), methods=name)
  checks.one_of((None,), document_length=config.document_length)
  dataset = load(config)
  return Encoded(
    dataset=dataset,
    checkpoint=checkpoint,
    documents=methods.encode_documents(
      dataset.document_texts, checkpoint, **settings
    ),
    queries=methods.encode_queries(dataset.query_texts, checkpoint, **settings),
  )


def measure(
  config: EvaluateConfig, encoded: Encoded
) -> list[comparison.Measured]:
  """Runs the comparison that a config asks for; see `comparison.compare`."""
  checkpoint = encoded.checkpoint
  return comparison.compare(
    encoded.dataset,
    encoded.documents,
    encoded.queries,
    model=checkpoint if checkpoint.method.name == "colberter" else None,
    methods=config.methods,
    metrics=config.metrics,
    codec=config.codec,
    fde=config.fde,
    num_candidates=config.num_candidates,
  )


def print_table(rows: Sequence[comparison.Measured], title: str) -> None:
  """Prints one line a method to the terminal."""
  metrics = list(rows[0].metrics)
  columns = (*metrics, "top 10 of exact", "bytes/doc", "ms/query")
  table = Table("method", *columns, title=title)
  for row in rows:
    table.add_row(
      row.name,
      *(f"{row.metrics[name]:.4f}" for name in metrics),
      "" if row.exact_overlap is None else f"{row.exact_overlap:.3f}",
      f"{row.bytes_per_document:,.0f}",
      f"{row.ms_per_query:.3g}",
    )
  Console().print(table)


def main(argv: list[str]) -> int:
  """Evaluates and prints; see `tokjax evaluate --help`."""
  config, as_json = _parse(argv)
  encoded = encode(config, progress=not as_json)
  rows = measure(config, encoded)
  if not as_json:
    name, count = encoded.dataset.name, len(encoded.dataset.query_ids)
    print_table(rows, f"{name}, {count} queries, {config.model}")
    return 0
  for row in rows:
    fields = dataclasses.asdict(row)
    del fields["run"]
    print(json.dumps({**fields, "config": dataclasses.asdict(config)}))
  return 0


def _parse(argv):
  parser = argparse.ArgumentParser(
    prog="tokjax evaluate",
    description="Ranking quality and cost of each way to search a data set.",
    epilog=f"methods: {_described(comparison.METHODS)}. Methods of a ColBERTer"
    f" model: {_described(comparison.WORD_METHODS)}.",
  )
  default = EvaluateConfig()
  add = parser.add_argument
  add(
    "dataset",
    nargs="?",
    default=default.dataset,
    help="a folder in BEIR layout (corpus.jsonl, queries.jsonl, qrels/), or"
    " pydocs, the documentation installed beside tokjax (default)",
  )
  add("--split", default=default.split, help="whose queries (default: test)")
  add("--model", default=default.model, help="folder, package or hub name")
  add("--methods", help="comma-separated (default: all)")
  add("--metrics", default=",".join(default.metrics), help="comma-separated")
  add("--codec", default=default.codec, choices=codecs.NAMES)
  add("--fde", type=int, default=default.fde, choices=tuple(muvera.PRESETS))
  add("--candidates", type=int, default=default.num_candidates, metavar="N")
  add("--dtype", default=default.dtype, choices=("float32", "bfloat16"))
  add("--document-length", type=int, metavar="N", help="most tokens of each")
  add("--max-documents", type=int, metavar="N", help="a smaller corpus")
  add("--max-queries", type=int, metavar="N", help="only the first queries")
  add("--json", action="store_true", help="one object a line")
  options = parser.parse_args(argv)
  config = EvaluateConfig(
    dataset=options.dataset,
    split=options.split,
    model=options.model,
    methods=tuple(options.methods.split(",")) if options.methods else None,
    metrics=tuple(options.metrics.split(",")),
    codec=options.codec,
    fde=options.fde,
    num_candidates=options.candidates,
    dtype=options.dtype,
    document_length=options.document_length,
    max_documents=options.max_documents,
    max_queries=options.max_queries,
  )
  return config, options.json


def _described(known: dict[str, str]) -> str:
  return "; ".join(f"{name}: {what}" for name, what in known.items())


def _first_queries(full: RetrievalSet, size: int) -> RetrievalSet:
  kept = full.query_ids[:size]
  return dataclasses.replace(
    full,
    query_ids=kept,
    query_texts=full.query_texts[:size],
    qrels={name: full.qrels[name] for name in kept if name in full.qrels},
  )


def _cut(full: RetrievalSet, size: int) -> RetrievalSet:
  place = {name: i for i, name in enumerate(full.document_ids)}
  keep: dict[int, None] = {}
  for name in full.query_ids:
    if len(keep) >= size // 2:
      break
    keep.update((place[d], None) for d in full.qrels.get(name, {}))
  rest = (i for i in range(len(place)) if i not in keep)
  chosen = np.sort([*keep, *rest][:size]).tolist()
  kept = {full.document_ids[i] for i in chosen}
  qrels = {
    query: found
    for query, grades in full.qrels.items()
    if (found := {d: g for d, g in grades.items() if d in kept})
  }
  texts = dict(zip(full.query_ids, full.query_texts, strict=True))
  return RetrievalSet(
    name=f"{full.name} ({size} documents)",
    document_ids=[full.document_ids[i] for i in chosen],
    document_titles=[full.document_titles[i] for i in chosen],
    document_texts=[full.document_texts[i] for i in chosen],
    query_ids=list(qrels),
    query_texts=[texts[name] for name in qrels],
    qrels=qrels,
    metadata=full.metadata,
  )

"""`tokjax demo`: the whole road on real documents, offline, in minutes.

Collects the documentation installed beside tokjax, encodes it, builds an
index on disk, measures five ways to search it, trains a projection head on
questions held apart, answers sample questions and writes one HTML page with
all of that.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import tokjax
from tokjax import files
from tokjax.cli import evaluate, index, report
from tokjax.data import pydocs, training_set
from tokjax.eval import comparison
from tokjax.kernels import maxsim
from tokjax.models import bert
from tokjax.retrieval import alignment, colbert, heads
from tokjax.train import features, loop, retrieval_run
from tokjax.train.optimizer import OptimizerConfig

__all__ = ["QUESTIONS", "DemoConfig", "main", "run"]

QUESTIONS = (
  "how do I sum the elements of an array along one axis",
  "find where two sorted sequences would be merged",
  "run the same function on several devices at once",
  "estimate how smooth a curve through noisy points should be",
  "read a compressed file line by line",
)


@dataclasses.dataclass(unsafe_hash=True)
class DemoConfig:
  """What `tokjax demo` does."""

  out: str = "tokjax_demo"  # folder of the index, the page and the numbers
  model: str = evaluate.DEFAULT_MODEL  # folder, weights package or hub name
  document_length: int = 64  # tokens read of each document, for a quick start
  max_documents: int | None = None  # a smaller corpus; None for all
  max_queries: int | None = 100  # test queries asked; None for all
  questions: tuple[str, ...] = QUESTIONS
  results: int = 3  # documents shown for each question
  train_steps: int = 150  # updates of the head
  train_queries: int | None = 1500  # it learns from; None for all


def run(config: DemoConfig) -> pathlib.Path:
  """Runs the demonstration.

  Args:
    config: where to, and how much.

  Returns:
    The HTML page. Beside it stand `results.json` and the folder `index`.

  Raises:
    FileNotFoundError: if the weights are missing; says what to run.
    ValueError: if `out` holds an index of something else.
  """
  console, begin = Console(), time.perf_counter()
  out = pathlib.Path(config.out)
  out.mkdir(parents=True, exist_ok=True)
  settings = evaluate.EvaluateConfig(
    model=config.model,
    # Filled MUVERA cells are worse here: see `tokjax evaluate`.
    methods=tuple(m for m in comparison.METHODS if m != "fde-filled+maxsim"),
    document_length=config.document_length,
    max_documents=config.max_documents,
    max_queries=config.max_queries,
  )
  console.print("[bold]1/5[/] collecting and encoding installed documentation")
  encoded = evaluate.encode(settings)
  encode_s = time.perf_counter() - begin
  dataset, checkpoint = encoded.dataset, encoded.checkpoint
  console.print(
    f"     {len(dataset.document_ids):,} documents, "
    f"{len(encoded.documents.tokens):,} tokens, "
    f"{len(dataset.query_ids):,} test queries, {encode_s:.0f} s"
  )
  console.print("[bold]2/5[/] building the index on disk")
  start = time.perf_counter()
  index.write(
    out / "index",
    dataset.document_ids,
    dataset.document_texts,
    encoded.documents,
    checkpoint.sha256,
    index.IndexConfig(model=config.model),
    replace=True,
  )
  console.print(f"     {out / 'index'}, {time.perf_counter() - start:.0f} s")
  console.print("[bold]3/5[/] measuring each way to search")
  rows = evaluate.measure(settings, encoded)
  evaluate.print_table(rows, f"{dataset.name}, {config.model}")
  console.print("[bold]4/5[/] training a projection head on other questions")
  start = time.perf_counter()
  trained = _train_head(config, encoded)
  gained = (
    trained.metrics["nDCG@10"]
    - next(row for row in rows if row.name == "maxsim").metrics["nDCG@10"]
  )
  console.print(
    f"     {config.train_steps} steps, {time.perf_counter() - start:.0f} s: "
    f"nDCG@10 of MaxSim on the test queries {gained:+.4f}"
  )
  rows = [*rows, trained]
  console.print("[bold]5/5[/] answering sample questions")
  answers = _answer(config, encoded)
  for answer in answers:
    console.print(f"     [bold]{answer.query}[/]", highlight=False)
    for name, score, _ in answer.documents:
      console.print(f"       {score:6.2f}  {name}", highlight=False)
  facts = _facts(config, encoded, time.perf_counter() - begin)
  page = report.write_report(
    out / "report.html",
    report.Report(
      title="Multi-vector search over installed documentation",
      facts=facts,
      methods=[_shown(row) for row in rows],
      answers=answers,
    ),
  )
  _write_results(out / "results.json", facts, rows)
  seconds = time.perf_counter() - begin
  console.print(f"[bold]{page}[/] written, {seconds:.0f} s in all")
  return page


def main(argv: list[str]) -> int:
  """Runs the demonstration; see `tokjax demo --help`."""
  parser = argparse.ArgumentParser(
    prog="tokjax demo",
    description="Indexes and searches the documentation installed beside"
    " tokjax, measures quality and cost, and writes one HTML page. Offline;"
    " a few minutes on two cores.",
  )
  default = DemoConfig()
  parser.add_argument("--out", default=default.out, help="folder to write")
  parser.add_argument("--model", default=default.model)
  parser.add_argument(
    "--small", action="store_true", help="only 500 documents: seconds"
  )
  options = parser.parse_args(argv)
  run(
    DemoConfig(
      out=options.out,
      model=options.model,
      max_documents=500 if options.small else None,
      max_queries=50 if options.small else 100,
      train_steps=50 if options.small else default.train_steps,
    )
  )
  return 0


def _train_head(config, encoded) -> comparison.Measured:
  """MaxSim with a head trained on frozen token vectors, on the test queries."""
  dataset, checkpoint = encoded.dataset, encoded.checkpoint
  learned = _training_queries(dataset, config.train_queries)
  parts = (checkpoint.tokenizer, checkpoint.encoder, None)
  settings = dict(config=checkpoint.config, progress=False)
  questions = colbert.encode_documents(learned.query_texts, *parts, **settings)
  frozen = retrieval_run.Frozen(
    *bert.split(checkpoint.encoder, checkpoint.encoder.config.num_layers),
    queries=_features(questions),
    documents=_features(encoded.documents),
  )
  width = checkpoint.encoder.config.width
  devices = jax.device_count()  # each has as many rows of a batch
  batch_size = max(32, devices)
  batch_size = min(batch_size, learned.num_examples) // devices * devices
  _, done = retrieval_run.train(
    retrieval_run.RetrievalRun(
      head=heads.HeadConfig(input_dim=width, output_dim=width, init="identity"),
      data=retrieval_run.DataConfig(batch_size=batch_size),
      trainer=loop.TrainConfig(
        num_steps=config.train_steps,
        optimizer=OptimizerConfig(
          learning_rate=5e-4, warmup_steps=config.train_steps // 10
        ),
        log_every=100,
      ),
    ),
    retrieval_run.Prepared(learned, checkpoint, frozen),
  )
  asked = colbert.encode_documents(dataset.query_texts, *parts, **settings)
  documents, queries = (
    features.encode(_features(x), done.state.model)
    for x in (encoded.documents, asked)
  )
  lengths = np.diff(queries.offsets)
  mask = np.arange(lengths.max()) < lengths[:, None]
  tokens = np.zeros((*mask.shape, width), np.float32)
  tokens[mask] = queries.tokens
  (row,) = comparison.compare(
    dataset,
    documents,
    colbert.Queries(tokens, mask, queries.pooled),
    methods=("maxsim",),
    codec="float16",
  )
  return dataclasses.replace(row, name="maxsim, trained head")


def _training_queries(dataset, size):
  """Train questions of pydocs whose answers are among these documents."""
  train = pydocs.load("train")
  kept = set(dataset.document_ids)
  qrels = {
    query: found
    for query, grades in train.qrels.items()
    if (found := {d: g for d, g in grades.items() if d in kept})
  }
  texts = dict(zip(train.query_ids, train.query_texts, strict=True))
  chosen = list(qrels)[:size]
  return training_set.from_retrieval_set(
    dataclasses.replace(
      dataset,
      query_ids=chosen,
      query_texts=[texts[query] for query in chosen],
      qrels={query: qrels[query] for query in chosen},
    )
  )


def _features(encoded):
  return features.Features(
    np.asarray(encoded.tokens, np.float16), encoded.offsets
  )


def _answer(config, encoded):
  """Searches exactly, and marks the words that answered."""
  checkpoint, documents = encoded.checkpoint, encoded.documents
  queries = colbert.encode_queries(
    config.questions,
    checkpoint.tokenizer,
    checkpoint.encoder,
    checkpoint.head,
    checkpoint.config,
  )
  document_of_token = np.repeat(
    np.arange(len(documents.offsets) - 1, dtype=np.int32),
    np.diff(documents.offsets),
  )
  scores = maxsim.maxsim_packed(
    jnp.asarray(queries.tokens),
    jnp.asarray(documents.tokens),
    jnp.asarray(document_of_token),
    jnp.asarray(queries.mask),
    num_documents=len(documents.offsets) - 1,
  )
  values, found = jax.device_get(jax.lax.top_k(scores, config.results))
  return [
    report.Answer(
      query=question,
      documents=[
        (
          encoded.dataset.document_ids[j],
          float(value),
          _spans(encoded, queries, i, question, int(j)),
        )
        for j, value in zip(found[i], values[i], strict=True)
      ],
    )
    for i, question in enumerate(config.questions)
  ]


def _spans(encoded, queries, i, question, j):
  """The text of document j, cut where a word answered question i."""
  text = encoded.dataset.document_texts[j]
  start, end = encoded.documents.offsets[j : j + 2]
  matches = alignment.align(
    question,
    text,
    queries.tokens[i],
    encoded.documents.tokens[start:end],
    encoded.checkpoint.tokenizer,
    encoded.checkpoint.config,
  )
  spans, at = [], 0
  for match in matches:
    spans.append(report.Span(text[at : match.start]))
    at = match.end
    spans.append(
      report.Span(
        text[match.start : at], max(match.similarity, 0), match.query_token
      )
    )
  # What lies far behind the last marked word is not shown.
  rest = text[at:]
  spans.append(report.Span(rest if len(rest) < 200 else rest[:160] + " ..."))
  return spans


def _facts(config, encoded, seconds):
  dataset = encoded.dataset
  device = jax.devices()[0]
  return {
    "corpus": f"{dataset.name}: {len(dataset.document_ids):,} documents, "
    f"{len(dataset.query_ids):,} test queries",
    "made from": ", ".join(
      f"{name} {version}"
      for name, version in dataset.metadata["versions"].items()
    ),
    "model": f"{config.model}, first {config.document_length} tokens of each "
    f"document, sha256 {encoded.checkpoint.sha256[:16]}...",
    "device": f"{device.device_kind}, {platform.machine()}, "
    f"{os.cpu_count()} cores",
    "versions": f"tokjax {tokjax.__version__}, jax {jax.__version__}",
    "date": datetime.date.today().isoformat(),
    "time": f"{seconds:.0f} s for everything",
  }


def _shown(row):
  return report.Method(
    name=row.name,
    metrics=row.metrics,
    bytes_per_document=row.bytes_per_document,
    ms_per_query=row.ms_per_query,
    note=comparison.METHODS.get(
      row.name, "MaxSim after training a head on other questions"
    ),
  )


def _write_results(path, facts, rows):
  fields = [dataclasses.asdict(row) for row in rows]
  for row in fields:
    del row["run"]
  with files.replacing(path) as aside:
    aside.write_text(json.dumps({"facts": facts, "rows": fields}, indent=1))

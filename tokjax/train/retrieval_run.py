"""One training run of a late-interaction retriever, from data to a model.

`RetrievalRun` is what a file of `configs/` returns; `prepare` loads data and
checkpoint, `train` runs the loop, and the result is a checkpoint again, which
`models.checkpoints.save` writes and every command reads.
"""

import dataclasses
from collections.abc import Callable, Mapping

import grain
import jax
import numpy as np
from flax import nnx

from tokjax import checks
from tokjax.data import batches, beir, hard_negatives, pydocs, training_set
from tokjax.data import triples as triple_files
from tokjax.models import bert, checkpoints
from tokjax.parallel import meshes, processes
from tokjax.retrieval import colbert, colberter, heads, methods
from tokjax.retrieval import words as whole_words
from tokjax.train import features, late_interaction, loop
from tokjax.train.optimizer import OptimizerConfig

__all__ = [
  "TRIPLES",
  "DataConfig",
  "EvaluationConfig",
  "Frozen",
  "Prepared",
  "RetrievalRun",
  "freeze",
  "load_data",
  "new_head",
  "prepare",
  "text_config",
  "train",
]


# How names of files of triples end.
TRIPLES = (".jsonl", ".tsv", ".json")

# Fields of a run that name markers and [MASK] padding.
_MARKING = (
  "query_marker",
  "document_marker",
  "expand_queries",
  "attend_to_expansion",
)

# Batches are small and made in no time; grain's own buffer is 500.
_READING = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)


@dataclasses.dataclass(unsafe_hash=True)
class DataConfig:
  """What is trained on."""

  # A folder in BEIR layout, "pydocs", or a file of `tokjax.data.triples`.
  dataset: str = "pydocs"
  split: str = "train"  # of a folder or pydocs
  queries: str | None = None  # texts of the ids of a file of triples
  documents: str | None = None  # the same
  batch_size: int = 32  # queries, over all devices and processes
  num_negatives: int = 0  # documents of a query besides its positive
  # Where a set has no negatives: "bm25" finds some, "none" does without.
  mine: str = "none"
  skip_top: int = 0  # best ranks that are no negatives
  bucket: int = 32  # granularity of padded document lengths


@dataclasses.dataclass(unsafe_hash=True)
class EvaluationConfig:
  """Ranking quality during training, measured by `train.ranking_evaluation`.

  How often is `trainer.evaluate_every`; at the end it is measured too.
  """

  split: str = ""  # whose queries are asked, "validation" say; "" measures none
  dataset: str = ""  # a folder in BEIR layout, or pydocs; "" for that of `data`
  num_queries: int | None = 200  # the first ones; None for all
  # Those that answer the queries, filled up with others; None for all.
  num_documents: int | None = 2000
  metrics: tuple[str, ...] = ("nDCG@10", "R@100", "MRR@10")


def _trainer() -> loop.TrainConfig:
  return loop.TrainConfig(
    num_steps=1000,
    optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=50),
  )


@dataclasses.dataclass(unsafe_hash=True)
class RetrievalRun:
  """A training run: start, method, data, loop."""

  model: str = "all-MiniLM-L6-v2"  # start: folder, weights package or hub name
  # Texts: None takes the checkpoint's own settings.
  query_length: int | None = None  # most tokens of a query
  document_length: int | None = None  # most tokens of a document
  query_marker: str | None = None  # word before a query's own; "" for none
  document_marker: str | None = None  # the same for documents
  expand_queries: bool | None = None  # pad queries with [MASK]s, and score them
  attend_to_expansion: bool | None = None  # may tokens attend to those [MASK]s
  objective: late_interaction.Objective = dataclasses.field(
    default_factory=late_interaction.Objective
  )
  # A new projection; None keeps that of the checkpoint, if it has one.
  head: heads.HeadConfig | None = None
  words: colberter.ColberterConfig | None = None  # head of ColBERTer
  frozen_layers: int = 0  # lower encoder blocks that are not trained
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  evaluation: EvaluationConfig = dataclasses.field(
    default_factory=EvaluationConfig
  )
  mesh: meshes.MeshConfig = dataclasses.field(default_factory=meshes.MeshConfig)
  trainer: loop.TrainConfig = dataclasses.field(default_factory=_trainer)
  seed: int = 0  # of new weights, draws, orders and dropout


@dataclasses.dataclass(frozen=True)
class Frozen:
  """Frozen lower blocks and what they make of all texts.

  Attributes:
    lower: embeddings and lower blocks.
    upper: the blocks above, where training starts from.
    queries: hidden states of the query texts of the training set.
    documents: hidden states of its document texts.
  """

  lower: bert.Bert
  upper: bert.Layers
  queries: features.Features
  documents: features.Features


@dataclasses.dataclass(frozen=True)
class Prepared:
  """Everything a run needs; several runs may share most of it.

  Attributes:
    data: the training set.
    checkpoint: where the run starts.
    frozen: the blocks that are not trained; None where all are.
  """

  data: training_set.TrainingSet
  checkpoint: checkpoints.Checkpoint
  frozen: Frozen | None


def load_data(config: DataConfig) -> training_set.TrainingSet:
  """The training set of a config, with negatives where they are asked for.

  Args:
    config: names the data.

  Returns:
    The training set.

  Raises:
    ValueError: if it is not there or damaged, or a setting is unknown.
  """
  checks.one_of(("none", "bm25"), mine=config.mine)
  if config.dataset.endswith(TRIPLES):
    found = triple_files.read(
      config.dataset, queries=config.queries, documents=config.documents
    )
  elif config.dataset == "pydocs":
    found = training_set.from_retrieval_set(pydocs.load(config.split))
  else:
    found = training_set.from_retrieval_set(
      beir.load(config.dataset, config.split)
    )
  if config.mine == "none":
    return found
  return _with_bm25(found, config)


def prepare(
  run: RetrievalRun,
  data: training_set.TrainingSet | None = None,
  *,
  progress: bool = True,
) -> Prepared:
  """Loads data and checkpoint, and encodes what is frozen.

  Args:
    run: what to load.
    data: the training set, if it is there already; None loads it.
    progress: show a progress bar while frozen blocks encode.

  Returns:
    What `train` takes.

  Raises:
    ValueError: for data or a checkpoint that is not there or damaged.
  """
  checkpoint = checkpoints.load(run.model)
  checkpoint = dataclasses.replace(
    checkpoint, config=text_config(run, checkpoint.config)
  )
  data = load_data(run.data) if data is None else data
  frozen = None
  if run.frozen_layers:
    frozen = freeze(checkpoint, data, run.frozen_layers, progress=progress)
  return Prepared(data, checkpoint, frozen)


def text_config(
  run: RetrievalRun, config: colbert.ColbertConfig
) -> colbert.ColbertConfig:
  """How texts become tokens: as the checkpoint says, where the run is silent.

  Args:
    run: may name lengths, markers and [MASK] padding.
    config: of the checkpoint.

  Returns:
    What batches are made by, and what is saved with the trained model.

  Raises:
    ValueError: if a run of ColBERTer, which has neither, names a marker or
      padding.

  Example:
    >>> run = RetrievalRun(query_length=12, query_marker="")
    >>> found = text_config(run, colbert.ColbertConfig())
    >>> found.query_length, found.query_marker, found.document_marker
    (12, None, '[unused1]')
  """
  names = ("query_length", "document_length", *_MARKING)
  said = {name: getattr(run, name) for name in names}
  changes = {name: value for name, value in said.items() if value is not None}
  marking = sorted(set(changes) & set(_MARKING))
  if run.objective.method == "colberter" and marking:
    raise ValueError(
      f"{marking[0]} must be None for method 'colberter', which reads whole "
      f"words, got {changes[marking[0]]!r}"
    )
  for name in ("query_marker", "document_marker"):
    if changes.get(name) == "":
      changes[name] = None
  return dataclasses.replace(config, **changes)


def new_head(
  run: RetrievalRun, checkpoint: checkpoints.Checkpoint, *, rngs: nnx.Rngs
) -> nnx.Module:
  """The head that is trained: a new one where the run asks for it.

  Args:
    run: names the head, or none.
    checkpoint: has the width of the encoder, and maybe a head to start from.
    rngs: seeds new weights.

  Returns:
    A head for `late_interaction.LateInteraction`.

  Raises:
    ValueError: for settings that do not fit each other.
  """
  if (run.objective.method == "colberter") != (run.words is not None):
    raise ValueError(
      "words must be given for method 'colberter' and no other, got "
      f"method {run.objective.method!r} and {run.words}"
    )
  if run.words is not None:
    width = checkpoint.encoder.config.width
    checks.same_size(words_hidden_dim=run.words.hidden_dim, encoder_width=width)
    if isinstance(checkpoint.head, colberter.ColberterHead):
      return colberter.warm_start(checkpoint.head, run.words, rngs=rngs)
    return colberter.ColberterHead(run.words, rngs=rngs)
  if run.head is not None:
    return heads.ProjectionHead(run.head, rngs=rngs)
  return heads.Projection([]) if checkpoint.head is None else checkpoint.head


def freeze(
  checkpoint: checkpoints.Checkpoint,
  data: training_set.TrainingSet,
  num_layers: int,
  *,
  progress: bool = True,
) -> Frozen:
  """Splits an encoder and encodes all texts by its lower blocks.

  Args:
    checkpoint: has the encoder.
    data: the texts.
    num_layers: lower blocks to freeze; all of them leaves the head to train.
    progress: show progress bars.

  Returns:
    Both parts and the hidden states, in host memory: 2 h bytes a token.

  Raises:
    ValueError: if `num_layers` is out of range, or queries are padded with
      [MASK], which no stored text has.
  """
  config = checkpoint.config
  if config.expand_queries:
    raise ValueError("frozen_layers needs expand_queries=False, got True")
  lower, upper = bert.split(checkpoint.encoder, num_layers)

  def encode(texts, length, marker):
    return features.compute(
      texts,
      checkpoint.tokenizer,
      lower,
      length=length,
      marker=marker,
      progress=progress,
    )

  return Frozen(
    lower,
    upper,
    encode(data.query_texts, config.query_length, config.query_marker),
    encode(data.document_texts, config.document_length, config.document_marker),
  )


def train(
  run: RetrievalRun,
  prepared: Prepared | None = None,
  *,
  evaluate: Callable[[checkpoints.Checkpoint, int], Mapping[str, float]]
  | None = None,
) -> tuple[checkpoints.Checkpoint, loop.Trained]:
  """Trains a retriever; resumes from `run.trainer.folder` if it was stopped.

  With several processes each calls it, reads its rows of every batch and gets
  the whole model on its own devices.

  Args:
    run: all settings.
    prepared: from `prepare`; None prepares.
    evaluate: `evaluate(checkpoint, step) -> {name: number}`, called as the
      loop says, in every process; runs outside of any jit.

  Returns:
    The trained model, ready to encode, save and index; and how the loop ended.

  Raises:
    ValueError: for settings that do not fit each other or what is prepared.
    NonFiniteError: if a loss or gradient is not finite.
  """
  if prepared is None:
    prepared = prepare(run, progress=jax.process_index() == 0)
  checkpoint, frozen = prepared.checkpoint, prepared.frozen
  objective, text = run.objective, checkpoint.config
  if text_config(run, text) != text:
    raise ValueError(
      f"prepared must be of the texts of the run, {text_config(run, text)}, "
      f"got {text}"
    )
  key, head_key = jax.random.split(jax.random.key(run.seed))
  model = late_interaction.LateInteraction(
    checkpoint.encoder if frozen is None else frozen.upper,
    new_head(run, checkpoint, rngs=nnx.Rngs(head_key)),
  )
  rules = late_interaction.text_rules(text, checkpoint.tokenizer)
  pipeline = batches.build(
    prepared.data,
    checkpoint.tokenizer,
    text,
    batch_size=run.data.batch_size,
    num_negatives=run.data.num_negatives,
    seed=run.seed,
    bucket=min(run.data.bucket, text.document_length),
    words=_words if run.words is not None else None,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  if frozen is not None:
    pipeline = features.attach(pipeline, frozen.queries, frozen.documents)

  def finished(model):
    model = processes.whole(model)
    encoder = model.encoder
    if frozen is not None:
      encoder = bert.join(frozen.lower, encoder)
    return dataclasses.replace(
      checkpoint,
      encoder=encoder,
      head=model.head,
      method=methods.Method(
        objective.method,
        objective.clusters if objective.method == "crisp" else None,
      ),
      layout=None,  # not saved yet
      folder=None,
      sha256=None,
    )

  def evaluated(model, step):
    # Out of the loop's mesh: each process computes by itself.
    with jax.set_mesh(None):
      return evaluate(finished(model), step)

  trained = loop.train(
    model,
    late_interaction.make_loss(objective, rules),
    iter(pipeline.to_iter_dataset(_READING)),
    run.trainer,
    key=key,
    evaluate=None if evaluate is None else evaluated,
    mesh=run.mesh.make(),
  )
  return finished(trained.state.model), trained


def _with_bm25(found, config):
  # bm25s computes with jax when it is imported; `processes.initialize`, which
  # a program calls after its imports, must come before that.
  from tokjax.eval import bm25

  documents = [str(i) for i in range(len(found.document_texts))]
  queries = [str(i) for i in range(len(found.query_texts))]
  run = bm25.search(
    bm25.build(documents, found.document_texts),
    queries,
    found.query_texts,
    k=config.skip_top + 4 * config.num_negatives + 8,
  )
  return hard_negatives.mine(
    found,
    hard_negatives.from_run(run, queries, documents),
    num_negatives=config.num_negatives,
    skip_top=config.skip_top,
    seed=0,
  )


def _words(texts, tokenizer, *, length, marker):
  """The hash of the whole word of each token, 0 for special tokens."""
  checks.one_of((None,), marker=marker)  # ColBERTer has none
  return [
    np.concatenate([[0], row.words]).astype(np.uint32)[row.slot]
    for row in whole_words.tokenize_words(texts, tokenizer, length=length)
  ]

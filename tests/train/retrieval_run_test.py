"""A retriever learns a tiny corpus by heart, whole or its upper part."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.cli.conftest import write_beir, write_model
from tests.compiled import run as call
from tokjax.data import batches
from tokjax.eval import runs
from tokjax.kernels import maxsim
from tokjax.models import bert, checkpoints, saving
from tokjax.retrieval import colbert, colberter, crisp, heads, losses
from tokjax.train import features, late_interaction, loop, retrieval_run
from tokjax.train.late_interaction import LateInteraction, Objective
from tokjax.train.optimizer import OptimizerConfig
from tokjax.train.retrieval_run import DataConfig, RetrievalRun


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp("run")
  beir = write_beir(folder / "beir")
  shutil.copy(f"{beir}/qrels/test.tsv", f"{beir}/qrels/train.tsv")
  return RetrievalRun(
    model=write_model(folder / "model"),
    document_length=8,
    query_length=4,
    head=heads.HeadConfig(input_dim=32, output_dim=16),
    data=DataConfig(dataset=beir, batch_size=8, bucket=8),
    trainer=loop.TrainConfig(
      num_steps=60,
      optimizer=OptimizerConfig(learning_rate=3e-3),
      log_every=0,
    ),
  )


def width(model_folder):
  return checkpoints.load(model_folder).encoder.config.width


def mean_reciprocal_rank(run, checkpoint):
  """Of the training queries, by exact MaxSim."""
  data = retrieval_run.load_data(run.data)
  parts = (
    checkpoint.tokenizer,
    checkpoint.encoder,
    checkpoint.head,
    checkpoint.config,
  )
  queries = colbert.encode_queries(data.query_texts, *parts)
  documents = colbert.encode_documents(
    data.document_texts, *parts, progress=False
  )
  found, qrels = {}, {}
  for i, (query, mask) in enumerate(
    zip(queries.tokens, queries.mask, strict=True)
  ):
    similarity = query[mask] @ documents.tokens.T
    scores = np.maximum.reduceat(similarity, documents.offsets[:-1], axis=1)
    found[str(i)] = {str(j): float(s) for j, s in enumerate(scores.sum(0))}
  for query, rows in zip(data.query_index, data.positives, strict=True):
    qrels[str(query)] = {str(row): 1 for row in rows}
  return runs.evaluate(found, qrels, ("MRR@10",))["MRR@10"]


@pytest.fixture(scope="module")
def learned(run):
  """Of a number of frozen layers: what was prepared, and what became of it."""

  @functools.cache
  def learn(frozen_layers):
    head = dataclasses.replace(run.head, input_dim=width(run.model))
    trainer = dataclasses.replace(run.trainer, evaluate_every=1)
    whole = dataclasses.replace(
      run, frozen_layers=frozen_layers, head=head, trainer=trainer
    )
    prepared = retrieval_run.prepare(whole, progress=False)
    quality = []

    def evaluate(checkpoint, step):
      if step in (1, 60):
        quality.append(mean_reciprocal_rank(run, checkpoint))
      return {}

    done, trained = retrieval_run.train(whole, prepared, evaluate=evaluate)
    return prepared, done, trained, quality

  return learn


@pytest.mark.parametrize("frozen_layers", [0, 1])
def test_learns_its_training_queries(learned, frozen_layers):
  _, _, trained, (before, after) = learned(frozen_layers)
  assert after > before and after > 0.85
  assert int(trained.state.step) == 60 and not trained.preempted


def test_frozen_blocks_stay_as_they_were(learned):
  prepared, done, trained, _ = learned(1)
  before, after = prepared.checkpoint.encoder, done.encoder
  np.testing.assert_array_equal(
    after.words.embedding[...], before.words.embedding[...]
  )
  after_blocks, before_blocks = jax.device_get((after.blocks, before.blocks))
  for new, old in zip(
    jax.tree.leaves(after_blocks), jax.tree.leaves(before_blocks), strict=True
  ):
    np.testing.assert_array_equal(new[0], old[0])
  assert not np.array_equal(
    after_blocks.up.kernel[...][1], before_blocks.up.kernel[...][1]
  )
  # The stored hidden states give the token vectors of the whole encoder.
  packed = features.encode(prepared.frozen.documents, trained.state.model)
  want = colbert.encode_documents(
    prepared.data.document_texts, done.tokenizer, done.encoder, done.head,
    done.config, progress=False,
  )  # fmt: skip
  np.testing.assert_array_equal(packed.offsets, want.offsets)
  np.testing.assert_allclose(packed.tokens, want.tokens, atol=5e-3)
  np.testing.assert_allclose(packed.pooled, want.pooled, atol=5e-3)


@pytest.mark.parametrize("method", ["xtr", "crisp", "colberter"])
def test_every_method_trains(run, method):
  size = width(run.model)
  clusters = crisp.CrispConfig(query_clusters=2, document_clusters=3)
  run = dataclasses.replace(
    run,
    objective=Objective(method=method, clusters=clusters, k_train=20),
    head=dataclasses.replace(run.head, input_dim=size),
    trainer=dataclasses.replace(run.trainer, num_steps=3),
  )
  if method == "colberter":
    words = colberter.ColberterConfig(
      hidden_dim=size, cls_dim=8, token_dim=4, exact_match=True
    )
    with pytest.raises(ValueError, match="words must be given"):
      retrieval_run.train(run)
    run = dataclasses.replace(run, words=words, head=None)
  done, trained = retrieval_run.train(run)
  assert bool(trained.state.finite) and int(trained.state.step) == 3
  if method == "colberter":
    assert isinstance(done.head, colberter.ColberterHead)


def test_evaluation_gets_a_whole_checkpoint(run):
  head = dataclasses.replace(run.head, input_dim=width(run.model))
  trainer = dataclasses.replace(run.trainer, num_steps=4, evaluate_every=2)
  run = dataclasses.replace(run, frozen_layers=1, head=head, trainer=trainer)
  seen = []

  def evaluate(checkpoint, step):
    seen.append((step, checkpoint.encoder.config.num_layers))
    return {"MRR@10": mean_reciprocal_rank(run, checkpoint)}

  _, trained = retrieval_run.train(run, evaluate=evaluate)
  assert seen == [(2, 2), (4, 2)] and 0 < trained.metrics["MRR@10"] <= 1


def test_bm25_finds_negatives(run):
  data = retrieval_run.load_data(
    dataclasses.replace(run.data, mine="bm25", num_negatives=2)
  )
  for good, bad in zip(data.positives, data.negatives, strict=True):
    assert len(bad) == 2 and not set(good) & set(bad)


def test_freezing_needs_queries_without_masks(run):
  prepared = retrieval_run.prepare(run, progress=False)
  config = dataclasses.replace(prepared.checkpoint.config, expand_queries=True)
  other = dataclasses.replace(prepared.checkpoint, config=config)
  with pytest.raises(ValueError, match="expand_queries=False"):
    retrieval_run.freeze(other, prepared.data, 1, progress=False)


def test_features_are_hidden_states_of_the_lower_blocks(run):
  prepared = retrieval_run.prepare(run, progress=False)
  lower, upper = call(bert.split, prepared.checkpoint.encoder, 1)
  texts = prepared.data.document_texts[:3]
  found = features.compute(
    texts, prepared.checkpoint.tokenizer, lower, length=8, progress=False
  )
  rows = colbert.tokenize(texts, prepared.checkpoint.tokenizer, length=8)
  for i, row in enumerate(rows):
    own = found.hidden[found.offsets[i] : found.offsets[i + 1]]
    want = call(
      bert.Bert.__call__, lower, np.array([row]), np.ones((1, len(row)), bool)
    )[0]
    np.testing.assert_allclose(own, want, atol=2e-3)
  data = dataclasses.replace(
    prepared.data, document_texts=texts, query_index=[0], positives=[[2]],
    negatives=[[]],
  )  # fmt: skip
  pipeline = batches.build(
    data, prepared.checkpoint.tokenizer, prepared.checkpoint.config,
    batch_size=1, seed=0, bucket=8,
  )  # fmt: skip
  batch = features.attach(pipeline, found, found)[0]
  last = found.hidden[found.offsets[2] : found.offsets[3]]
  np.testing.assert_array_equal(
    batch["document_hidden"][0, 0, : len(last)], last
  )
  assert not batch["document_hidden"][0, 0, len(last) :].any()
  model = LateInteraction(upper, heads.Projection([]))
  assert features.encode(found, model).tokens.shape[1] == lower.config.width


def test_heads_that_are_trained(run):
  checkpoint = retrieval_run.prepare(run, progress=False).checkpoint
  size = checkpoint.encoder.config.width
  rngs = nnx.Rngs(0)
  plain = dataclasses.replace(run, head=None)
  kept = retrieval_run.new_head(plain, checkpoint, rngs=rngs)
  assert len(kept.layers) == 0
  made = dataclasses.replace(run, head=heads.HeadConfig(size, 5))
  head = retrieval_run.new_head(made, checkpoint, rngs=rngs)
  assert head(jnp.ones((1, size))).shape == (1, 5)
  words = dataclasses.replace(
    plain,
    objective=Objective(method="colberter"),
    words=colberter.ColberterConfig(hidden_dim=size + 1),
  )
  with pytest.raises(ValueError, match="words_hidden_dim=.*encoder_width="):
    retrieval_run.new_head(words, checkpoint, rngs=rngs)


MARKED = dict(
  query_length=6, query_marker="wing", document_marker="heat",
  expand_queries=True,
)  # fmt: skip


@pytest.mark.parametrize("attend", [False, True])
def test_markers_and_masks_are_those_of_the_saved_model(run, tmp_path, attend):
  """What training compared is what the saved model encodes."""
  run = dataclasses.replace(
    run,
    head=dataclasses.replace(run.head, input_dim=width(run.model)),
    trainer=dataclasses.replace(run.trainer, num_steps=2),
    attend_to_expansion=attend,
    **MARKED,
  )
  prepared = retrieval_run.prepare(run, progress=False)
  done, trained = retrieval_run.train(run, prepared)
  saving.save(tmp_path / "saved", done)
  saved = checkpoints.load(str(tmp_path / "saved"))
  assert saved.config == prepared.checkpoint.config
  assert saved.config.query_marker == "wing" and saved.config.expand_queries
  parts = (saved.tokenizer, saved.encoder, saved.head, saved.config)
  queries = colbert.encode_queries(prepared.data.query_texts, *parts)
  documents = colbert.encode_documents(
    prepared.data.document_texts, *parts, progress=False
  )
  assert queries.mask.all() and queries.mask.shape[1] == 6
  lengths = np.diff(documents.offsets)
  mask = np.arange(lengths.max()) < lengths[:, None]
  tokens = np.zeros((*mask.shape, documents.tokens.shape[1]), np.float32)
  tokens[mask] = documents.tokens
  scores = np.asarray(call(maxsim.maxsim, queries.tokens, tokens, None, mask))
  pipeline = batches.build(
    prepared.data, saved.tokenizer, saved.config, batch_size=8, seed=0, bucket=8
  )
  batch = pipeline[0]
  columns = batch["document_index"].reshape(-1)
  want = call(
    losses.in_batch_cross_entropy,
    scores[batch["query_index"]][:, columns],
    ~batch["false_negative"],
  )
  rules = late_interaction.text_rules(saved.config, saved.tokenizer)
  loss_fn = jax.jit(late_interaction.make_loss(run.objective, rules))
  got, _ = loss_fn(trained.state.model, batch, None)
  np.testing.assert_allclose(got, want, rtol=1e-4)
  plain = dataclasses.replace(saved.config, expand_queries=False)
  rules = late_interaction.text_rules(plain, saved.tokenizer)
  other = jax.jit(late_interaction.make_loss(run.objective, rules))
  assert abs(other(trained.state.model, batch, None)[0] - want) > 1e-3


def test_texts_are_read_as_the_run_says():
  config = colbert.ColbertConfig()
  assert retrieval_run.text_config(RetrievalRun(), config) == config
  none = RetrievalRun(query_marker="", document_marker="", expand_queries=False)
  found = retrieval_run.text_config(none, config)
  assert (found.query_marker, found.document_marker) == (None, None)
  assert not found.expand_queries and found.skip_words == config.skip_words
  words = dataclasses.replace(none, objective=Objective(method="colberter"))
  with pytest.raises(ValueError, match="document_marker must be None for"):
    retrieval_run.text_config(words, config)


def test_what_was_prepared_is_of_the_texts_of_the_run(run):
  prepared = retrieval_run.prepare(run, progress=False)
  other = dataclasses.replace(run, query_marker="wing")
  with pytest.raises(ValueError, match="prepared must be of the texts of the"):
    retrieval_run.train(other, prepared)
  unknown = dataclasses.replace(run, query_marker="[Q]")
  with pytest.raises(ValueError, match="'\\[Q\\]' is not in the vocabulary"):
    retrieval_run.train(unknown)


def test_head_and_lengths_are_of_the_checkpoint_where_the_run_names_none(run):
  kept = heads.from_matrix(jnp.eye(width(run.model)))
  start = dataclasses.replace(checkpoints.load(run.model), head=kept)
  rngs = nnx.Rngs(0)
  bare = dataclasses.replace(run, head=None, query_length=None)
  assert retrieval_run.new_head(bare, start, rngs=rngs) is kept
  new = retrieval_run.new_head(run, start, rngs=rngs)
  assert new.layers[0].kernel.shape == (32, 16)
  text = retrieval_run.text_config(bare, start.config)
  assert text.query_length == start.config.query_length
  assert text.document_length == 8

"""The ranking that is measured while training is that of a plain loop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.cli.conftest import beir, model  # noqa: F401
from tokjax.data import beir as beir_files
from tokjax.eval import runs
from tokjax.models import checkpoints
from tokjax.retrieval import (
  colbert,
  colberter,
  colberter_texts,
  crisp,
  heads,
  methods,
)
from tokjax.train import ranking_evaluation

CLUSTERS = crisp.CrispConfig(query_clusters=2, document_clusters=2)
METHODS = {
  "colbert": methods.Method(),
  "crisp": methods.Method("crisp", CLUSTERS),
  "xtr": methods.Method("xtr", k_prime=10_000),
  "colberter": methods.Method("colberter"),
  "exact match": methods.Method("colberter"),
}


@pytest.fixture
def dataset(beir):  # noqa: F811
  return beir_files.load(beir, "test")


def checkpoint_of(folder, name):
  found = checkpoints.load(folder)
  width = found.encoder.config.width
  head = heads.ProjectionHead(heads.HeadConfig(width, 6), rngs=nnx.Rngs(0))
  if METHODS[name].name == "colberter":
    config = colberter.ColberterConfig(
      hidden_dim=width, cls_dim=4, token_dim=4, query_length=8,
      document_length=8, exact_match=name == "exact match",
    )  # fmt: skip
    head = colberter.ColberterHead(config, rngs=nnx.Rngs(0))
  return dataclasses.replace(found, head=head, method=METHODS[name])


def scores_of(dataset, checkpoint):
  """Every document, one query after the other."""
  parts = (checkpoint.tokenizer, checkpoint.encoder, checkpoint.head)
  same = None
  if checkpoint.method.name == "colberter":
    documents, ids = colberter_texts.encode_documents(
      dataset.document_texts, *parts, progress=False
    )
    queries, query_ids = colberter_texts.encode_queries(
      dataset.query_texts, *parts
    )
    if checkpoint.head.config.exact_match:
      same = query_ids[..., None] == ids
  else:
    config = checkpoint.config
    documents = methods.reduce_documents(
      colbert.encode_documents(
        dataset.document_texts, *parts, config, progress=False
      ),
      checkpoint.method,
    )
    queries = colbert.encode_queries(dataset.query_texts, *parts, config)
    if checkpoint.method.name == "crisp":
      arrays = (jnp.asarray(x) for x in queries[:2])
      found = crisp.cluster_queries(*arrays, CLUSTERS)
      queries = queries._replace(tokens=found.means, mask=found.mask)
  starts = documents.offsets[:-1]
  rows = []
  arrays = map(np.asarray, queries[:2])
  for i, (tokens, mask) in enumerate(zip(*arrays, strict=True)):
    similarity = tokens[mask] @ documents.tokens.T
    if same is not None:
      similarity = np.where(same[i][mask], similarity, 0)
    best = np.maximum.reduceat(similarity, starts, axis=1).sum(axis=0)
    rows.append(best / (mask.sum() if checkpoint.method.name == "xtr" else 1))
  rows = np.stack(rows)
  if checkpoint.method.name == "colberter":
    share = jax.nn.sigmoid(checkpoint.head.fusion[...])
    rows = share * (queries.pooled @ documents.pooled.T) + (1 - share) * rows
  return np.asarray(rows)


@pytest.mark.parametrize("name", METHODS)
def test_metrics_are_those_of_a_loop(dataset, model, name):  # noqa: F811
  checkpoint = checkpoint_of(model, name)
  metrics = ("nDCG@3", "MRR@10")
  evaluate = ranking_evaluation.evaluator(dataset, metrics=metrics, k=12)
  got = evaluate(checkpoint, 7)
  scores = scores_of(dataset, checkpoint)
  ids = dataset.document_ids
  run = {
    query: dict(zip(ids, map(float, row), strict=True))
    for query, row in zip(dataset.query_ids, scores, strict=True)
  }
  want = runs.evaluate(run, dataset.qrels, metrics)
  assert set(got) == set(metrics) and 0 < want["MRR@10"] < 1
  for key in metrics:
    assert got[key] == pytest.approx(want[key], abs=1e-6)


@pytest.mark.unchecked
def test_what_cannot_be_measured_is_said_before_training(dataset):
  with pytest.raises(ValueError, match="metrics must be of the form"):
    ranking_evaluation.evaluator(dataset, metrics=("nDCG",))
  nothing = dataclasses.replace(dataset, qrels={})
  with pytest.raises(ValueError, match="qrels judge no query"):
    ranking_evaluation.evaluator(nothing)

"""Queries and keys of a tiny encoder, and choices set to one share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.compiled import run
from tokjax.benchmarks import encoder_attention
from tokjax.benchmarks.encoder_attention import EncoderAttentionRun
from tokjax.benchmarks.trained_vit import Row
from tokjax.cli import claim
from tokjax.models import bert, checkpoints
from tokjax.models.bert import Bert, BertConfig

CONFIG = BertConfig(
  vocab_size=20, width=8, num_layers=2, num_heads=2, mlp_width=8,
  max_positions=128, init_scale=1.0,
)  # fmt: skip


def encoder():
  return jax.jit(lambda: Bert(CONFIG, rngs=nnx.Rngs(0)))()


def test_queries_and_keys_are_those_the_blocks_attend_with(monkeypatch):
  model = encoder()
  ids = jax.random.randint(jax.random.key(0), (2, 5), 0, 20)
  q, k = run(encoder_attention.queries_and_keys, model, ids)
  attend = bert.attend

  def attended(model, ids, number):
    seen = []

    def spy(q, k, v, *args, **kwargs):
      seen.append([jnp.swapaxes(x, 1, 2) for x in (q, k)])
      return attend(q, k, v, *args, **kwargs)

    lower, upper = bert.split(model, number)
    x = lower(ids)
    with monkeypatch.context() as patch:
      patch.setattr(bert, "attend", spy)
      jax.tree.map(lambda w: w[0], upper.blocks)(x, None)
    return seen

  for number in range(2):
    ((want_q, want_k),) = run(attended, model, ids, number)
    np.testing.assert_allclose(q[:, number], want_q, atol=1e-5)
    np.testing.assert_allclose(k[:, number], want_k, atol=1e-5)


def test_claim_of_a_tiny_run(monkeypatch):
  class Encoding:
    def __init__(self, text):
      self.ids = [ord(x) % 20 for x in text]

  class Read:
    encoder = encoder()

    class tokenizer:  # noqa: N801
      @staticmethod
      def encode_batch_fast(texts):
        return [Encoding(text) for text in texts]

  draw = np.random.default_rng(0)
  texts = ["".join(map(chr, draw.integers(65, 90, 200))) for _ in range(2)]

  class Documents:
    document_texts = ["short", *texts]

  monkeypatch.setattr(checkpoints, "load", lambda name: Read)
  monkeypatch.setattr(encoder_attention.beir, "load", lambda folder: Documents)
  found = claim.load("anchor_attention", "data")
  assert [x.kept for x in found.runs] == [0.2, 0.4]
  assert all(x == EncoderAttentionRun("data/scifact", x.kept)
             for x in found.runs)  # fmt: skip
  tiny = dataclasses.replace(
    found.runs[0], num_documents=2, num_tokens=128, step=1, kept=0.4
  )
  rows = found.measure(tiny, progress=False)
  names = ["anchor", "streaming", "block top-k", "vertical-slash"]
  assert list(rows) == names
  for row in rows.values():
    assert 0.3 < row.metrics["kept"] <= 0.401
    assert 0 < row.metrics["worst tenth"] <= row.metrics["recall"] <= 1
  best = max(rows[name].metrics["recall"] for name in names[1:])
  assert found.margin(rows) == rows["anchor"].metrics["recall"] - best
  with pytest.raises(ValueError, match="num_documents must lie in 0..2"):
    found.measure(dataclasses.replace(tiny, num_documents=3), progress=False)


def test_lead_is_over_the_best():
  recalls = {"anchor": 0.5, "streaming": 0.25, "block top-k": 0.75}
  rows = {name: Row({"recall": x}) for name, x in recalls.items()}
  assert encoder_attention.lead(rows) == -0.25

"""A tiny language model of bytes, and what is left out of its gates."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.compiled import run
from tokjax.benchmarks import gate_sparsity
from tokjax.benchmarks.gate_sparsity import ByteModel, GateRun
from tokjax.benchmarks.trained_vit import Row
from tokjax.cli import claim

TINY = GateRun(
  "", width=8, num_layers=2, num_heads=2, num_tokens=12, batch_size=8,
  num_steps=2, tuning_steps=1, num_calibration=8, num_test=8,
)  # fmt: skip


def test_largest_keeps_so_many_of_each_token():
  x = np.random.default_rng(0).normal(size=(5, 3, 7)).astype(np.float32)
  got = run(gate_sparsity.largest, x, jnp.float32(3))
  gate = x / (1 + np.exp(-x))
  least = np.sort(np.abs(gate), axis=-1)[..., -3, None]
  np.testing.assert_allclose(
    got, np.where(np.abs(gate) >= least, gate, 0), rtol=1e-5
  )


def test_the_model_is_its_transformer_and_reads_no_later_byte():
  model = jax.jit(lambda: ByteModel(TINY, rngs=nnx.Rngs(0)))()
  ids = np.arange(24).reshape(2, 12)

  @jax.jit
  def both(model, ids):
    logits, _ = model(ids, lambda x, _: jax.nn.silu(x), jnp.zeros(2))
    x = model.table[...][ids] + model.positions[...][None]
    mask = jnp.tril(jnp.ones((12, 12), bool))
    return logits, model.head(model.blocks(x, mask=mask))

  logits, want = both(model, ids)
  np.testing.assert_allclose(logits, want, atol=1e-5)
  ids[:, -1] += 1
  again, _ = both(model, ids)
  np.testing.assert_array_equal(again[:, :-1], logits[:, :-1])
  assert np.abs(again[:, -1] - logits[:, -1]).max() > 0


def test_claim_of_a_tiny_run(tmp_path):
  (tmp_path / "qrels").mkdir()
  texts = [f"text number {i} is about {i * i} things" for i in range(40)]
  write = "\n".join(
    json.dumps({"_id": str(i), "title": "", "text": text})
    for i, text in enumerate(texts)
  )
  (tmp_path / "corpus.jsonl").write_text(write)
  (tmp_path / "queries.jsonl").write_text('{"_id": "0", "text": "number"}\n')
  (tmp_path / "qrels" / "test.tsv").write_text(
    "query-id\tcorpus-id\tscore\n0\t0\t1\n"
  )
  found = claim.load("cats", "data")
  (only,) = found.runs
  assert only == GateRun("data/scifact")
  tiny = dataclasses.replace(TINY, dataset=str(tmp_path), sparsities=(0.5,))
  rows = found.measure(tiny, progress=False)
  assert list(rows) == ["dense", "relu", "relu tuned", "cats 0.5", "top-k 0.5"]
  kept = {name: row.metrics["kept"] for name, row in rows.items()}
  assert kept["dense"] == pytest.approx(1, abs=0.01)
  assert kept["top-k 0.5"] == pytest.approx(0.5)
  assert kept["cats 0.5"] == pytest.approx(0.5, abs=0.1)
  losses = [row.metrics["loss"] for row in rows.values()]
  assert len(set(losses)) == 5 and 4 < min(losses) and max(losses) < 7
  assert found.margin(rows) <= 0.03


def test_lead_is_the_least_of_all():
  losses = {
    "dense": 2.0, "relu": 3.0, "relu tuned": 2.1, "cats 0.5": 2.0,
    "top-k 0.5": 2.5, "cats 0.9": 4.0, "top-k 0.9": 3.0,
  }  # fmt: skip
  rows = {name: Row({"loss": loss}) for name, loss in losses.items()}
  assert gate_sparsity.lead(rows, most=0.02) == -0.5
  del rows["cats 0.9"], rows["top-k 0.9"]
  assert gate_sparsity.lead(rows, most=0.02) == 0.02
  assert gate_sparsity.lead(rows, most=0.5) == 0.25

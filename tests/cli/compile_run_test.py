"""Programs for slices: what is compiled is what would run.

The shapes are compared with real batches, models and indexes; the CPU compiler
stands in for the others. Tests marked compile_tpu and compile_gpu run those,
in child processes, as their settings must stand in the environment before jax
starts.
"""

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.cli import compile as command
from tokjax.cli import compile_fit, compile_run, compile_search
from tokjax.parallel import data_sheets, topologies
from tokjax.retrieval import codecs, colberter, heads, muvera, token_index
from tokjax.train import loop, retrieval_run
from tokjax.train.late_interaction import Objective
from tokjax.train.optimizer import OptimizerConfig
from tokjax.train.retrieval_run import DataConfig, RetrievalRun

CONFIG = """
from tokjax.retrieval.heads import HeadConfig
from tokjax.train.late_interaction import Objective
from tokjax.train.loop import TrainConfig
from tokjax.train.retrieval_run import DataConfig, RetrievalRun

def get_config(arg=""):
  return RetrievalRun(
    model={model!r}, document_length={length}, query_length=32,
    objective=Objective(method="colbert"),
    head=HeadConfig(input_dim={width}, output_dim=128),
    data=DataConfig(dataset="triples.json", batch_size=64, num_negatives=1),
    trainer=TrainConfig(num_steps=9, compute_dtype="bfloat16"),
  )
"""


@pytest.fixture
def run(beir, model):
  folder = f"{beir}/qrels"
  shutil.copy(f"{folder}/test.tsv", f"{folder}/train.tsv")
  size = json.loads(open(f"{model}/config.json").read())["hidden_size"]
  return RetrievalRun(
    model=model,
    document_length=8,
    query_length=4,
    head=heads.HeadConfig(input_dim=size, output_dim=16),
    data=DataConfig(dataset=beir, batch_size=8, bucket=8),
    trainer=loop.TrainConfig(4, OptimizerConfig(), log_every=0),
  )


def shapes(tree):
  return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def really_trained(run, monkeypatch):
  """The model and the first batch that the training loop is given."""
  seen = {}

  def train(model, loss_fn, batches, config, **rest):
    seen.update(model=model, batch=next(batches))
    return loop.Trained(loop.steps.TrainState(0, model, 0, 0, 0), False, {})

  monkeypatch.setattr(loop, "train", train)
  retrieval_run.train(run)
  return seen


@pytest.mark.parametrize("kind", ["colbert", "frozen", "colberter"])
def test_step_is_of_the_model_and_batch_of_training(run, kind, monkeypatch):
  if kind == "frozen":
    run = dataclasses.replace(run, frozen_layers=1)
  if kind == "colberter":
    words = colberter.ColberterConfig(
      hidden_dim=run.head.input_dim, cls_dim=8, token_dim=4
    )
    run = dataclasses.replace(
      run, objective=Objective(method="colberter"), head=None, words=words
    )
  state, batch = compile_run.training_step(run, jax.devices()).args
  real = really_trained(run, monkeypatch)
  assert shapes(batch) == shapes(real["batch"])
  # As a tree and not a module: a module says nothing of its arrays.
  assert jax.tree.structure(state.model) == jax.tree.structure(real["model"])
  assert jax.tree.leaves(shapes(state.model)) == jax.tree.leaves(
    shapes(real["model"])
  )


def test_files_of_triples_bring_a_teacher(run):
  data = DataConfig(dataset="a/examples.json", batch_size=8, num_negatives=3)
  start = compile_run.abstract_checkpoint("x", encoder="bert-base-uncased")
  batch = compile_run.abstract_batch(
    dataclasses.replace(run, data=data), start.config, width=4
  )
  assert shapes(batch["teacher"]) == ((8, 4), jnp.float32)
  assert batch["false_negative"].shape == (8, 32)


def test_step_compiles_for_eight_cpu_devices(run, tmp_path):
  path = tmp_path / "tiny.py"
  path.write_text(
    CONFIG.format(model=run.model, length=8, width=run.head.input_dim)
  )
  (row,) = compile_run.rows(
    str(path),
    [
      "--config.data.batch_size=16",
      "--config.mesh.fsdp=2",
      "--config.query_length=8",
    ],
    topology="v5e:2x4",
    devices=jax.devices(),
  )
  assert row["state"] == "compiled" and row["program"] == "tiny"
  assert row["mesh"] == {"data": 4, "fsdp": 2, "tensor": 1}
  assert row["token_width"] == 128 and row["batch_size"] == 16
  assert {"all-gather", "all-reduce"} <= set(row["collectives"])
  assert row["total_bytes"] < row["memory_bytes"]
  # The state is given away, and its results take its place.
  assert 0.9 * row["output_bytes"] < row["alias_bytes"] <= row["output_bytes"]
  text = compile_fit.line(row)
  assert "ms/step" in text and "all-gather x" in text
  with pytest.raises(ValueError, match="batch_size must be a multiple of 8"):
    next(
      compile_run.rows(
        str(path),
        ["--config.data.batch_size=12"],
        topology="v5e:2x4",
        devices=jax.devices(),
      )
    )


def test_masks_and_markers_need_no_checkpoint():
  run = RetrievalRun(
    model="google-bert/bert-base-uncased", query_length=32,
    query_marker="[unused0]", expand_queries=True,
    head=heads.HeadConfig(input_dim=768, output_dim=128),
  )  # fmt: skip
  step = compile_run.training_step(run, jax.devices()[:1])
  assert step.args[1]["query_ids"].shape == (32, 32)


def test_work_of_a_step_is_that_of_the_formula(run):
  run = dataclasses.replace(
    run,
    query_length=32,
    document_length=180,
    head=heads.HeadConfig(input_dim=768, output_dim=128),
    data=DataConfig(batch_size=16, num_negatives=1),
  )
  devices = jax.devices()[:2]
  step = compile_run.training_step(run, devices, encoder="bert-base-uncased")
  # On each device 8 queries and 16 documents, 12 layers, thrice the forward.
  layer = lambda length: 8 * 768**2 + 4 * 768 * 3072 + 4 * length * 768  # noqa: E731
  encoder = 12 * (8 * 32 * layer(32) + 16 * 180 * layer(180))
  scores = 2 * (8 * 32) * (32 * 180) * 128
  assert step.work["flops"] == 3 * (encoder + 6 * scores)
  # Half of the documents come in, and half of the gradients go back.
  parameters = sum(x.size for x in jax.tree.leaves(step.args[0].model))
  assert parameters == pytest.approx(109e6, rel=0.01)
  assert step.work["link_bytes"] == 4 * (parameters + 32 * 180 * 128)
  assert step.work["memory_bytes"] == pytest.approx(2 * 12 * parameters)
  again = dataclasses.replace(
    run, objective=Objective(remat_encoder="dots_saveable")
  )
  step = compile_run.training_step(again, devices, encoder="bert-base-uncased")
  assert step.work["flops"] == 4 * encoder + 3 * 6 * scores


def test_checkpoint_that_is_not_here_has_a_public_shape():
  found = compile_run.abstract_checkpoint("google-bert/bert-base-uncased")
  assert found.encoder.config.num_layers == 12 and found.head is None
  assert found.encoder.blocks.up.kernel.shape == (12, 768, 3072)
  with pytest.raises(ValueError, match="--encoder, one of all-MiniLM-L6-v2"):
    compile_run.abstract_checkpoint("nobody/nothing")
  with pytest.raises(ValueError, match="encoder must be one of"):
    compile_run.abstract_checkpoint("nobody/nothing", encoder="nothing")


FDE = muvera.FDEConfig(
  dim=8, num_simhash_bits=2, num_repetitions=3, projection_dim=4
)


def real_index(codec, mode, sizes, num_tokens):
  """Stacked shards of documents of equal length; zeros, as shapes matter."""
  shards = []
  for size in sizes:
    candidates = {}
    if mode != "exact":
      width = FDE.output_dim if mode == "fde" else codec.dim
      extra = {}
      if mode == "fde":
        params = muvera.init(jax.random.key(0), FDE)
        extra = {"fde_params": params, "fde_config": FDE}
      candidates[mode] = token_index.store_vectors(
        np.zeros((size, width), np.float32), name="int8", **extra
      )
    tokens = np.zeros((size * num_tokens, codec.dim), np.float32)
    offsets = np.arange(size + 1) * num_tokens
    shards.append(
      token_index.build(tokens, offsets, codec, candidates=candidates)
    )
  return token_index.stack_shards(shards)


@pytest.mark.parametrize("mode", compile_search.MODES)
@pytest.mark.parametrize("codec", ["float32", "int8", "residual2"])
def test_abstract_index_is_that_of_stacked_shards(codec, mode):
  # 205 documents of 20 tokens: shards of unequal size, blocks of two pages.
  index, sizes = compile_search.abstract_index(
    205, 3, codec=codec, mode=mode, num_tokens=20, dim=8, fde=FDE
  )
  assert sizes == (69, 68, 68)
  real_codec = codecs.FloatCodec(dim=8)
  if codec == "int8":
    real_codec = codecs.Int8Codec(dim=8)
  if codec == "residual2":
    real_codec = codecs.ResidualCodec(
      jnp.zeros((codecs.num_residual_centroids(205 * 20), 8)),
      jnp.zeros(3), jnp.zeros(4), dim=8, num_bits=2,
    )  # fmt: skip
  want = real_index(real_codec, mode, sizes, 20)
  assert jax.tree.structure(index) == jax.tree.structure(want)
  assert jax.tree.leaves(shapes(index)) == jax.tree.leaves(shapes(want))


def test_searches_compile_for_eight_cpu_devices():
  count = 137_500  # documents on each device, as 8.8 million on 64
  found = list(
    compile_search.rows(
      8 * count, topology="v5e:2x4", devices=jax.devices(), codecs=["int8"]
    )
  )
  assert [row["program"] for row in found] == [
    "exact int8", "mean int8", "fde int8",
  ]  # fmt: skip
  assert {row["state"] for row in found} == {"compiled"}
  assert all(set(row["collectives"]) == {"all-reduce"} for row in found)
  exact, mean, fde = (row["argument_bytes"] for row in found)
  assert exact == pytest.approx(count * 80 * 132, rel=0.01)
  assert mean - exact == pytest.approx(count * 132, rel=0.01)
  assert fde - exact == pytest.approx(count * 10_244, rel=0.01)
  # Sixteen queries of 32 tokens share the reading; six passes a product.
  bounds = [row["bound_ms"] for row in found]
  assert bounds[0]["memory"] == pytest.approx(
    1e3 * count * 80 * 132 / 16 / 819e9
  )
  assert bounds[0]["arithmetic"] == pytest.approx(
    1e3 * 12 * count * 80 * 32 * 128 / 197e12
  )
  assert bounds[1]["arithmetic"] == pytest.approx(
    1e3 * 12 * (count * 128 + 256 * 80 * 32 * 128) / 197e12
  )
  assert bounds[2]["memory"] == pytest.approx(
    1e3 * (count * 10_244 / 16 + 256 * 80 * 132) / 819e9
  )
  assert "ms/query (arithmetic)" in compile_fit.line(found[0])


def test_errors_name_codec_and_sizes():
  with pytest.raises(ValueError, match="codec must be one of"):
    compile_search.abstract_index(9, 3, codec="int7", mode="exact")
  with pytest.raises(ValueError, match="num_documents must lie in 3"):
    compile_search.abstract_index(2, 3, codec="int8", mode="exact")


def test_what_is_too_large_does_not_fit():
  sheet = data_sheets.find("v5e:2x2")
  row = compile_fit.compile_row(
    lambda x: x + 1,
    [jax.ShapeDtypeStruct((5_000_000_000,), jnp.float32)],
    topology="v5e:2x2",
    devices=jax.devices()[:1],
    bound=data_sheets.bound(sheet, flops=0, memory_bytes=819e9),
    unit="step",
    program="add",
  )
  assert row["state"] == "does not fit: 40.00 of 16.91 GB"
  assert row["bound_ms"] == {"arithmetic": 0, "memory": 1000, "links": 0}
  assert compile_fit.line(row).endswith(row["state"])


@pytest.mark.parametrize("words, message", [
  (["configs/x.py"], "--topology must be given"),
  (["configs/x.py", "--search", "9"], "give one of"),
  (["--search", "9", "--topology", "v5e:2x2", "--dim", "8"], "--dim is for"),
  (["--batch-size", "9"], "--batch-size is for"),
  (["--nonsense"], "unknown words: --nonsense"),
])  # fmt: skip
def test_words_that_do_not_fit_together(words, message, capsys):
  with pytest.raises(SystemExit) as stopped:
    command.main(words)
  assert stopped.value.code == 2
  assert message in capsys.readouterr().err


def needs(module):
  return pytest.mark.skipif(
    importlib.util.find_spec(module) is None,
    reason=f'{module} is not installed: pip install -e ".[aot]"',
  )


def compiled(*words, code=0):
  """Rows of `tokjax compile`, by program."""
  done = subprocess.run(
    [sys.executable, "-m", "tokjax.cli.main", "compile", "--json", *words],
    capture_output=True,
    text=True,
  )
  assert done.returncode == code, done.stdout + done.stderr
  rows = [json.loads(line) for line in done.stdout.splitlines()]
  return {row["program"]: row for row in rows}


@pytest.mark.slow
@pytest.mark.compile_tpu
@needs("libtpu")
def test_training_at_global_batch_4096_fits_256_chips():
  row = compiled("configs/colbert_msmarco.py", "--topology", "v5e:16x16")[
    "colbert_msmarco"
  ]
  assert row["state"] == "compiled" and row["devices"] == 256
  assert row["batch_size"] == 4096 and row["token_width"] == 128
  assert row["total_bytes"] < 16e9
  kernels = ("maxsim_forward", "maxsim_document_gradient",
             "maxsim_query_gradient")  # fmt: skip
  assert all(row["kernels"][name] == 1 for name in kernels)
  assert row["collectives"]["all-gather"] >= 1  # documents of all chips


SPLIT = """
from tokjax.parallel import meshes, topologies

devices = topologies.devices_of("v5p:4x4x4")
print(dict(meshes.make_mesh(fsdp=2, tensor=8, devices=devices).shape))
"""


@pytest.mark.compile_tpu
@needs("libtpu")
def test_an_axis_may_be_a_part_of_a_side_of_a_pod():
  done = subprocess.run(
    [sys.executable, "-c", SPLIT],
    env={**os.environ, **topologies.environment("tpu")},
    capture_output=True,
    text=True,
  )
  assert "{'data': 4, 'fsdp': 2, 'tensor': 8}" in done.stdout, done.stderr


TEXT = """
import json, sys
import jax
from tokjax.cli import compile_run, train
from tokjax.parallel import topologies

devices = topologies.devices_of("v5e:2x2")
step = compile_run.training_step(train.settings(sys.argv[1], []), devices)
with jax.set_mesh(step.mesh):
  report = topologies.compile_for(step.function, step.args, devices=devices)
lines = report.text.splitlines()
print(json.dumps([line for line in lines if "tpu_custom_call" in line]))
"""


@pytest.mark.compile_tpu
@needs("libtpu")
def test_kernel_of_the_step_takes_token_vectors_of_width_128(tmp_path):
  path = tmp_path / "tiny.py"
  path.write_text(CONFIG.format(model="all-MiniLM-L6-v2", length=96, width=384))
  done = subprocess.run(
    [sys.executable, "-c", TEXT, str(path)],
    env={
      **os.environ,
      **topologies.environment("tpu"),
      "HF_HUB_OFFLINE": "1",
      "JAX_DEFAULT_PRNG_IMPL": "rbg",  # dropout compiles in less time
    },
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  lines = json.loads(done.stdout)
  (forward,) = [line for line in lines if "%maxsim_forward" in line]
  # 16 queries of 32 tokens are one tile; 128 documents come from four chips.
  assert "bf16[1,1,512,128]" in forward and "bf16[128,96,128]" in forward


@pytest.mark.compile_tpu
@needs("libtpu")
def test_search_of_a_corpus_fits_64_chips_and_not_4():
  words = ("--search", "8800000", "--codec", "int8", "--topology")
  rows = compiled(*words, "v5e:8x8")
  assert {row["state"] for row in rows.values()} == {"compiled"}
  assert rows["exact int8"]["total_bytes"] < 1.6e9
  assert rows["fde int8"]["total_bytes"] < 3e9
  rows = compiled(*words, "v5e:2x2", code=1)
  assert all(row["state"].startswith("does not fit") for row in rows.values())


@pytest.mark.compile_gpu
@needs("jax_cuda13_plugin")
def test_search_and_step_compile_for_h100(tmp_path):
  rows = compiled(
    *("--search", "8800000", "--codec", "residual2"),
    *("--topology", "h100:8"),
  )
  assert {row["state"] for row in rows.values()} == {"compiled"}
  path = tmp_path / "tiny.py"
  path.write_text(CONFIG.format(model="all-MiniLM-L6-v2", length=96, width=384))
  row = compiled(str(path), "--topology", "h100:8")["tiny"]
  assert row["state"] == "compiled" and row["devices"] == 8

"""Several processes train as one does, and end together when one fails."""

import functools
import json
import pathlib
import re
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from tests import launch
from tests.cli.conftest import write_beir, write_model
from tests.train import tiny_retrieval
from tokjax.cli import main
from tokjax.models import checkpoints
from tokjax.parallel import meshes

NUM_STEPS = 6


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  folder = tmp_path_factory.mktemp("config")
  beir = write_beir(folder / "beir")
  shutil.copy(f"{beir}/qrels/test.tsv", f"{beir}/qrels/train.tsv")
  model = write_model(folder / "model")
  facts = pathlib.Path(model) / "config.json"
  said = json.loads(facts.read_text())
  said["hidden_dropout_prob"] = said["attention_probs_dropout_prob"] = 0.0
  facts.write_text(json.dumps(said))  # without dropout, half the compilation
  path = folder / "tiny.py"
  path.write_text(
    tiny_retrieval.CONFIG.format(
      model=model, beir=beir, width=said["hidden_size"]
    )
  )
  return path


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
  """Folder of the same run in this process, on as many devices."""
  devices = jax.devices()[: launch.NUM_DEVICES]
  mesh = functools.partial(meshes.make_mesh, devices=devices)
  folder = tmp_path_factory.mktemp("alone")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(meshes, "make_mesh", mesh)
    tiny_retrieval.run(config, folder)
  return folder


def tiny(config, folder, *options):
  """Starts `tiny_retrieval` as two processes."""
  name = "tests.train.tiny_retrieval"
  return launch.start(
    2,
    lambda port, i: ("-m", name, config, folder, port, 2, i, *options),
  )


def tokjax_train(config, folder, num_processes, *overrides):
  """Starts `tokjax train`."""
  return launch.start(
    num_processes,
    lambda port, i: (
      "-m", "tokjax.cli.main", "train", config, "--out", folder,
      "--coordinator", f"localhost:{port}", "--num-processes", num_processes,
      "--process-id", i, *overrides,
    ),
  )  # fmt: skip


def assert_same_run(got, want):
  """Equal losses of every step, and models that compute the same."""
  rows = [rows_of(folder) for folder in (got, want)]
  losses = [[x["loss"] for x in found if "loss" in x] for found in rows]
  assert len(losses[1]) == NUM_STEPS and min(losses[1]) < losses[1][0] - 0.1
  np.testing.assert_allclose(*losses, rtol=1e-5)
  # Not the parameters themselves: the bias of attention's keys has a gradient
  # of rounding errors, which Adam scales to whole steps.
  got, want = (
    tiny_retrieval.encode(checkpoints.load(str(folder / "model")))
    for folder in (got, want)
  )
  np.testing.assert_allclose(got, want, atol=1e-4)


def rows_of(folder):
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  steps = [row["step"] for row in rows if "loss" in row]
  assert steps == list(range(1, NUM_STEPS + 1))
  return rows


def test_two_processes_equal_one(config, alone, tmp_path):
  """Parameters are cut over devices of both."""
  out = tmp_path / "two"
  started = tiny(config, out, "--config.mesh.fsdp=4")
  ended = launch.outputs(started, timeout=200)
  assert [process.returncode for process in started] == [0, 0], ended
  assert_same_run(out, alone)
  (first, _), (second, _) = ended
  assert first.count("step 6/6  loss") == 1 and "step" not in second
  # Each has the whole model for itself.
  sums = [float(text.split("sum ")[-1]) for text in (first, second)]
  np.testing.assert_allclose(sums, rows_of(alone)[-1]["eval/sum"], rtol=1e-4)


def test_four_processes_equal_one(config, alone, tmp_path):
  out = tmp_path / "four"
  started = tokjax_train(config, out, 4, "--config.mesh.fsdp=2")
  ended = launch.outputs(started, timeout=200)
  assert [process.returncode for process in started] == [0] * 4, ended
  assert_same_run(out, alone)
  record = json.loads((out / "run.json").read_text())
  assert record["devices"][1] == launch.NUM_DEVICES
  said = [text.count(str(out / "model")) for text, _ in ended]
  assert said == [1, 0, 0, 0]  # the first speaks for all


def test_one_is_killed_the_other_ends_and_both_resume(config, alone, tmp_path):
  out = tmp_path / "run"
  first, second = started = tiny(config, out, "--kill_at=5")
  try:
    assert second.wait(timeout=200) == -signal.SIGKILL
    killed = time.monotonic()
  finally:
    (output, errors), _ = launch.outputs(started, timeout=60)
  assert time.monotonic() - killed < 30  # heartbeats stay away for 10 s
  assert first.returncode != 0
  # jax stops it, unless the closed connection is an error in Python before.
  assert re.search("another (task|one) died", errors)
  assert "step 5/6" in output and "step 6/6" not in output
  started = tokjax_train(config, out, 2)
  ended = launch.outputs(started, timeout=200)
  assert [process.returncode for process in started] == [0, 0], ended
  output = ended[0][0]
  assert "step 6/6" in output and "step 2/6" not in output
  assert_same_run(out, alone)


def test_the_place_of_a_process_is_given_whole_or_not_at_all(config, capsys):
  words = ["train", str(config), "--out", "unused", "--num-processes", "2"]
  assert main.main(words) == 2
  assert "missing coordinator, process_id" in capsys.readouterr().err

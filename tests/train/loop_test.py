"""The loop: it learns, resumes bit for bit, and stops in time."""

import collections.abc
import contextlib
import functools
import json
import logging
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from tests.train import tiny_run
from tokjax import checkpoint
from tokjax.parallel import meshes, rules
from tokjax.train import loop, optimizer, step


def assert_same_bits(got, want):
  """Every array of two states, key and moments included."""
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    if jnp.issubdtype(g.dtype, jax.dtypes.prng_key):
      g, w = jax.random.key_data(g), jax.random.key_data(w)
    np.testing.assert_array_equal(np.asarray(g), np.asarray(w))


@functools.cache
def whole(num_steps):
  """State at the end of a run that nothing interrupts."""
  return tiny_run.run(num_steps).state


def rows_of(folder):
  lines = (pathlib.Path(folder) / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


@contextlib.contextmanager
def program(*args, **environment):
  """The tiny run in a process of its own, killed at the latest here."""
  process = subprocess.Popen(
    [sys.executable, "-m", "tests.train.tiny_run", *map(str, args)],
    cwd=pathlib.Path(__file__).parents[2],
    env={**os.environ, **environment},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  try:
    yield process
  finally:
    process.kill()
    process.communicate()


def test_learns_and_writes_what_it_does(tmp_path, capsys):
  seen = []

  def evaluate(model, step):
    seen.append(step)
    return {
      "error": float(tiny_run.loss_fn(model, probe, jax.random.key(0))[0])
    }

  probe = next(tiny_run.batches())
  done = tiny_run.run(
    60, tmp_path, evaluate=evaluate, evaluate_every=25, log_every=20
  )
  assert seen == [25, 50, 60]
  rows = rows_of(tmp_path)
  assert [row["step"] for row in rows] == [20, 25, 40, 50, 60, 60]
  logged, evaluated = rows[0], rows[1]
  assert set(logged) == {
    "step", "loss", "worst", "grad_norm", "learning_rate", "steps_per_second",
    "seconds_left",
  }  # fmt: skip
  assert logged["learning_rate"] == pytest.approx(0.02)
  assert set(evaluated) == {"step", "eval/error"}
  assert done.metrics["error"] == rows[-1]["eval/error"] < 0.1
  assert evaluated["eval/error"] > 2 * done.metrics["error"]
  assert not done.preempted and int(done.state.step) == 60
  lines = capsys.readouterr().out.splitlines()
  assert re.fullmatch(
    r"step 20/60  loss \S+  grad_norm \S+  worst \S+  learning_rate 0\.02  "
    r"\S+/s  0:\d\d:\d\d left",
    lines[0],
  )
  assert lines[-1].startswith("step 60/60  eval/error ")


def test_called_again_it_goes_on_bit_for_bit(tmp_path):
  want = whole(8)
  first = tiny_run.run(3, tmp_path)
  assert int(first.state.step) == 3
  second = tiny_run.run(8, tmp_path)
  assert_same_bits(second.state, want)
  assert float(np.abs(first.state.model.up.kernel - want.model.up.kernel).max())
  # Nothing is left to do: the state of the end, no batch read.
  again = tiny_run.run(8, tmp_path, data=_NoBatches())
  assert_same_bits(again.state, want)
  with checkpoint.Checkpoints(tmp_path / "checkpoints") as saves:
    assert saves.restore(want).config["optimizer"]["weight_decay"] == 0.01


def test_buffers_and_averages_go_on_bit_for_bit(tmp_path):
  seen = []

  def loss_fn(model, buffers, batch, key):
    loss, metrics = tiny_run.loss_fn(model, batch, key)
    return loss, metrics, {"losses": buffers["losses"] * 0.5 + loss}

  def run(num_steps, folder=""):
    return loop.train(
      tiny_run.model(),
      loss_fn,
      tiny_run.batches(),
      tiny_run.config(num_steps, folder, average_decay=0.9),
      key=jax.random.key(1),
      buffers={"losses": np.float32(0)},
      evaluate=lambda model, buffers, step: seen.append((model, buffers)) or {},
    ).state

  want = run(4)
  model, buffers = seen.pop()
  assert_same_bits(model, want.average)
  assert_same_bits(buffers, want.buffers)
  assert float(jnp.abs(want.average.up.kernel - want.model.up.kernel).max()) > 0
  run(2, tmp_path)
  assert_same_bits(run(4, tmp_path), want)


class _NoBatches(collections.abc.Iterator):
  def set_state(self, state):
    assert state is not None

  def get_state(self):
    raise AssertionError("nothing is saved")

  def __next__(self):
    raise AssertionError("nothing is read")


def test_kill_minus_9_loses_nothing(tmp_path):
  """Killed one step after a save began; the rest runs here."""
  with program(tmp_path, "--kill_at", 7) as process:
    process.wait(timeout=120)
  assert process.returncode == -signal.SIGKILL
  with checkpoint.Checkpoints(tmp_path / "checkpoints") as saves:
    assert saves.latest_step() in (3, 6)
  got = tiny_run.run(11, tmp_path)
  assert_same_bits(got.state, whole(11))


def test_sigterm_saves_and_stops(tmp_path):
  with program(tmp_path) as process:
    for line in process.stdout:
      if line.startswith("step 5"):
        process.terminate()
        break
    rest, errors = process.communicate(timeout=120)
  assert process.returncode == 0, errors
  stopped, preempted = re.search(r"stopped at (\d+) (\w+)", rest).groups()
  stopped = int(stopped)
  assert stopped >= 5 and preempted == "True"
  with checkpoint.Checkpoints(tmp_path / "checkpoints") as saves:
    assert saves.latest_step() == stopped
  got = tiny_run.run(stopped + 2, tmp_path)
  assert_same_bits(got.state, whole(stopped + 2))


def test_two_processes_stop_together_and_resume(tmp_path):
  """A signal to one of two processes; both halves of the batch matter."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  folder = tmp_path / "run"
  with contextlib.ExitStack() as stack:
    processes = [
      stack.enter_context(
        program(folder, "--process", i, "--port", port, JAX_NUM_CPU_DEVICES="4")
      )
      for i in range(2)
    ]
    results = [process.communicate(timeout=240) for process in processes]
  for i, (output, errors) in enumerate(results):
    assert "stopped at 3 True" in output, errors
    assert "equal True" in output  # resumed run and uninterrupted one
    assert "shard (4, 4)" in output  # a quarter of [4, 16]
    assert f"nonfinite 2 nonfinite_step_2_process_{i}.npz (4, 4)" in output
  # One process opens what two have written, and would have computed the same.
  like = step.init_state(
    jax.random.key(0),
    tiny_run.model(),
    optimizer.make(tiny_run.config(8).optimizer, 8),
  )
  with checkpoint.Checkpoints(folder / "checkpoints") as saves:
    got = saves.restore(like).state
  want = whole(8)
  for g, w in zip(
    jax.tree.leaves(got.model), jax.tree.leaves(want.model), strict=True
  ):
    np.testing.assert_allclose(g, np.asarray(w), rtol=1e-5, atol=1e-6)
  with pytest.raises(ValueError, match="another number of processes"):
    tiny_run.run(9, folder)


def test_opens_on_meshes_of_other_sizes_with_equal_values(tmp_path):
  want = tiny_run.run(4, tmp_path, mesh=meshes.make_mesh(1, 8)).state
  for num_devices in (4, 1):
    devices = jax.devices()[:num_devices]
    mesh = meshes.make_mesh(1, num_devices, devices=devices)
    got = tiny_run.run(4, tmp_path, mesh=mesh).state
    assert_same_bits(got, want)
    kernel = got.model.up.kernel[...]
    assert kernel.sharding.device_set == set(devices)
    assert kernel.addressable_shards[0].data.shape == (4, 16 // num_devices)
  # Training goes on there, and agrees up to rounding.
  got = tiny_run.run(6, tmp_path, mesh=mesh).state
  want = whole(6)
  np.testing.assert_allclose(
    got.model.up.kernel[...], np.asarray(want.model.up.kernel), atol=1e-6
  )


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_rules_lay_out_the_whole_state(kind):
  table = [("up/kernel$", (None, "fsdp")), ("", ())]
  done = loop.train(
    tiny_run.model(),
    tiny_run.loss_fn,
    tiny_run.batches(),
    tiny_run.config(3),
    key=jax.random.key(1),
    mesh=meshes.make_mesh(2, 4, axis_types=kind),
    rules=table,
  )
  for path, x in jax.tree_util.tree_leaves_with_path(done.state):
    cut = rules.leaf_path(path).endswith("up/kernel")
    assert x.sharding.spec == (jax.P(None, "fsdp") if cut else jax.P())
  want = whole(3)
  np.testing.assert_allclose(
    done.state.model.up.kernel[...],
    np.asarray(want.model.up.kernel[...]),
    atol=1e-6,
  )


@pytest.mark.parametrize("save_every", [1, 100])
def test_nan_stops_with_the_batch_and_a_clean_checkpoint(tmp_path, save_every):
  data = tiny_run.Poisoned(tiny_run.batches(), 5)
  with pytest.raises(loop.NonFiniteError, match="at step 5; the batch is in"):
    tiny_run.run(20, tmp_path, data=data, save_every=save_every, log_every=1)
  path = tmp_path / "nonfinite_step_5_process_0.npz"
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    "checkpoints", "metrics.jsonl", path.name
  ]  # fmt: skip
  saved = np.load(path)
  clean = tiny_run.batches()
  for _ in range(5):
    next(clean)
  want = next(clean)
  np.testing.assert_array_equal(saved["batch/y"], want["y"])
  assert np.argwhere(np.isnan(saved["batch/x"])).tolist() == [[1, 2]]
  assert (int(saved["step"]), str(saved["key_impl"])) == (5, "threefry2x32")
  assert np.isnan(saved["loss"]) and np.isnan(saved["grad_norm"])
  np.testing.assert_array_equal(
    saved["key_data"], jax.random.key_data(jax.random.key(1))
  )
  assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4, 5]
  with checkpoint.Checkpoints(tmp_path / "checkpoints") as saves:
    assert saves.latest_step() == (5 if save_every == 1 else None)
  # With good data it goes on as if nothing had been.
  got = tiny_run.run(7, tmp_path)
  assert_same_bits(got.state, whole(7))


def test_nan_without_a_folder_names_a_temporary_file(tmp_path, monkeypatch):
  monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
  data = tiny_run.Poisoned(tiny_run.batches(), 2)
  with pytest.raises(loop.NonFiniteError) as error:
    tiny_run.run(3, data=data)  # in the last step: nothing follows it
  assert error.value.step == 2
  assert error.value.path.parent == tmp_path and error.value.path.is_file()


def test_compiles_the_step_once(tmp_path, caplog):
  with jax.log_compiles(), caplog.at_level(logging.WARNING):
    tiny_run.run(5, tmp_path, mesh=meshes.make_mesh(fsdp=2), save_every=2)
  compiled = [
    record.getMessage()
    for record in caplog.records
    if record.getMessage().startswith("Compiling jit(step)")
  ]
  assert len(compiled) == 1


def test_settings_reach_the_step():
  done = tiny_run.run(
    3, compute_dtype="bfloat16", num_microbatches=1, remat="dots_saveable"
  )
  for x in jax.tree.leaves(done.state.model):
    assert x.dtype == jnp.float32
  exact = whole(3).model.up.kernel[...]
  gap = np.abs(np.asarray(done.state.model.up.kernel[...]) - exact).max()
  assert 0 < gap < 0.01  # rounded, and near
  one = meshes.make_mesh(devices=jax.devices()[:1])
  split = tiny_run.run(3, num_microbatches=4, mesh=one)
  noisy = np.abs(np.asarray(split.state.model.up.kernel[...]) - exact).max()
  assert noisy > 1e-4  # each microbatch draws its own noise


def test_batches_that_end_are_an_error():
  data = iter([next(tiny_run.batches())] * 2)
  with pytest.raises(ValueError, match="batches ended after 2 of 3 steps"):
    tiny_run.run(3, data=data)


def test_saved_runs_need_an_iterator_with_a_state(tmp_path):
  with pytest.raises(TypeError, match="batches must have get_state"):
    tiny_run.run(3, tmp_path, data=iter([]))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"num_steps": 0}, "num_steps must lie in 1"),
    ({"compute_dtype": "float16"}, "compute_dtype must be one of 'float32'"),
    ({"remat": "all"}, "remat must be one of"),
    ({"agree_every": 0}, "agree_every must lie in 1"),
  ],
)
def test_bad_settings_are_named(changes, message):
  settings = {"num_steps": 3, **changes}
  with pytest.raises(ValueError, match=message):
    tiny_run.run(**settings)


def test_a_bucket_is_refused_before_anything_is_written(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match="folder must be a path in a file sys"):
    tiny_run.run(3, "gs://bucket/run")
  assert not list(tmp_path.iterdir())


def test_another_model_in_the_folder_is_an_error(tmp_path):
  tiny_run.run(2, tmp_path)
  with pytest.raises(ValueError, match="checkpoints/2 does not fit: lacks"):
    loop.train(
      {"w": np.zeros(4)},
      lambda model, batch, key: (optax.l2_loss(model["w"]).sum(), {}),
      tiny_run.batches(),
      tiny_run.config(3, tmp_path),
      key=jax.random.key(0),
    )

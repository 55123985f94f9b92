"""Writers of metrics: what stands in the files and on the terminal."""

import io
import json
import struct
import sys

import pytest

from tokjax.train import metrics


def test_progress_measures_between_reads():
  clock = iter([100.0, 104.0, 105.0]).__next__
  progress = metrics.Progress(10, 110, clock=clock)
  assert progress.read(30) == {"steps_per_second": 5.0, "seconds_left": 16.0}
  assert progress.read(40) == {"steps_per_second": 10.0, "seconds_left": 7.0}


def test_terminal_line():
  stream = io.StringIO()
  writer = metrics.Terminal(1000, stream=stream)
  writer.write(
    20,
    {
      "loss": 0.0123456,
      "grad_norm": 12.0,
      "steps_per_second": 4.25,
      "seconds_left": 3725.4,
    },
  )
  writer.write(1000, {"eval/ndcg": float("nan"), "seconds_left": float("inf")})
  writer.close()
  assert stream.getvalue() == (
    "step 20/1000  loss 0.01235  grad_norm 12  4.2/s  1:02:05 left\n"
    "step 1000/1000  eval/ndcg nan\n"
  )


def test_json_lines_one_row_a_call(tmp_path):
  path = tmp_path / "new" / "metrics.jsonl"
  writer = metrics.JsonLines(path)
  writer.write(1, {"loss": 0.5})
  # Readable while the run goes on.
  assert [json.loads(x) for x in path.read_text().splitlines()] == [
    {"step": 1, "loss": 0.5}
  ]
  writer.write(2, {"loss": float("inf"), "rate": float("nan")})
  writer.close()
  assert path.read_text().splitlines()[1] == (
    '{"step": 2, "loss": null, "rate": null}'
  )


def test_resumed_run_repeats_no_line(tmp_path):
  path = tmp_path / "metrics.jsonl"
  writer = metrics.JsonLines(path)
  for step in (1, 2, 3, 4):
    writer.write(step, {"loss": step / 10})
  writer.close()
  with path.open("a") as file:
    file.write('{"step": 5, "lo')  # killed here
  writer = metrics.JsonLines(path, resume_step=2)
  writer.write(3, {"loss": 0.0})
  writer.close()
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  assert [(row["step"], row["loss"]) for row in rows] == [
    (1, 0.1),
    (2, 0.2),
    (3, 0.0),
  ]
  assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def _events(folder):
  """The events of TensorBoard's files: (length, crc, data, crc) records."""
  from tensorboardX.proto import event_pb2

  for path in sorted(folder.iterdir()):
    data = path.read_bytes()
    while data:
      (length,) = struct.unpack("<Q", data[:8])
      yield event_pb2.Event.FromString(data[12 : 12 + length])
      data = data[16 + length :]


def test_tensorboard_scalars(tmp_path):
  pytest.importorskip("tensorboardX")
  writer = metrics.TensorBoard(tmp_path)
  writer.write(3, {"loss": 0.5, "eval/mrr": 0.25})
  writer.close()
  got = [
    (event.step, value.tag, value.simple_value)
    for event in _events(tmp_path)
    for value in event.summary.value
  ]
  assert got == [(3, "loss", 0.5), (3, "eval/mrr", 0.25)]
  metrics.TensorBoard(tmp_path / "again", resume_step=7).close()
  starts = [
    event.step
    for event in _events(tmp_path / "again")
    if event.HasField("session_log")
  ]
  assert starts == [8]  # hides steps from here on of files written before


def test_tensorboard_absent_says_what_to_install(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorboardX", None)
  with pytest.raises(ModuleNotFoundError, match="pip install tensorboardX"):
    metrics.TensorBoard(tmp_path)

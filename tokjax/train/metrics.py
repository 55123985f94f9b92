"""Where the numbers of a run go: terminal, JSON lines, TensorBoard.

A writer has `write(step, values)` and `close()`. Open them in the first
process only.
"""

import datetime
import io
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Mapping

from tokjax import files

__all__ = ["JsonLines", "Progress", "TensorBoard", "Terminal"]


class Progress:
  """Rate and remaining time of a run, measured between calls of `read`.

  Args:
    step: steps done so far.
    num_steps: steps of the whole run.
    clock: seconds, rising; replaced in tests.

  Example:
    >>> seconds = iter([0.0, 2.0])
    >>> progress = Progress(0, 100, clock=lambda: next(seconds))
    >>> progress.read(20)
    {'steps_per_second': 10.0, 'seconds_left': 8.0}
  """

  def __init__(self, step: int, num_steps: int, *, clock=time.monotonic):
    self._step, self._num_steps, self._clock = step, num_steps, clock
    self._time = clock()

  def read(self, step: int) -> dict[str, float]:
    """Numbers since the last call: the first includes the compilation."""
    now = self._clock()
    rate = (step - self._step) / max(now - self._time, 1e-9)
    self._step, self._time = step, now
    left = (self._num_steps - step) / rate if rate else math.inf
    return {"steps_per_second": rate, "seconds_left": left}


class Terminal:
  """One line a call: `step 20/100  loss 0.4312  ...  10.0/s  0:00:08 left`.

  Args:
    num_steps: steps of the whole run.
    stream: where to print; None for the standard output.

  Example:
    >>> Terminal(100, stream=sys.stdout).write(20, {"loss": 0.43121})
    step 20/100  loss 0.4312
  """

  def __init__(self, num_steps: int, *, stream: io.TextIOBase | None = None):
    self._num_steps, self._stream = num_steps, stream

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Prints the values with four digits, in the order given."""
    values = dict(values)
    rate = values.pop("steps_per_second", None)
    left = values.pop("seconds_left", None)
    parts = [f"step {step}/{self._num_steps}"]
    parts += [f"{name} {value:.4g}" for name, value in values.items()]
    if rate is not None:
      parts.append(f"{rate:.1f}/s")
    if left is not None and math.isfinite(left):
      parts.append(f"{datetime.timedelta(seconds=round(left))} left")
    print("  ".join(parts), file=self._stream or sys.stdout, flush=True)

  def close(self) -> None:
    """Nothing to close."""


class JsonLines:
  """One JSON object a line: `{"step": 20, "loss": 0.43}`.

  Numbers that are not finite are written as null. A run that resumes repeats
  the steps after its checkpoint; their old lines, and a line that a kill cut
  short, are removed first.

  Args:
    path: the file; made if missing.
    resume_step: lines of later steps are removed.
  """

  def __init__(self, path: str | os.PathLike, *, resume_step: int = 0):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
      kept = [
        x for x in path.read_text().splitlines() if _until(x, resume_step)
      ]
      with files.replacing(path) as aside:
        aside.write_text("".join(line + "\n" for line in kept))
    self._file = path.open("a", encoding="utf-8")

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Appends a line; a kill afterwards does not lose it."""
    row = {k: v if math.isfinite(v) else None for k, v in values.items()}
    self._file.write(json.dumps({"step": step, **row}) + "\n")
    self._file.flush()

  def close(self) -> None:
    """Closes the file."""
    self._file.close()


def _until(line, step):
  try:
    return json.loads(line)["step"] <= step
  except json.JSONDecodeError:
    return False


class TensorBoard:
  """Scalars in TensorBoard's event files, written by tensorboardX.

  Args:
    folder: of the event files.
    resume_step: TensorBoard hides what earlier runs wrote after this step.

  Raises:
    ModuleNotFoundError: if tensorboardX is not installed.
  """

  def __init__(self, folder: str | os.PathLike, *, resume_step: int = 0):
    try:
      import tensorboardX
    except ModuleNotFoundError as error:
      raise ModuleNotFoundError(
        "TensorBoard files are written by tensorboardX, which is not "
        "installed: pip install tensorboardX"
      ) from error
    self._writer = tensorboardX.SummaryWriter(
      os.fspath(folder), purge_step=resume_step + 1 if resume_step else None
    )

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Adds every value as a scalar of its name."""
    for name, value in values.items():
      self._writer.add_scalar(name, value, step)

  def close(self) -> None:
    """Writes what is held back and closes the file."""
    self._writer.close()

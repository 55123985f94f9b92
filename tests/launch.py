"""Starts the processes of a test and reads what they print.

started = start(2, lambda port, i: ("-m", "tests.train.tiny_run", port, i))
(first, errors), (second, _) = outputs(started, timeout=100)
"""

import os
import pathlib
import socket
import subprocess
import sys

__all__ = ["NUM_DEVICES", "outputs", "start"]

NUM_DEVICES = 4  # of all processes together


def start(num_processes, command):
  """Starts Python with the words `command(port, i)`, once for each process.

  Nobody listens at that port of localhost.
  """
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  environment = {
    **os.environ,
    "JAX_NUM_CPU_DEVICES": str(NUM_DEVICES // num_processes),
    "XLA_FLAGS": os.environ.get(
      "XLA_FLAGS", "--xla_backend_optimization_level=0"
    ),  # compiles faster
  }
  return [
    subprocess.Popen(
      [sys.executable, *map(str, command(port, i))],
      cwd=pathlib.Path(__file__).parents[1],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(num_processes)
  ]


def outputs(started, timeout):
  """What each printed to its two streams, once all have ended."""
  try:
    return [process.communicate(timeout=timeout) for process in started]
  finally:
    for process in started:
      process.kill()

"""Notice that the machine will be taken away, in time to save.

Clusters send SIGTERM before they take a machine back: some 30 seconds on a
preemptible TPU, as configured under Slurm and Kubernetes.
"""

import contextlib
import signal
import threading
import warnings
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from tokjax import checks

__all__ = ["watching"]


@contextlib.contextmanager
def watching(*, agree_every: int = 10) -> Iterator[Callable[[int], bool]]:
  """Catches SIGTERM inside the block, and says when to stop.

  A first signal is only noted; a second one ends the process as it would
  have without this. With several processes the signal may reach one of them
  only, at another step than the rest: they agree by asking each other at
  every `agree_every`-th step, a gather of one number that waits for the
  devices. All of them then stop at the same step.

  Args:
    agree_every: steps between two agreements of several processes. That many
      steps must take less time than the warning gives. A single process
      looks at every step.

  Yields:
    `stop(step)`, True when the run should save and stop after this step.
    With several processes all must call it with the same steps.

  Example:
    >>> import os
    >>> with watching() as stop:
    ...   before = stop(1)
    ...   os.kill(os.getpid(), signal.SIGTERM)
    ...   after = stop(2)
    >>> before, after
    (False, True)
  """
  checks.in_range(1, float("inf"), agree_every=agree_every)
  noted = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    # Python handles signals in the main thread only.
    warnings.warn("not in the main thread: SIGTERM will not be noticed")
    yield lambda step: _agree(noted.is_set(), step, agree_every)
    return
  previous = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL

  def note(number, frame):
    noted.set()
    signal.signal(signal.SIGTERM, previous)

  signal.signal(signal.SIGTERM, note)
  try:
    yield lambda step: _agree(noted.is_set(), step, agree_every)
  finally:
    signal.signal(signal.SIGTERM, previous)


def _agree(mine, step, agree_every):
  if jax.process_count() == 1:
    return mine
  if step % agree_every:
    return False
  return bool(np.any(multihost_utils.process_allgather(np.asarray(mine))))

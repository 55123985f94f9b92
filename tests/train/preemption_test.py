"""SIGTERM is noted once, and several processes stop at the same step."""

import os
import signal
import threading

import pytest

from tokjax.train import preemption


@pytest.fixture
def handler():
  """A handler of the program's own, which must come back."""
  calls = []
  previous = signal.signal(signal.SIGTERM, lambda *_: calls.append("own"))
  yield calls
  signal.signal(signal.SIGTERM, previous)


def test_first_signal_is_noted_and_the_second_goes_through(handler):
  with preemption.watching() as stop:
    assert [stop(step) for step in (1, 2)] == [False, False]
    os.kill(os.getpid(), signal.SIGTERM)
    assert [stop(step) for step in (3, 4)] == [True, True]
    assert handler == []
    os.kill(os.getpid(), signal.SIGTERM)
    assert handler == ["own"]


def test_handler_comes_back_after_the_block(handler):
  with pytest.raises(RuntimeError):
    with preemption.watching():
      raise RuntimeError
  os.kill(os.getpid(), signal.SIGTERM)
  assert handler == ["own"]


def test_other_threads_are_told(handler):
  warned = []

  def work():
    with pytest.warns(UserWarning, match="SIGTERM will not be noticed"):
      with preemption.watching() as stop:
        warned.append(stop(1))

  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert warned == [False]


def test_agree_every_must_be_positive():
  with pytest.raises(ValueError, match="agree_every must lie in 1"):
    with preemption.watching(agree_every=0):
      pass

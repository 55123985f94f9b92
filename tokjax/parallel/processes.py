"""Programs of several processes, each with some of the devices.

Every process runs the same program and calls `initialize` first. From then on
`jax.devices()` are those of all of them, a mesh spans them, and each process
reads its own rows of the data. A process alone needs none of this, and every
function here lets it pass.
"""

import atexit
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import NamedSharding

from tokjax import checks

__all__ = ["ending_together", "initialize", "whole"]


def initialize(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  start_timeout: int = 300,
  heartbeat_timeout: int = 100,
) -> None:
  """Joins this process with the others; returns when all are there.

  Must come before jax is asked for its devices. Processes on CPU talk over TCP
  (gloo, jax's default).

  None can go on alone: when one dies, jax aborts the others, after at most
  `heartbeat_timeout` seconds, with "Terminating process because the JAX
  distributed service detected fatal errors", the numbers of the dead and a
  stack trace. It does the same when not all come to the start. A process that
  hangs while its heart beats is not noticed.

  Args:
    coordinator: `host:port` of process 0, which will listen there. None, with
      the two below None as well, takes all three from the environment of a TPU
      pod, Slurm, Open MPI or Kubernetes.
    num_processes: how many there are.
    process_id: which one this is, from 0.
    start_timeout: seconds to wait for the others at the start.
    heartbeat_timeout: seconds after which a silent process counts as dead. At
      its exit a process waits so long for the others as well.

  Raises:
    ValueError: if some of the first three are given and some are not, or they
      are not in the environment.
    RuntimeError: if jax has been asked for its devices before.
  """
  given = {
    "coordinator": coordinator,
    "num_processes": num_processes,
    "process_id": process_id,
  }
  missing = [name for name, value in given.items() if value is None]
  if 0 < len(missing) < len(given):
    raise ValueError(
      f"{', '.join(given)} go together, missing {', '.join(missing)}"
    )
  if not missing:
    checks.in_range(0, num_processes - 1, process_id=process_id)
    if not coordinator.rpartition(":")[2].isdigit():
      raise ValueError(f"coordinator must be host:port, got {coordinator!r}")
  try:
    jax.distributed.initialize(
      *given.values(),
      initialization_timeout=start_timeout,
      heartbeat_timeout_seconds=heartbeat_timeout,
      shutdown_timeout_seconds=heartbeat_timeout,
    )
  except ValueError as error:
    raise ValueError(
      f"{', '.join(given)} are not all in the environment: {error}"
    ) from error
  jax.devices()  # waits for those of the other processes


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
  """Ends a process at once when the block fails, and so all of them.

  By itself a process that failed would wait at its exit for the others, which
  wait for its part of a computation. Here it leaves without waiting, and they
  end as `initialize` says. The error is raised as it would be anyway; when
  Python ends, standard error gets a line about the others and the exit code is
  1. A process alone only sees its error.

  Example:
    >>> with ending_together():
    ...   raise ValueError("rows do not divide")
    Traceback (most recent call last):
    ...
    ValueError: rows do not divide
  """
  try:
    yield
  except BaseException as error:
    if jax.process_count() > 1:
      # The last to be registered is the first to be called: jax, whose own
      # handler waits for the other processes, does not get to it.
      atexit.register(_leave, isinstance(error, jax.errors.JaxRuntimeError))
    raise


def whole(tree: Any) -> Any:
  """Makes arrays spread over several processes readable in each of them.

  All processes must call it with the same tree. One array at a time is
  gathered, over the devices that hold its parts.

  Args:
    tree: a pytree of `jax.Array`.

  Returns:
    The tree with every such array whole, on one device of this process. Arrays
    on devices of this process only stay as they are.

  Example:
    >>> whole({"w": jax.numpy.ones(2)})["w"]
    Array([1., 1.], dtype=float32)
  """

  def fetch(x):
    if x.is_fully_addressable:
      return x
    copied = NamedSharding(x.sharding.mesh, jax.P())
    return jax.device_put(x, copied).addressable_data(0)

  return jax.tree.map(fetch, tree)


def _leave(computing: bool) -> None:
  """Says what happens to the others, and ends without jax's farewell."""
  cause = ", probably because another one died" if computing else ""
  print(
    f"process {jax.process_index()} of {jax.process_count()} failed{cause}. "
    "The others are stopped; a run that was saved goes on when all of them "
    "are started again.",
    file=sys.stderr,
  )
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(1)

"""Checkpoints of a run: written whole or not at all, opened on any mesh.

A folder holds one numbered folder per saved step:

    <folder>/1200/arrays   every array of the state, by its path
    <folder>/1200/meta     JSON: iterator states, config, kinds of the keys

Orbax writes them; all of its calls in this library stand in this file.
"""

import base64
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from tokjax import checks
from tokjax.parallel import rules

__all__ = ["Checkpoints", "Restored"]

# What orbax raises for files that are missing, cut or not what they should be.
_READ_ERRORS = (AttributeError, KeyError, OSError, ValueError)


class Restored(NamedTuple):
  """What a checkpoint held.

  Attributes:
    step: under which it was saved.
    state: the arrays, in the tree that was asked for.
    iterator_state: of this process, as it was given.
    config: as it was given.
  """

  step: int
  state: Any
  iterator_state: Any
  config: dict[str, Any]


class Checkpoints:
  """The checkpoints of one folder; a context manager that closes itself.

  Under `jax.distributed` every process makes the same calls, on one shared
  file system.

  Args:
    folder: made if missing. What a killed run left half-written in it is
      never read, and is removed by the first save; so only one run at a time
      may save here, while others read.
    keep: how many checkpoints stay; older ones are deleted.

  Raises:
    ValueError: if `keep` is below 1.

  Example:
    >>> import tempfile
    >>> state = {"w": jax.numpy.ones(2)}
    >>> with Checkpoints(tempfile.mkdtemp()) as checkpoints:
    ...   checkpoints.save(7, state, iterator_state={"next_index": 56})
    ...   restored = checkpoints.restore(state)
    >>> restored.step, restored.iterator_state["next_index"]
    (7, 56)
  """

  def __init__(self, folder: str | os.PathLike, *, keep: int = 3):
    checks.in_range(1, float("inf"), keep=keep)
    self._folder = pathlib.Path(folder).absolute()
    self._manager = ocp.CheckpointManager(
      self._folder,
      item_handlers={
        "arrays": ocp.PyTreeCheckpointHandler(),
        "meta": ocp.JsonCheckpointHandler(),
      },
      options=ocp.CheckpointManagerOptions(max_to_keep=keep),
    )
    self._may_hold_halves = True

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *error) -> None:
    self._manager.close()  # after the last save is on disk

  def latest_step(self) -> int | None:
    """The newest checkpoint's step, once it is whole; None without any."""
    self.wait()  # orbax lists a checkpoint that is still being written
    return self._manager.latest_step()

  def wait(self) -> None:
    """Returns when the last save is on disk, and raises if it failed."""
    self._manager.wait_until_finished()

  def save(
    self,
    step: int,
    state: Any,
    *,
    iterator_state: Any = None,
    config: Mapping[str, Any] | None = None,
  ) -> None:
    """Saves in the background; returns when the arrays may be overwritten.

    Args:
      step: names the checkpoint; must be above the steps saved before.
      state: any pytree of `jax.Array`; PRNG keys are saved as their data.
      iterator_state: of this process's data iterator: bytes, or values that
        JSON can hold.
      config: values that JSON can hold.

    Raises:
      ValueError: if the step is there already.
    """
    if self._may_hold_halves and jax.process_index() == 0:
      for half in self._folder.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
        shutil.rmtree(half)
    self._may_hold_halves = False
    arrays, kinds = _flatten(state)
    meta = {
      "keys": kinds,
      "iterators": _of_all_processes(iterator_state),
      "config": dict(config or {}),
    }
    self._manager.save(
      step,
      args=ocp.args.Composite(
        arrays=ocp.args.PyTreeSave(arrays), meta=ocp.args.JsonSave(meta)
      ),
      force=True,
    )

  def restore(
    self, like: Any, *, step: int | None = None, partial: bool = False
  ) -> Restored:
    """Reads a checkpoint onto the devices that `like` names.

    The mesh may be another one than at the time of saving.

    Args:
      like: the tree to fill: arrays, or `jax.ShapeDtypeStruct` with a
        sharding (without one the result is a NumPy array).
      step: which checkpoint; None for the latest.
      partial: True leaves unread what the checkpoint has beside `like`, for
        instance the optimiser when only the model is wanted.

    Returns:
      The state in the tree of `like`, and what was saved beside it. The
      iterator's state is None when as many processes as saved are not there.

    Raises:
      FileNotFoundError: if there is no such checkpoint.
      ValueError: if the arrays are not those of `like`, or the checkpoint is
        damaged; the message names its folder. Without that folder the one
        before is the latest.
    """
    folder = self._find(step)
    number = int(folder.name)
    want, _ = _flatten(like, abstract=True)
    try:
      have = self._manager.item_metadata(number)["arrays"].tree
    except _READ_ERRORS as error:
      raise _unreadable(folder, error) from error
    _check_fit(folder, want, have, partial)
    try:
      items = self._manager.restore(
        number,
        args=ocp.args.Composite(
          arrays=ocp.args.PyTreeRestore(
            want,
            restore_args=ocp.checkpoint_utils.construct_restore_args(want),
            partial_restore=True,
          ),
          meta=ocp.args.JsonRestore(),
        ),
      )
      meta = items["meta"]
      state = _unflatten(like, items["arrays"], meta["keys"])
      iterator_state = _of_this_process(meta["iterators"])
      return Restored(number, state, iterator_state, meta["config"])
    except _READ_ERRORS as error:
      raise _unreadable(folder, error) from error

  def _find(self, step):
    self.wait()
    steps = self._manager.all_steps()
    if not steps:
      raise FileNotFoundError(f"{self._folder} holds no checkpoint")
    if step is not None and step not in steps:
      raise FileNotFoundError(
        f"{self._folder} has no checkpoint {step}, only {sorted(steps)}"
      )
    return self._folder / str(max(steps) if step is None else step)


def _unreadable(folder, error):
  return ValueError(
    f"checkpoint {folder} cannot be read: {type(error).__name__}: {error}"
  )


def _check_fit(folder, want, have, partial):
  lacks = sorted(set(want) - set(have))
  extra = [] if partial else sorted(set(have) - set(want))
  wrong = [
    f"{path} is {_aval(have[path])}, wanted {_aval(x)}"
    for path, x in want.items()
    if path in have and _aval(have[path]) != _aval(x)
  ]
  found = {"lacks": lacks, "has beside": extra, "differs:": wrong}
  said = [
    f"{what} {', '.join(names)}" for what, names in found.items() if names
  ]
  if said:
    raise ValueError(f"checkpoint {folder} does not fit: {'; '.join(said)}")


def _aval(x):
  return f"{np.dtype(x.dtype).name}{list(x.shape)}"


def _is_key(x):
  return jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key)


def _flatten(tree, *, abstract=False):
  """Arrays by path, keys as their data; the kind of each key by path."""
  arrays, kinds = {}, {}
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    name = rules.leaf_path(path)
    if _is_key(x) and abstract:
      data = jax.eval_shape(jax.random.key_data, x)
      x = jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=x.sharding)
    elif _is_key(x):
      kinds[name] = str(jax.random.key_impl(x))
      x = jax.random.key_data(x)
    arrays[name] = x
  return arrays, kinds


def _unflatten(like, arrays, kinds):
  def fill(path, _):
    name = rules.leaf_path(path)
    if name in kinds:
      return jax.random.wrap_key_data(arrays[name], impl=kinds[name])
    return arrays[name]

  return jax.tree_util.tree_map_with_path(fill, like)


def _of_all_processes(iterator_state):
  """The states of all processes' iterators as JSON texts, in order."""
  if isinstance(iterator_state, bytes):
    value = {"base64": base64.b64encode(iterator_state).decode()}
  else:
    value = {"json": iterator_state}
  text = json.dumps(value, default=_number)
  if jax.process_count() == 1:
    return [text]
  data = np.frombuffer(text.encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(data.size))
  padded = np.zeros(sizes.max(), np.uint8)
  padded[: data.size] = data
  rows = multihost_utils.process_allgather(padded)
  return [rows[i, :n].tobytes().decode() for i, n in enumerate(sizes.tolist())]


def _of_this_process(texts):
  if len(texts) != jax.process_count():
    return None
  value = json.loads(texts[jax.process_index()])
  if "base64" in value:
    return base64.b64decode(value["base64"])
  return value["json"]


def _number(x):
  if isinstance(x, np.generic):
    return x.item()
  raise TypeError(f"iterator state holds a {type(x).__name__}, not JSON")

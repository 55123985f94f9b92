"""The training loop: read it from top to bottom, or copy it.

The folder of a run holds `checkpoints/`, `metrics.jsonl`, `tensorboard/` when
asked for, and `nonfinite_step_*.npz` when a loss was not finite. Calling
`train` again with the same folder goes on where the last checkpoint stands.
"""

import contextlib
import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from tokjax import checkpoint, checks, files
from tokjax.parallel import meshes
from tokjax.parallel import rules as sharding
from tokjax.train import metrics, preemption
from tokjax.train import optimizer as optimizers
from tokjax.train import step as steps
from tokjax.typing import Array, Key

__all__ = ["NonFiniteError", "TrainConfig", "Trained", "train"]


@dataclasses.dataclass(unsafe_hash=True)
class TrainConfig:
  """How a run is trained; what is trained are arguments of `train`."""

  num_steps: int  # updates of the whole run
  optimizer: optimizers.OptimizerConfig = dataclasses.field(
    default_factory=optimizers.OptimizerConfig
  )
  folder: str = ""  # where the run is kept; "" keeps nothing, cannot resume
  compute_dtype: str = "float32"  # or bfloat16; parameters stay float32
  num_microbatches: int = 1  # gradient accumulation; see `step.make_step`
  remat: str | None = None  # see `step.make_step`
  average_decay: float = 0.0  # of averaged parameters; 0 keeps none
  save_every: int = 1000  # steps between checkpoints; the last is saved too
  keep: int = 3  # checkpoints that stay
  log_every: int = 50  # steps between lines of metrics; 0 for none
  evaluate_every: int = 0  # steps between evaluations; 0 for the end only
  tensorboard: bool = False  # also write TensorBoard files
  agree_every: int = 10  # steps between processes asking about preemption


class Trained(NamedTuple):
  """How a run ended.

  Attributes:
    state: parameters, optimiser and step.
    preempted: True when it stopped early, saved, to be called again.
    metrics: the last evaluation's, as `evaluate` returned them.
  """

  state: steps.TrainState
  preempted: bool
  metrics: dict[str, float]


class NonFiniteError(FloatingPointError):
  """A loss or gradient was not finite.

  Attributes:
    step: number of updates done before it; the state was left there.
    path: npz file with the batch (`batch/<path>`), `key_data` and `key_impl`
      of the run's key, `step`, `loss` and `grad_norm`. Under
      `jax.distributed` every process writes its own rows.
  """

  def __init__(self, step: int, path: pathlib.Path, loss: float, norm: float):
    super().__init__(
      f"loss {loss} and gradient norm {norm} at step {step}; the batch is in "
      f"{path}"
    )
    self.step, self.path = step, path


def train(
  model: Any,
  loss_fn: steps.LossFn,
  batches: Iterator[Any],
  config: TrainConfig,
  *,
  key: Key[Array, ""],
  evaluate: Callable[..., Mapping[str, float]] | None = None,
  mesh: Mesh | None = None,
  rules: sharding.Rules = (),
  buffers: Any = None,
) -> Trained:
  """Trains a model; resumes by itself from the folder of the config.

  A run cut off by kill -9 or stopped by SIGTERM that is called again computes
  what the uninterrupted one would have, bit for bit on the same mesh: the
  checkpoint holds model, optimiser, key and the state of the data iterator.
  On another mesh it starts from equal values and rounds differently.

  The devices run one step ahead of the host, which looks at the finite flag
  of the step before; the state itself refuses an update that is not finite,
  so no checkpoint can hold one.

  Args:
    model: an nnx module or any pytree of arrays. It is copied.
    loss_fn: `loss_fn(model, batch, key) -> (loss, metrics)`; see
      `step.make_step`.
    batches: an iterator of pytrees of host arrays, rows on axis 0; with a
      folder it must have `get_state` and `set_state`, as a grain
      `DatasetIterator` has. Under `jax.distributed` each process's own rows.
    config: the settings.
    key: for everything random of a fresh run; a resumed one has its own.
    evaluate: `evaluate(model, step) -> {name: number}`, called every
      `evaluate_every` steps and at the end, outside of any jit, with the
      averaged parameters where they are kept; `evaluate(model, buffers, step)`
      where there are buffers. It must not keep what it is given, whose memory
      the next step reuses.
    mesh: the devices, with the axes of `parallel.meshes`; None puts all of
      them on `data`.
    rules: sharding rules of the state, see `parallel.rules`; its paths
      begin with `model/`, `optimizer_state/`, `buffers/` and `average/`.
    buffers: arrays that the loss changes without gradients, such as codebooks
      of moving means; the loss is then `loss_fn(model, buffers, batch, key)
      -> (loss, metrics, buffers)`. They are saved and resumed like the rest.

  Returns:
    The state at the end, and whether there is more to do.

  Raises:
    NonFiniteError: if a loss or gradient is not finite.
    ValueError: if the batches end before `num_steps`, the folder is in a
      bucket, or settings do not fit.
    TypeError: if `batches` cannot be saved in a run that is.

  Example:
    >>> def loss_fn(model, batch, key):
    ...   return jax.numpy.mean((batch @ model["w"] - 1.0) ** 2), {}
    >>> sgd = optimizers.OptimizerConfig(
    ...   "sgd", 0.25, schedule="constant", b1=0.0, clip_norm=None)
    >>> done = train({"w": np.zeros(1)}, loss_fn, iter([np.ones((8, 1))] * 2),
    ...              TrainConfig(2, sgd, log_every=0), key=jax.random.key(0))
    >>> float(done.state.model["w"][0])
    0.75
  """
  _check(config, batches)
  mesh = meshes.make_mesh() if mesh is None else mesh
  transform = optimizers.make(config.optimizer, config.num_steps)
  rate = optimizers.schedule(config.optimizer, config.num_steps)

  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.set_mesh(mesh))
    stop = stack.enter_context(
      preemption.watching(agree_every=config.agree_every)
    )
    saves = None
    if config.folder:
      saves = checkpoint.Checkpoints(
        pathlib.Path(config.folder) / "checkpoints", keep=config.keep
      )
      stack.enter_context(saves)
    init = functools.partial(
      steps.init_state,
      optimizer=transform,
      average=bool(config.average_decay),
    )
    fresh = (key, model, () if buffers is None else buffers)
    state, layout = _start(init, fresh, mesh, rules, saves, batches)
    done = int(state.step)
    writers = _open_writers(stack, config, done)
    progress = metrics.Progress(done, config.num_steps)
    train_step = steps.make_step(
      loss_fn,
      transform,
      compute_dtype=config.compute_dtype,
      num_microbatches=config.num_microbatches,
      remat=config.remat,
      state_shardings=layout,
      has_buffers=buffers is not None,
      average_decay=config.average_decay,
    )

    running, preempted, evaluation = None, False, {}
    while done < config.num_steps and not preempted:
      batch = _next(batches, done, config.num_steps)
      state, values = train_step(state, meshes.shard_batch(batch, mesh))
      _guard(running, state.key, config.folder)
      running = (done, batch, values)
      done += 1
      last = done == config.num_steps
      preempted = stop(done) and not last

      logs = config.log_every and (last or _due(done, config.log_every))
      evaluates = evaluate and (last or _due(done, config.evaluate_every))
      keeps = saves and (last or preempted or _due(done, config.save_every))
      if last or logs or evaluates or keeps:
        _guard(running, state.key, config.folder)
      if logs:
        row = {name: float(x) for name, x in values.items() if name != "finite"}
        row = {"loss": row.pop("loss"), **row, **progress.read(done)}
        row["learning_rate"] = float(rate(done - 1))
        _write(writers, done, row)
      if evaluates:
        model = state.average if config.average_decay else state.model
        held = () if buffers is None else (state.buffers,)
        evaluation = dict(evaluate(model, *held, done))
        row = {f"eval/{name}": float(x) for name, x in evaluation.items()}
        _write(writers, done, row)
      if keeps:
        saves.save(
          done,
          state,
          iterator_state=batches.get_state(),
          config=dataclasses.asdict(config),
        )
  return Trained(state, preempted, evaluation)


def _check(config, batches):
  checks.in_range(1, float("inf"), num_steps=config.num_steps)
  checks.one_of(("float32", "bfloat16"), compute_dtype=config.compute_dtype)
  files.local_folder(folder=config.folder)
  if config.folder and not hasattr(batches, "get_state"):
    raise TypeError(
      "batches must have get_state and set_state to be saved in folder "
      f"{config.folder!r}; a grain DatasetIterator has"
    )


def _start(init, fresh, mesh, rules, saves, batches):
  """The first state, or the last one saved; and where its arrays live."""
  key, model, buffers = fresh

  def first(key, model, buffers):
    return init(key, model, buffers=buffers)

  like = jax.eval_shape(first, key, model, buffers)
  layout = sharding.shardings(like, mesh, rules)
  if saves is None or saves.latest_step() is None:
    model = jax.device_put(model, layout.model)
    buffers = jax.device_put(buffers, layout.buffers)
    state = jax.jit(first, out_shardings=layout)(key, model, buffers)
    return state, layout
  restored = saves.restore(
    jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      like,
      layout,
    )
  )
  if restored.iterator_state is None:
    raise ValueError(
      "the checkpoint is of another number of processes, whose data iterators "
      f"cannot be taken over by {jax.process_count()}"
    )
  batches.set_state(restored.iterator_state)
  return restored.state, layout


def _open_writers(stack, config, done):
  if jax.process_index():
    return []
  writers = [metrics.Terminal(config.num_steps)]
  if config.folder:
    folder = pathlib.Path(config.folder)
    writers.append(
      metrics.JsonLines(folder / "metrics.jsonl", resume_step=done)
    )
    if config.tensorboard:
      writers.append(
        metrics.TensorBoard(folder / "tensorboard", resume_step=done)
      )
  for writer in writers:
    stack.callback(writer.close)
  return writers


def _write(writers, step, values):
  for writer in writers if values else ():
    writer.write(step, values)


def _next(batches, done, num_steps):
  try:
    return next(batches)
  except StopIteration:
    raise ValueError(
      f"batches ended after {done} of {num_steps} steps; repeat the data or "
      "lower num_steps"
    ) from None


def _due(done, every):
  return every > 0 and done % every == 0


def _guard(running, key, folder):
  """Raises if a finished step was not finite, its batch saved first."""
  if running is None or running[2]["finite"]:
    return
  step, batch, values = running
  folder = pathlib.Path(folder or tempfile.gettempdir())
  name = f"nonfinite_step_{step}_process_{jax.process_index()}.npz"
  path = folder / name
  loss, norm = float(values["loss"]), float(values["grad_norm"])
  arrays = {
    f"batch/{sharding.leaf_path(where)}".rstrip("/"): x
    for where, x in jax.tree_util.tree_leaves_with_path(batch)
  }
  with files.replacing(path) as aside, aside.open("wb") as file:
    np.savez(
      file,
      **arrays,
      key_data=jax.random.key_data(key),
      key_impl=str(jax.random.key_impl(key)),
      step=step,
      loss=loss,
      grad_norm=norm,
    )
  raise NonFiniteError(step, path, loss, norm)

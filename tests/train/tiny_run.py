"""A run small enough for tests, as functions and as a program.

python -m tests.train.tiny_run FOLDER [--kill_at N] [--process I --port P]
"""

import argparse
import collections.abc
import os
import pathlib
import signal

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokjax.parallel import meshes
from tokjax.train import loop, optimizer

ROWS = 8  # of a whole batch


class Mlp(nnx.Module):
  """Two layers."""

  def __init__(self, rngs):
    self.up = nnx.Linear(4, 16, rngs=rngs)
    self.down = nnx.Linear(16, 1, rngs=rngs)

  def __call__(self, x):
    return self.down(jax.nn.tanh(self.up(x)))[:, 0]


def model():
  return Mlp(nnx.Rngs(0))


def loss_fn(model, batch, key):
  """Squared error on noisy inputs, so that a lost key shows."""
  noise = 0.1 * jax.random.normal(key, batch["x"].shape)
  error = model((batch["x"] + noise).astype(model.up.kernel.dtype)) - batch["y"]
  return jnp.mean(jnp.square(error)), {"worst": jnp.max(jnp.abs(error))}


def _row(index):
  x = np.random.default_rng(index).normal(size=4).astype(np.float32)
  return {"x": x, "y": np.sin(x.sum())}


def batches(process=0, num_processes=1):
  """Shuffled anew each epoch; every process has its share of each batch."""
  share = ROWS // num_processes
  mine = slice(process * share, (process + 1) * share)
  whole = grain.MapDataset.range(40).shuffle(seed=3).map(_row).repeat()
  parts = whole.batch(ROWS).map(lambda b: {k: x[mine] for k, x in b.items()})
  return iter(parts.to_iter_dataset(grain.ReadOptions(num_threads=1)))


class Poisoned(collections.abc.Iterator):
  """Batches of which one, counted from 0, holds a NaN."""

  def __init__(self, data, step):
    self._data, self._step, self._count = data, step, -1
    self.get_state, self.set_state = data.get_state, data.set_state

  def __next__(self):
    self._count += 1
    batch = next(self._data)
    if self._count == self._step:
      batch["x"][1, 2] = np.nan
    return batch


def config(num_steps, folder="", **changes):
  adam = optimizer.OptimizerConfig(
    learning_rate=0.02, schedule="constant", weight_decay=0.01
  )
  settings = {"log_every": 0, "save_every": 3, **changes}
  return loop.TrainConfig(num_steps, adam, str(folder), **settings)


def run(
  num_steps, folder="", *, evaluate=None, mesh=None, data=None, **changes
):
  return loop.train(
    model(),
    loss_fn,
    batches() if data is None else data,
    config(num_steps, folder, **changes),
    key=jax.random.key(1),
    evaluate=evaluate,
    mesh=mesh,
  )


def _alone(args):
  def evaluate(model, step):
    print("step", step, flush=True)
    if step == args.kill_at:
      os.kill(os.getpid(), signal.SIGKILL)
    return {}

  done = run(10**6, args.folder, evaluate=evaluate, evaluate_every=1)
  print("stopped at", int(done.state.step), done.preempted, flush=True)


def _one_of_two(args):
  jax.distributed.initialize(f"localhost:{args.port}", 2, args.process)
  mesh = meshes.make_mesh(2, 4)
  mine = lambda: batches(args.process, 2)  # noqa: E731

  def evaluate(model, step):
    if step == 1 and args.process == 1:  # the other one hears nothing
      os.kill(os.getpid(), signal.SIGTERM)
    return {}

  part = run(
    8, args.folder, data=mine(), mesh=mesh, evaluate=evaluate,
    evaluate_every=1, agree_every=3, save_every=100,
  )  # fmt: skip
  print("stopped at", int(part.state.step), part.preempted, flush=True)
  rest = run(8, args.folder, data=mine(), mesh=mesh)
  whole = run(8, data=mine(), mesh=mesh)
  same = [
    np.array_equal(a.addressable_data(0), b.addressable_data(0))
    for a, b in zip(
      jax.tree.leaves(rest.state.model),
      jax.tree.leaves(whole.state.model),
      strict=True,
    )
  ]
  print("equal", all(same), flush=True)
  kernel = rest.state.model.up.kernel[...]
  print("shard", kernel.addressable_data(0).shape, flush=True)
  data = Poisoned(mine(), 2) if args.process else mine()  # NaN in one only
  try:
    run(9, args.folder + "_poisoned", data=data, mesh=mesh)
  except loop.NonFiniteError as error:
    rows = np.load(error.path)["batch/x"]
    print("nonfinite", error.step, pathlib.Path(error.path).name, rows.shape)


if __name__ == "__main__":
  parser = argparse.ArgumentParser()
  parser.add_argument("folder")
  parser.add_argument("--kill_at", type=int)
  parser.add_argument("--process", type=int)
  parser.add_argument("--port")
  arguments = parser.parse_args()
  (_alone if arguments.process is None else _one_of_two)(arguments)

"""Two processes train a tokenizer as one does.

python -m tests.train.tokenizer_processes_test PORT PROCESS FOLDER
"""

import dataclasses
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import launch
from tests.train import tiny_tokenizer_run
from tokjax.ops import patches
from tokjax.parallel import processes
from tokjax.parallel.meshes import MeshConfig
from tokjax.tokenizers.types import Reconstructed
from tokjax.tokenizers.vector_quantizer import VQConfig
from tokjax.train import tokenizer_run
from tokjax.train.optimizer import OptimizerConfig


class Patches(nnx.Module):
  """A code for each patch. Small: the time of this test is that of tracing."""

  reads = ("images",)

  def __init__(self, rngs):
    numbers = 8 * 8 * 3
    self.down = nnx.Linear(numbers, 4, rngs=rngs)
    self.up = nnx.Linear(4, numbers, rngs=rngs)
    config = VQConfig(tiny_tokenizer_run.BOOK)
    self.quantizer = config.build(rngs)

  def init_state(self, key):
    return self.quantizer.init_state(key)

  def __call__(self, images, state, *, train=False, key=None):
    x = self.down(patches.patchify(images, 8))
    found, state = self.quantizer(x, state, train=train, key=key)
    output = patches.unpatchify(self.up(found.codes), (4, 4), 8)
    pixels = jnp.mean(jnp.square(output - images))
    losses = {"pixels": pixels, **found.losses}
    return Reconstructed(output, losses, found.stats), state


@dataclasses.dataclass(unsafe_hash=True)
class PatchesConfig:
  """Of `Patches`."""

  def build(self, rngs):
    return Patches(rngs)


def run_in(folder):
  """Two steps. Adam would make the rounding of tiny gradients large."""
  sgd = OptimizerConfig(name="sgd", learning_rate=0.1, schedule="constant")
  run = tiny_tokenizer_run.flat_colours(folder)
  run = dataclasses.replace(run, tokenizer=PatchesConfig())
  return tiny_tokenizer_run.with_trainer(run, num_steps=2, optimizer=sgd)


def one_of_two(port, process, folder):
  """Trains with parameters cut over both, saves and measures."""
  processes.initialize(
    f"localhost:{port}", 2, int(process), heartbeat_timeout=10
  )
  folder = pathlib.Path(folder) / process
  folder.mkdir()
  with processes.ending_together():
    run = dataclasses.replace(run_in(folder), mesh=MeshConfig(fsdp=4))
    done = tokenizer_run.train(run)
    leaves = jax.tree.leaves(done.run.state.model)
    assert not all(x.is_fully_replicated for x in leaves)
    tokenizer_run.save(folder / "tokenizer.safetensors", done)
    print(json.dumps(done.run.metrics))


def test_two_processes_equal_one(tmp_path):
  started = launch.start(
    2,
    lambda port, i: (
      "-m", "tests.train.tokenizer_processes_test", port, i, tmp_path
    ),
  )  # fmt: skip
  run = run_in(tmp_path)
  alone = tokenizer_run.train(run, devices=jax.devices()[:1])
  ended = launch.outputs(started, timeout=200)
  assert [process.returncode for process in started] == [0, 0], ended
  want = jax.device_get((alone.tokenizer, alone.state))
  for i, (output, _) in enumerate(ended):
    path = tmp_path / str(i) / "tokenizer.safetensors"
    jax.tree.map(
      lambda g, w: np.testing.assert_allclose(g, w, atol=1e-5),
      jax.device_get(tokenizer_run.load(path, run)),
      want,
    )
    metrics = json.loads(output.splitlines()[-1])
    assert metrics == pytest.approx(alone.run.metrics, abs=1e-5)


if __name__ == "__main__":
  one_of_two(*sys.argv[1:])

"""The small image encoder on which claims about token reduction are tried.

A claim needs an encoder that sees something. `configs/vit_cifar10.py` trains
one in a quarter of an hour on two cores; its runs stay in a folder, so that
the claims share them and a stopped one goes on.
"""

import dataclasses
import pathlib

from tokjax.cli import train
from tokjax.models import vit, vit_weights

__all__ = ["Row", "VitRun", "folder", "load", "on_seeds"]

_CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "vit_cifar10.py"


@dataclasses.dataclass(frozen=True)
class VitRun:
  """One trained encoder and what it is tried on.

  Attributes:
    dataset: folder with CIFAR-10, on which it is trained.
    pictures: folder of other pictures that a claim is about, if any.
    seed: of weights and batches.
    runs: folder of the runs, one a seed.
  """

  dataset: str
  pictures: str | None = None
  seed: int = 0
  runs: str = "runs"


@dataclasses.dataclass(frozen=True)
class Row:
  """What one way to reduce reached: `metrics` by name."""

  metrics: dict[str, float]


def on_seeds(
  dataset: str,
  pictures: str | None = None,
  *,
  seeds: tuple[int, ...] = (0, 1, 2),
) -> tuple[VitRun, ...]:
  """The measurements of a claim: the same with other encoders.

  Args:
    dataset: folder with CIFAR-10.
    pictures: folder of other pictures, or None.
    seeds: one encoder each.

  Returns:
    Runs in the folder "runs".

  Example:
    >>> [run.seed for run in on_seeds("cifar10")]
    [0, 1, 2]
  """
  return tuple(VitRun(dataset, pictures, seed) for seed in seeds)


def folder(run: VitRun) -> str:
  """Where the encoder of a run is; trains it if it is not there.

  Args:
    run: which.

  Returns:
    The folder of a model: 4 blocks of width 128 over 8 x 8 patches of 32
    pixels.

  Raises:
    FileNotFoundError: if it must be trained and the data is not there.
  """
  path = pathlib.Path(run.runs) / f"vit_cifar10_{run.seed}"
  if not (path / "model").is_dir():
    words = [f"--config.seed={run.seed}", f"--config.trainer.folder={path}"]
    train.run(train.settings(f"{_CONFIG}:{run.dataset}", words))
  return str(path / "model")


def load(run: VitRun) -> vit.Vit:
  """The encoder of a run, see `folder`."""
  return vit_weights.load(folder(run))

"""The small image encoder on which claims about token reduction are tried.

A claim needs an encoder that sees something. `configs/vit_cifar10.py` trains
one in a quarter of an hour on two cores; its runs stay in a folder, so that
the claims share them and a stopped one goes on.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from tokjax.cli import train
from tokjax.models import images, vit, vit_weights

__all__ = [
  "Row",
  "VitRun",
  "folder",
  "lead",
  "load",
  "on_seeds",
  "photographs",
]

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


def photographs(run: VitRun) -> list[np.ndarray]:
  """The other pictures of a run, in the order of their names.

  Args:
    run: with a folder of pictures.

  Returns:
    uint8 [height, width, 3] each.

  Raises:
    ValueError: if the folder holds none.
  """
  return [images.read(path) for path in images.in_folder(run.pictures)]


def lead(
  rows: Mapping[str, Row],
  name: str,
  others: Sequence[str],
  *,
  keep: Sequence[int | float],
  metric: str,
) -> float:
  """How far one way is ahead of the best of others, where it is least ahead.

  Args:
    rows: of one run, by way and budget: "WAY K".
    name: the way.
    others: ways to beat.
    keep: the budgets.
    metric: what is compared.

  Returns:
    The smallest difference over the budgets.

  Example:
    >>> rows = {"a 4": Row({"R@1": 0.5}), "b 4": Row({"R@1": 0.25})}
    >>> lead(rows, "a", ["b"], keep=[4], metric="R@1")
    0.25
  """

  def value(way, budget):
    return rows[f"{way} {budget}"].metrics[metric]

  return min(value(name, k) - max(value(x, k) for x in others) for k in keep)


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

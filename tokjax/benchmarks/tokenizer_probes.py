"""What the codes of a tokenizer know: pictures, and names of pictures.

A tokenizer is trained, then judged twice: how well its decoder gives test
images back (PSNR), and how many of them a linear classifier names that reads
the mean of their code vectors, as a language model would get them.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokjax import checks
from tokjax.benchmarks import trained_vit
from tokjax.benchmarks.trained_vit import Row
from tokjax.data import cifar10
from tokjax.eval import batching
from tokjax.models import vit_weights
from tokjax.train import image_classification, tokenizer_run
from tokjax.train.loop import TrainConfig
from tokjax.train.optimizer import OptimizerConfig
from tokjax.typing import Float, Int

__all__ = [
  "ProbeRun",
  "claimed",
  "encoder",
  "margin",
  "mean_codes",
  "ridge_accuracy",
  "trained",
]


@dataclasses.dataclass(frozen=True)
class ProbeRun:
  """Tokenizers to train and judge under the same conditions.

  Attributes:
    name: of the comparison, begins the names of its folders.
    dataset: folder with CIFAR-10.
    tokenizers: configs by name.
    seed: of the encoder they read, of weights and batches.
    runs: folder of the runs; what is there is not trained again.
    num_steps: of 64 images.
    learning_rate: its peak.
  """

  name: str
  dataset: str
  tokenizers: tuple[tuple[str, Any], ...]
  seed: int = 0
  runs: str = "runs"
  num_steps: int = 400
  learning_rate: float = 2e-3


def claimed(run: ProbeRun, *, progress: bool = True) -> dict[str, Row]:
  """Trains the tokenizers of a run and judges each.

  Args:
    run: which.
    progress: print when one is done.

  Returns:
    By name: "accuracy" of the linear classifier, "usage" of the codes in a
    batch of 250 test images, and "psnr" where images come back.

  Raises:
    FileNotFoundError: if the data is not there.
  """
  rows = {}
  for name, config in run.tokenizers:
    done = trained(run, name, config)
    rows[name] = Row(_judged(done, encoder(run), run.dataset))
    if progress:
      print(name, rows[name].metrics, flush=True)
  return rows


def encoder(run: ProbeRun) -> str:
  """Folder of the frozen encoder of a run; trains it if it is not there."""
  return trained_vit.folder(
    trained_vit.VitRun(run.dataset, seed=run.seed, runs=run.runs)
  )


def trained(run: ProbeRun, name: str, config: Any) -> tokenizer_run.Trained:
  """One tokenizer of a run, trained unless its folder says that it is.

  Args:
    run: the conditions.
    name: of the tokenizer, ends the name of its folder.
    config: of the tokenizer.

  Raises:
    FileNotFoundError: if the data is not there.
    KeyboardInterrupt: if it was asked to stop; it is saved.
  """
  built = jax.eval_shape(lambda: config.build(nnx.Rngs(0)))
  done = tokenizer_run.train(
    tokenizer_run.TokenizerRun(
      tokenizer=config,
      data=run.dataset,
      teacher=encoder(run) if "features" in built.reads else "",
      trainer=TrainConfig(
        num_steps=run.num_steps,
        optimizer=OptimizerConfig(
          name="muon", learning_rate=run.learning_rate, warmup_steps=50
        ),
        folder=str(pathlib.Path(run.runs) / f"{run.name}_{name}_{run.seed}"),
        save_every=100,
      ),
      seed=run.seed,
    )
  )
  if done.run.preempted:  # saved; the next call goes on
    raise KeyboardInterrupt
  return done


def _judged(done, encoder, dataset):
  teacher = vit_weights.load(encoder)
  sets = cifar10.load(dataset)
  codes = [mean_codes(done, teacher, data.images) for data in sets]
  found = done.run.metrics
  usage = [x for name, x in found.items() if name.endswith("usage")]
  metrics = {
    "accuracy": ridge_accuracy(
      codes[0], sets[0].labels, codes[1], sets[1].labels
    ),
    "usage": float(np.mean(usage)),
  }
  return metrics | {k: found[k] for k in ("psnr",) if k in found}


def mean_codes(
  done: tokenizer_run.Trained,
  teacher: Any,
  images: np.ndarray,
  *,
  batch_size: int = 250,
) -> Float[np.ndarray, "n d"]:
  """The mean over an image of the vectors that stand for it.

  Args:
    done: a trained tokenizer of images, features, or both.
    teacher: the encoder of the features.
    images: 8-bit.
    batch_size: images at a time.

  Returns:
    One float32 row an image.
  """
  encode = functools.partial(_encode, done.tokenizer, done.state, teacher)
  return np.concatenate(
    list(batching.in_batches(encode, images, batch_size=batch_size))
  )


@jax.jit
def _encode(tokenizer, state, teacher, raw):
  images = image_classification.pixels(raw)
  made = {
    "images": images,
    "features": tokenizer_run.features(teacher, images),
  }
  found = tokenizer.encode(*(made[name] for name in tokenizer.reads), state)
  codes = found.codes.astype(jnp.float32)
  return jnp.mean(codes, axis=tuple(range(1, codes.ndim - 1)))


def ridge_accuracy(
  train: Float[np.ndarray, "n d"],
  train_labels: Int[np.ndarray, " n"],
  test: Float[np.ndarray, "m d"],
  test_labels: Int[np.ndarray, " m"],
  *,
  penalty: float = 1e-3,
) -> float:
  """Share of test rows named right by ridge regression on one-hot labels.

  Columns are scaled to mean 0 and variance 1 of the training rows; those that
  do not vary are left out of the answer by the penalty.

  Args:
    train: rows to learn from.
    train_labels: their classes, from 0.
    test: rows to name.
    test_labels: their classes.
    penalty: of the squared weights, for each row of training; ours.

  Returns:
    In 0..1.

  Raises:
    ValueError: if sizes disagree.

  Example:
    >>> x, labels = np.array([[0.0], [1.0], [9.0]]), np.array([0, 0, 1])
    >>> ridge_accuracy(x, labels, np.array([[2.0], [8.0]]), np.array([0, 1]))
    1.0
  """
  checks.same_size(train_rows=len(train), train_labels=len(train_labels))
  checks.same_size(test_rows=len(test), test_labels=len(test_labels))
  mean, scale = train.mean(0, dtype=np.float64), train.std(0, dtype=np.float64)
  scale = np.where(scale > 1e-8, scale, 1.0)
  x, y = ((rows - mean) / scale for rows in (train, test))
  target = np.eye(int(train_labels.max()) + 1)[train_labels]
  centre = target.mean(0)
  square = x.T @ x + penalty * len(x) * np.eye(x.shape[1])
  weights = np.linalg.solve(square, x.T @ (target - centre))
  named = np.argmax(y @ weights + centre, axis=1)
  return float(np.mean(named == test_labels))


def margin(
  rows: Mapping[str, Row],
  *,
  leads: tuple[tuple[str, str, str, float], ...],
) -> float:
  """How far one row is ahead of others, where it is least ahead.

  Args:
    rows: of one run, by name.
    leads: name, the name to beat, the metric, and how much less is enough, in
      the unit of the metric.

  Returns:
    The smallest difference.

  Example:
    >>> rows = {"a": Row({"accuracy": 0.5}), "b": Row({"accuracy": 0.25})}
    >>> margin(rows, leads=(("a", "b", "accuracy", 0.0),))
    0.25
  """
  return min(
    rows[name].metrics[metric] - rows[other].metrics[metric] + less
    for name, other, metric, less in leads
  )

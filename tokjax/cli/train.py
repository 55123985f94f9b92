"""`tokjax train`: trains as a config file says, and saves the model.

The folder of the run holds the checkpoints and metrics of the loop, the
settings (`run.json`), and in `model/` what `tokjax index --model` takes, of an
image encoder `tokjax reduce --model`, of a tokenizer `tokjax tokenize --model`.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from unittest import mock

import absl.flags
import jax
from jax.experimental import multihost_utils
from ml_collections import config_flags

import tokjax
from tokjax import files
from tokjax.cli import evaluate
from tokjax.models import saving, vit_weights
from tokjax.parallel import processes
from tokjax.train import (
  image_classification,
  ranking_evaluation,
  retrieval_run,
  tokenizer_run,
)

__all__ = ["main", "run", "settings"]

Run = (
  retrieval_run.RetrievalRun
  | image_classification.ImageRun
  | tokenizer_run.TokenizerRun
)

_OVERRIDES = """\
settings are overridden by name:
  tokjax train configs/colbert_pydocs.py --config.trainer.num_steps=100

Ranking quality on other queries, every 100 steps and at the end:
  --config.evaluation.split=validation --config.trainer.evaluate_every=100

Called again with the same folder, a run that was stopped goes on.
"""


def settings(path: str, overrides: list[str]) -> Run:
  """The run that a config file describes, with overrides.

  Args:
    path: a file with `get_config()`, maybe followed by `:argument`.
    overrides: words such as `--config.seed=1`.

  Returns:
    The settings.

  Raises:
    ValueError: if there is no such file, or an override names no field or has
      a value of another type.
  """
  if not pathlib.Path(path.split(":")[0]).is_file():
    raise ValueError(f"{path}: no such config file")
  flags = absl.flags.FlagValues()
  config_flags.DEFINE_config_file("config", flag_values=flags)
  words = ["tokjax train", f"--config={path}", *overrides]
  try:
    # The library looks for the names of overrides there.
    with mock.patch.object(sys, "argv", words):
      rest = flags(words)[1:]
  except (absl.flags.Error, LookupError, AttributeError) as error:
    raise ValueError(f"{path}: {error}") from error
  if rest:
    raise ValueError(f"unknown words on the command line: {' '.join(rest)}")
  return flags.config


def run(config: Run) -> pathlib.Path:
  """Trains and saves; with several processes, each of them must call it.

  Args:
    config: the run; its trainer needs a folder. With `evaluation.split` of a
      retriever the ranking metrics of that split are measured as well.

  Returns:
    The folder of the model.

  Raises:
    ValueError: for settings that do not fit, or a folder in a bucket.
  """
  if not config.trainer.folder:
    raise ValueError("config.trainer.folder must name a folder, got ''")
  folder = files.local_folder(
    **{"--out or config.trainer.folder": config.trainer.folder}
  )
  texts = isinstance(config, retrieval_run.RetrievalRun)
  asked = _evaluator(config) if texts else None
  folder.mkdir(parents=True, exist_ok=True)
  record = {
    "config": dataclasses.asdict(config),
    "versions": {"tokjax": tokjax.__version__, "jax": jax.__version__},
    "devices": [jax.devices()[0].device_kind, jax.device_count()],
  }
  first = jax.process_index() == 0
  if first:
    with files.replacing(folder / "run.json") as aside:
      aside.write_text(json.dumps(record, indent=1))
  model = folder / "model"
  preempted, save = _train(config, asked, model)
  if preempted:
    if first:
      print(f"stopped and saved in {folder}; call again to go on", flush=True)
    return folder
  if first:
    save()
  multihost_utils.sync_global_devices("model saved")
  return model


def _train(config, asked, model):
  """Whether it was stopped, and what writes the model to its folder."""
  if isinstance(config, tokenizer_run.TokenizerRun):
    done = tokenizer_run.train(config)
    path = model / "tokenizer.safetensors"
    return done.run.preempted, lambda: tokenizer_run.save(path, done)
  if isinstance(config, image_classification.ImageRun):
    found, trained = image_classification.train(config)
    return trained.preempted, lambda: vit_weights.save(model, found)
  found, trained = retrieval_run.train(config, evaluate=asked)
  return trained.preempted, lambda: saving.save(model, found)


def main(argv: list[str]) -> int:
  """Trains; see `tokjax train --help`."""
  parser = argparse.ArgumentParser(
    prog="tokjax train",
    description="Trains a retriever, an image encoder or a tokenizer as a"
    " config file of configs/ says.",
    epilog=_OVERRIDES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("config", help="config file, maybe with :argument")
  parser.add_argument("--out", help="folder of the run")
  several = parser.add_argument_group(
    "several processes", "The same command in each, on one file system, with"
  )
  several.add_argument(
    "--coordinator",
    metavar="HOST:PORT",
    help="where process 0 runs and listens; 'auto' takes this and the next two"
    " from the environment of a TPU pod, Slurm, Open MPI or Kubernetes",
  )
  several.add_argument("--num-processes", type=int, metavar="N")
  several.add_argument("--process-id", type=int, metavar="I", help="from 0")
  several.add_argument(
    "--heartbeat-timeout",
    type=int,
    default=100,
    metavar="SECONDS",
    help="a process silent for so long is dead, and the others are stopped;"
    " default %(default)s",
  )
  options, overrides = parser.parse_known_args(argv)
  if options.out:
    overrides.append(f"--config.trainer.folder={options.out}")
  config = settings(options.config, overrides)
  _join(options)
  with processes.ending_together():
    folder = run(config)
  if jax.process_index() == 0:
    print(folder)
  return 0


def _evaluator(config):
  """What measures the ranking during training; None where nothing is asked."""
  asked = config.evaluation
  if not asked.split:
    if config.trainer.evaluate_every:
      raise ValueError(
        "config.evaluation.split must name a split, such as 'validation', for "
        f"evaluate_every={config.trainer.evaluate_every}, got ''"
      )
    return None
  dataset = asked.dataset or config.data.dataset
  if dataset.endswith(retrieval_run.TRIPLES):
    raise ValueError(
      "config.evaluation.dataset must name a folder in BEIR layout or pydocs, "
      f"got {dataset!r}"
    )
  found = evaluate.load(
    evaluate.EvaluateConfig(
      dataset=dataset,
      split=asked.split,
      max_documents=asked.num_documents,
      max_queries=asked.num_queries,
    )
  )
  return ranking_evaluation.evaluator(found, metrics=asked.metrics)


def _join(options):
  place = (options.coordinator, options.num_processes, options.process_id)
  if place == (None, None, None):
    return
  if options.coordinator == "auto":
    place = (None, *place[1:])
  print("waiting for the other processes", file=sys.stderr, flush=True)
  processes.initialize(*place, heartbeat_timeout=options.heartbeat_timeout)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))

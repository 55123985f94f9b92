"""A tiny run of a retriever, as a function and as one of several processes.

python -m tests.train.tiny_retrieval CONFIG FOLDER PORT N I [--kill_at STEP]
[--config.NAME=VALUE ...]
"""

import argparse
import os
import pathlib
import signal

import jax
import numpy as np

from tokjax.cli import train
from tokjax.models import saving
from tokjax.parallel import processes
from tokjax.retrieval import colbert
from tokjax.train import retrieval_run

CONFIG = """
from tokjax.retrieval.heads import HeadConfig
from tokjax.train.loop import TrainConfig
from tokjax.train.optimizer import OptimizerConfig
from tokjax.train.retrieval_run import DataConfig, RetrievalRun

def get_config(arg=""):
  return RetrievalRun(
    model={model!r}, document_length=8, query_length=4,
    head=HeadConfig(input_dim={width}, output_dim=8),
    data=DataConfig(dataset={beir!r}, batch_size=8, bucket=8),
    trainer=TrainConfig(
      num_steps=6, save_every=2, log_every=1, agree_every=3,
      optimizer=OptimizerConfig(learning_rate=1e-2),
    ),
  )
"""


def run(config, folder, *overrides, kill_at=None):
  """Trains, encodes two texts in each process and saves in the first."""
  folder = pathlib.Path(folder)
  settings = train.settings(
    str(config),
    [
      f"--config.trainer.folder={folder}",
      f"--config.trainer.evaluate_every={0 if kill_at is None else 1}",
      *overrides,
    ],
  )

  def evaluate(checkpoint, step):
    if step == kill_at and jax.process_index() == 1:
      os.kill(os.getpid(), signal.SIGKILL)
    return {"sum": float(np.abs(encode(checkpoint)).sum())}

  checkpoint, trained = retrieval_run.train(settings, evaluate=evaluate)
  if jax.process_index() == 0:
    saving.save(folder / "model", checkpoint)
  return trained.metrics["sum"]


def encode(checkpoint):
  """Token vectors of two texts."""
  return colbert.encode_documents(
    ["wing lift", "heat"], checkpoint.tokenizer, checkpoint.encoder,
    checkpoint.head, checkpoint.config, progress=False,
  ).tokens  # fmt: skip


if __name__ == "__main__":
  parser = argparse.ArgumentParser()
  parser.add_argument("config")
  parser.add_argument("folder")
  parser.add_argument("port")
  parser.add_argument("place", nargs=2, type=int)
  parser.add_argument("--kill_at", type=int)
  options, overrides = parser.parse_known_args()
  processes.initialize(
    f"localhost:{options.port}", *options.place, heartbeat_timeout=10
  )
  with processes.ending_together():
    found = run(
      options.config, options.folder, *overrides, kill_at=options.kill_at
    )
    print("sum", found, flush=True)

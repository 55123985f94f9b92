"""A run of a tokenizer, small enough for tests."""

import dataclasses

import numpy as np

from tests.tokenizers.tiny_tokenizer import TRUNK
from tokjax.tokenizers.codebook import CodebookConfig
from tokjax.tokenizers.one_d_piece import OneDPieceConfig
from tokjax.tokenizers.vector_quantizer import VQConfig
from tokjax.train.loop import TrainConfig
from tokjax.train.optimizer import OptimizerConfig
from tokjax.train.tokenizer_run import TokenizerRun

__all__ = ["BOOK", "CONFIG", "flat_colours", "with_trainer"]

# Without a reset and with a commitment these few images collapse to one code.
BOOK = CodebookConfig(
  16, 4, metric="cosine", learning="ema", reset="batch", reset_threshold=0.5
)
CONFIG = OneDPieceConfig(
  32, 16, 4, TRUNK, TRUNK, VQConfig(BOOK, commitment_weight=0.0)
)


def flat_colours(folder):
  """A run on pictures of which one token says all, kept in a folder."""
  rng = np.random.default_rng(0)
  arrays = {}
  for name, count in (("train", 64), ("test", 20)):
    colours = rng.choice([20, 128, 235], (count, 1, 1, 3))
    x = np.broadcast_to(colours, (count, 32, 32, 3)).astype(np.uint8)
    labels = np.arange(count) % 10
    arrays |= {f"{name}_x": x, f"{name}_y": labels}
  np.savez(folder / "cifar10.npz", **arrays)
  adam = OptimizerConfig(learning_rate=1e-2, schedule="constant")
  trainer = TrainConfig(num_steps=100, optimizer=adam, log_every=0)
  return TokenizerRun(CONFIG, str(folder), batch_size=16, trainer=trainer)


def with_trainer(run, **changes):
  trainer = dataclasses.replace(run.trainer, **changes)
  return dataclasses.replace(run, trainer=trainer)

"""ColBERTer (whole words, gates) on pydocs, without a teacher.

    tokjax train configs/colberter_pydocs.py --out runs/colberter_pydocs

Two cores, some two minutes of training after one of encoding; what such a
short run reaches is recorded in `configs/claims/`.
"""

from tokjax.retrieval.colberter import ColberterConfig
from tokjax.train.late_interaction import Objective
from tokjax.train.loop import TrainConfig
from tokjax.train.optimizer import OptimizerConfig
from tokjax.train.retrieval_run import DataConfig, RetrievalRun


def get_config(arg: str = "") -> RetrievalRun:
  """The run; `arg` is the number of frozen encoder layers, 5 if empty."""
  return RetrievalRun(
    query_length=32,
    document_length=64,
    objective=Objective(method="colberter"),
    words=ColberterConfig(
      hidden_dim=384,
      query_length=32,
      document_length=64,
      cls_weight=0.5,  # of cross-entropies; the paper has Margin-MSE
      sparsity_weight=0.05,
    ),
    frozen_layers=int(arg or 5),
    data=DataConfig(dataset="pydocs", batch_size=32),
    trainer=TrainConfig(
      num_steps=300,
      optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=30),
    ),
  )

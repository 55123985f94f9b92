"""ColBERT on the installed documentation, from all-MiniLM-L6-v2.

    tokjax train configs/colbert_pydocs.py --out runs/colbert_pydocs

With `--config.evaluation.split=validation --config.trainer.evaluate_every=100`
the ranking of other questions is measured on the way.

Two cores, some two minutes of training after one of encoding; what such a
short run reaches is recorded in `configs/claims/`.
"""

from tokjax.retrieval.heads import HeadConfig
from tokjax.train.late_interaction import Objective
from tokjax.train.loop import TrainConfig
from tokjax.train.optimizer import OptimizerConfig
from tokjax.train.retrieval_run import DataConfig, RetrievalRun


def get_config(arg: str = "") -> RetrievalRun:
  """The run; `arg` is the number of frozen encoder layers, 5 if empty."""
  return RetrievalRun(
    query_length=32,
    document_length=64,
    objective=Objective(method="colbert"),
    head=HeadConfig(input_dim=384, output_dim=384, init="identity"),
    frozen_layers=int(arg or 5),
    data=DataConfig(dataset="pydocs", batch_size=32),
    trainer=TrainConfig(
      num_steps=300,
      optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=30),
    ),
  )

"""ColBERT at MS MARCO size: 64-way distillation, global batch 4,096.

    tokjax train configs/colbert_msmarco.py:/data/msmarco --out gs://...

For a TPU slice of 256 chips; never run by us. The folder holds ColBERTv2's
`examples.json` (lists of [query id, [passage id, score], ...]), `queries.tsv`
and `collection.tsv`.
"""

from tokjax.retrieval.heads import HeadConfig
from tokjax.train.late_interaction import Objective
from tokjax.train.loop import TrainConfig
from tokjax.train.optimizer import OptimizerConfig
from tokjax.train.retrieval_run import DataConfig, MeshConfig, RetrievalRun


def get_config(arg: str = "msmarco") -> RetrievalRun:
  """The run; `arg` is the folder of the files."""
  return RetrievalRun(
    model="google-bert/bert-base-uncased",
    query_length=32,
    document_length=180,
    objective=Objective(method="colbert", remat_encoder=True),
    head=HeadConfig(input_dim=768, output_dim=128),
    data=DataConfig(
      dataset=f"{arg}/examples.json",
      queries=f"{arg}/queries.tsv",
      documents=f"{arg}/collection.tsv",
      batch_size=4096,
      num_negatives=1,
    ),
    mesh=MeshConfig(data=-1, fsdp=1, tensor=1),
    trainer=TrainConfig(
      num_steps=20_000,
      optimizer=OptimizerConfig(
        learning_rate=1e-5, warmup_steps=2_000, schedule="linear"
      ),
      compute_dtype="bfloat16",
    ),
  )

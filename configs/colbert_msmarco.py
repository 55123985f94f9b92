"""ColBERT at MS MARCO size: in-batch negatives, a teacher, batch 4,096.

    tokjax train configs/colbert_msmarco.py:/data/msmarco --out /runs/msmarco
    tokjax compile configs/colbert_msmarco.py --topology v5e:16x16

The folder holds ColBERTv2's `examples.json` (lists of [query id, [passage id,
score], ...], 64 passages each), `queries.tsv` and `collection.tsv`. Of every
list a step takes the positive and one other passage; the passages of the whole
batch are negatives too.

For 256 chips of TPU v5e; compiled for them, never run. The compiler's memory
of a chip: state and batch 1.31 GB, temporaries 10.00 GB, together 11.30 of the
16.91 GB it grants. A step takes at least 20 ms, by the arithmetic at the chip's
peak. With all 64 passages of every list,

    --config.data.num_negatives=63 --config.objective.encode_parts=4
    --config.objective.remat_encoder=nothing_saveable

it is 1.31 and 13.03, together 14.34 GB (18.26 in one part), and 757 ms.
"""

from tokjax.parallel.meshes import MeshConfig
from tokjax.retrieval.heads import HeadConfig
from tokjax.train.late_interaction import Objective
from tokjax.train.loop import TrainConfig
from tokjax.train.optimizer import OptimizerConfig
from tokjax.train.retrieval_run import DataConfig, RetrievalRun


def get_config(arg: str = "msmarco") -> RetrievalRun:
  """The run; `arg` is the folder of the files."""
  return RetrievalRun(
    model="google-bert/bert-base-uncased",
    query_length=32,
    document_length=180,
    query_marker="[unused0]",
    document_marker="[unused1]",
    expand_queries=True,
    objective=Objective(method="colbert"),
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

"""MUVERA: 256 candidates by fixed dimensional encodings are enough.

    tokjax claim muvera --data ../shared/data

Recorded 2026-11-23, two AMD EPYC cores (AVX2), jax 0.10.2, all-MiniLM-L6-v2
zero-shot, 256 tokens, one seed; measured by `tokjax evaluate`, which runs the
same function. nDCG@10, all documents / 256 candidates, and in brackets with
empty cells filled as published:

    scifact   .7072 / .7047 (.7047)
    cranfield .4004 / .4003 (.3999)
    vaswani   .4988 / .4988 (.5010)

Holds in all three, on scifact with .0005 to spare. The mean token vector, 384
dimensions, is as good a source of candidates here: .7056, .4004, .4990.
"""

import pathlib

from tokjax.cli.claim import Claim
from tokjax.cli.evaluate import EvaluateConfig

# nDCG@10 that may be lost against scoring every document.
ALLOWED_LOSS = 0.003


def get_config(data: str) -> Claim:
  """The claim over the data sets below `data`."""
  return Claim(
    statement="Re-ranking 256 candidates found by MUVERA encodings of 10,240"
    f" dimensions loses at most {ALLOWED_LOSS} nDCG@10 against MaxSim over"
    " every document.",
    runs=tuple(
      EvaluateConfig(
        dataset=str(pathlib.Path(data) / name),
        methods=("maxsim", "fde+maxsim"),
        num_candidates=256,
        fde=10240,
      )
      for name in ("scifact", "cranfield", "vaswani")
    ),
    margin=lambda rows: (
      rows["fde+maxsim"].metrics["nDCG@10"]
      - rows["maxsim"].metrics["nDCG@10"]
      + ALLOWED_LOSS
    ),
  )

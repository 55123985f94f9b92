"""ColBERT: comparing all tokens beats comparing one mean vector.

    tokjax claim colbert --data ../shared/data

Recorded 2026-11-23, two AMD EPYC cores (AVX2), jax 0.10.2, all-MiniLM-L6-v2
zero-shot, 256 tokens, no random part (so no seed spread); measured by
`tokjax evaluate`, which runs the same function. nDCG@10, mean / MaxSim:

    scifact   .6451 / .7072
    cranfield .3953 / .4004
    vaswani   .4335 / .4988

Holds in all three. On cranfield the margin, .005, is small for 225 queries.
"""

import pathlib

from tokjax.cli.claim import Claim
from tokjax.cli.evaluate import EvaluateConfig


def get_config(data: str) -> Claim:
  """The claim over the data sets below `data`."""
  return Claim(
    statement="MaxSim over the tokens of a sentence encoder ranks better"
    " (nDCG@10) than the mean of the same tokens.",
    runs=tuple(
      EvaluateConfig(
        dataset=str(pathlib.Path(data) / name), methods=("dense", "maxsim")
      )
      for name in ("scifact", "cranfield", "vaswani")
    ),
    margin=lambda rows: (
      rows["maxsim"].metrics["nDCG@10"] - rows["dense"].metrics["nDCG@10"]
    ),
  )

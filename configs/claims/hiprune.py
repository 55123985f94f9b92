"""HiPrune: anchors, their neighbors and registers, by attention received.

    tokjax claim hiprune --data ../shared/data

Not recorded yet.
"""

from tokjax.benchmarks import reduction_accuracy, trained_vit
from tokjax.cli.claim import Claim

_OTHERS = ("random", "fastv")


def get_config(data: str) -> Claim:
  """The claim over three encoders; the first run trains them, in "runs"."""
  return Claim(
    statement="At 32, 16 and 8 of 64 tokens, the rest of the encoder names more"
    " images right than from random tokens, and than from those that "
    "the class token attends to in the first block.",
    runs=trained_vit.on_seeds(f"{data}/images-cifar10"),
    measure=reduction_accuracy.claimed,
    margin=_margin,
  )


def _margin(rows):
  return min(
    rows[f"hiprune {k}"].metrics["accuracy"]
    - max(rows[f"{other} {k}"].metrics["accuracy"] for other in _OTHERS)
    for k in (32, 16, 8)
  )

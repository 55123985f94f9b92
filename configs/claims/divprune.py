"""DivPrune: spreading tokens out beats attention where few are left.

    tokjax claim divprune --data ../shared/data

Not recorded yet.
"""

from tokjax.benchmarks import reduction_accuracy, trained_vit
from tokjax.cli.claim import Claim


def get_config(data: str) -> Claim:
  """The claim over three encoders; the first run trains them, in "runs"."""
  return Claim(
    statement="Of 8 of 64 tokens that are the least alike, the rest of the "
    "encoder names more images right than of 8 random ones, and than "
    "of the 8 that the class token attends to most.",
    runs=trained_vit.on_seeds(f"{data}/images-cifar10"),
    measure=reduction_accuracy.claimed,
    margin=_margin,
  )


def _margin(rows):
  accuracy = {name: row.metrics["accuracy"] for name, row in rows.items()}
  others = accuracy["random 8"], accuracy["vtc_cls 8"]
  return accuracy["divprune 8"] - max(others)

"""Token Transforming: mixing many tokens into few beats merging and dropping.

    tokjax claim token_transforming --data ../shared/data

Not recorded yet.
"""

from tokjax.benchmarks import reduction_accuracy, trained_vit
from tokjax.cli.claim import Claim

_OTHERS = ("tome", "random", "uniform", "divprune", "vtc_cls", "hiprune")


def get_config(data: str) -> Claim:
  """The claim over three encoders; the first run trains them, in "runs"."""
  return Claim(
    statement="With about 40 % of the FLOPs saved and no training, the encoder "
    "names more images right than with ToMe, and than with any method"
    " that only drops tokens.",
    runs=trained_vit.on_seeds(f"{data}/images-cifar10"),
    measure=reduction_accuracy.claimed,
    margin=_margin,
  )


def _margin(rows):
  accuracy = {name: row.metrics["accuracy"] for name, row in rows.items()}
  return accuracy["transforming x3 16"] - max(
    accuracy[f"{other} 16"] for other in _OTHERS
  )

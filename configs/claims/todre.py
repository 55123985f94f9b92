"""ToDRE: diverse tokens cover more than attended ones.

    tokjax claim todre --data ../shared/data

Not recorded yet.
"""

from tokjax.benchmarks import reduction, trained_vit
from tokjax.cli.claim import Claim

_OTHERS = ("random", "vtc_cls")


def get_config(data: str) -> Claim:
  """The claim over three encoders; the first run trains them, in "runs"."""
  return Claim(
    statement="At 192, 128, 64 and 32 of 576 tokens of photographs, the mean "
    "over all tokens of the cosine to the nearest kept one is higher "
    "than for those with the most attention, and than for random "
    "ones.",
    runs=trained_vit.on_seeds(f"{data}/images-cifar10", f"{data}/images-kodak"),
    measure=reduction.claimed,
    margin=_margin,
  )


def _margin(rows):
  return min(
    rows[f"todre {k}"].metrics["coverage"]
    - max(rows[f"{other} {k}"].metrics["coverage"] for other in _OTHERS)
    for k in (192, 128, 64, 32)
  )

"""VisionDrop: what patches attend to is worth keeping, the rest merging.

    tokjax claim visiondrop --data ../shared/data

Recorded 2026-11-28, two AMD EPYC cores (AVX2), jax 0.10.2, encoders of seeds 0
and 1. The encoders are those of `configs/vit_cifar10.py` (.638 and .656 of
3,000 test images right without reduction); patches are cut once, after the
second of four blocks. Accuracy at 32, 16 and 8 of 64 patches, one number a
seed:

                32          16          8
    visiondrop  .601/.623   .542/.530   .461/.397
    fastv       .566/.603   .491/.530   .419/.448
    random      .608/.627   .574/.581   .519/.522

Does not hold: worse than random patches at every budget, and not always better
than early attention.
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
    rows[f"visiondrop {k}"].metrics["accuracy"]
    - max(rows[f"{other} {k}"].metrics["accuracy"] for other in _OTHERS)
    for k in (32, 16, 8)
  )

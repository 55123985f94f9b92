"""DivPrune: spreading tokens out beats attention where few are left.

    tokjax claim divprune --data ../shared/data

Recorded 2026-11-28, two AMD EPYC cores (AVX2), jax 0.10.2, encoders of seeds 0,
1 and 2. The encoders are those of `configs/vit_cifar10.py` (.638, .656 and .634
of 3,000 test images right without reduction); patches are cut once, after the
second of four blocks. Accuracy at 32, 16 and 8 of 64 patches, one number a
seed:

              32               16               8
    divprune  .626/.638/.619   .596/.598/.584   .554/.541/.550
    random    .608/.627/.620   .574/.581/.582   .519/.522/.542
    uniform   .625/.634/.617   .573/.581/.581   .542/.553/.542
    vtc_cls   .583/.606/.605   .510/.534/.536   .445/.451/.481

Holds: at 8 of 64, .035, .019 and .009 above random, .11, .09 and .07 above the
most attended.
"""

import functools

from tokjax.benchmarks import reduction_accuracy, trained_vit
from tokjax.cli.claim import Claim

_OTHERS = ("random", "vtc_cls")
_KEEP = (8,)


def get_config(data: str) -> Claim:
  """The claim over three encoders; the first run trains them, in "runs"."""
  return Claim(
    statement="Of 8 of 64 tokens that are the least alike, the rest of the "
    "encoder names more images right than of 8 random ones, and than "
    "of the 8 that the class token attends to most.",
    runs=trained_vit.on_seeds(f"{data}/images-cifar10"),
    measure=functools.partial(
      reduction_accuracy.claimed,
      keep=_KEEP,
      methods=("divprune", *_OTHERS, "uniform"),
    ),
    margin=functools.partial(
      trained_vit.lead,
      name="divprune",
      others=_OTHERS,
      keep=_KEEP,
      metric="accuracy",
    ),
  )

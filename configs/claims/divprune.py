"""DivPrune: spreading tokens out beats attention where few are left.

    tokjax claim divprune --data ../shared/data

Recorded 2026-11-28, two AMD EPYC cores (AVX2), jax 0.10.2, encoders of seeds 0
and 1. The encoders are those of `configs/vit_cifar10.py` (.638 and .656 of
3,000 test images right without reduction); patches are cut once, after the
second of four blocks. Accuracy at 32, 16 and 8 of 64 patches, one number a
seed:

              32          16          8
    divprune  .626/.638   .596/.598   .554/.541
    random    .608/.627   .574/.581   .519/.522
    uniform   .625/.634   .573/.581   .542/.553
    vtc_cls   .583/.606   .510/.534   .445/.451

Holds: at 8 of 64, .035 and .019 above random, .11 and .09 above the most
attended.
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

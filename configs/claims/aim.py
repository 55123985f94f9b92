"""AIM: merging tokens that are alike loses less than dropping or pooling.

    tokjax claim aim --data ../shared/data

Recorded 2026-11-28, two AMD EPYC cores (AVX2), jax 0.10.2, encoders of seeds 0,
1 and 2. The encoders are those of `configs/vit_cifar10.py` (.638, .656 and .634
of 3,000 test images right without reduction); patches are cut once, after the
second of four blocks. Accuracy at 32, 16 and 8 of 64 patches, one number a
seed:

             32               16               8
    aim      .634/.648/.636   .612/.633/.617   .554/.570/.565
    random   .608/.627/.620   .574/.581/.582   .519/.522/.542
    pooling  .614/.630/.626   .591/.610/.602   .505/.538/.529
    tome     .627/.645/.633   .607/.635/.618   .618/.623/.610

Holds in every seed and at every budget.
"""

import functools

from tokjax.benchmarks import reduction_accuracy, trained_vit
from tokjax.cli.claim import Claim

_OTHERS = ("random", "pooling")
_KEEP = (32, 16, 8)


def get_config(data: str) -> Claim:
  """The claim over three encoders; the first run trains them, in "runs"."""
  return Claim(
    statement="At 32, 16 and 8 of 64 tokens, the rest of the encoder names more"
    " images right than from random tokens, and than from the means "
    "of neighbors.",
    runs=trained_vit.on_seeds(f"{data}/images-cifar10"),
    measure=functools.partial(
      reduction_accuracy.claimed, keep=_KEEP, methods=("aim", *_OTHERS, "tome")
    ),
    margin=functools.partial(
      trained_vit.lead,
      name="aim",
      others=_OTHERS,
      keep=_KEEP,
      metric="accuracy",
    ),
  )

"""VisionDrop: what patches attend to is worth keeping, the rest merging.

    tokjax claim visiondrop --data ../shared/data

Recorded 2026-11-28, two AMD EPYC cores (AVX2), jax 0.10.2, encoders of seeds 0,
1 and 2. The encoders are those of `configs/vit_cifar10.py` (.638, .656 and .634
of 3,000 test images right without reduction); patches are cut once, after the
second of four blocks. Accuracy at 32, 16 and 8 of 64 patches, one number a
seed:

                32               16               8
    visiondrop  .601/.623/.597   .542/.530/.496   .461/.397/.431
    fastv       .566/.603/.587   .491/.530/.525   .419/.448/.458
    random      .608/.627/.620   .574/.581/.582   .519/.522/.542

Does not hold: worse than random patches at every budget, and not always better
than early attention.
"""

import functools

from tokjax.benchmarks import reduction_accuracy, trained_vit
from tokjax.cli.claim import Claim

_OTHERS = ("random", "fastv")
_KEEP = (32, 16, 8)


def get_config(data: str) -> Claim:
  """The claim over three encoders; the first run trains them, in "runs"."""
  return Claim(
    statement="At 32, 16 and 8 of 64 tokens, the rest of the encoder names more"
    " images right than from random tokens, and than from those that "
    "the class token attends to in the first block.",
    runs=trained_vit.on_seeds(f"{data}/images-cifar10"),
    measure=functools.partial(
      reduction_accuracy.claimed, keep=_KEEP, methods=("visiondrop", *_OTHERS)
    ),
    margin=functools.partial(
      trained_vit.lead,
      name="visiondrop",
      others=_OTHERS,
      keep=_KEEP,
      metric="accuracy",
    ),
  )

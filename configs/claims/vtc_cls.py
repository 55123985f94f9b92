"""VTC-CLS: late attention of the class token says which tokens to keep.

    tokjax claim vtc_cls --data ../shared/data

Recorded 2026-11-28, two AMD EPYC cores (AVX2), jax 0.10.2, encoders of seeds 0,
1 and 2. The encoders are those of `configs/vit_cifar10.py` (.638, .656 and .634
of 3,000 test images right without reduction); patches are cut once, after the
second of four blocks. Accuracy at 32, 16 and 8 of 64 patches, one number a
seed:

             32               16               8
    vtc_cls  .583/.606/.605   .510/.534/.536   .445/.451/.481
    fastv    .566/.603/.587   .491/.530/.525   .419/.448/.458
    random   .608/.627/.620   .574/.581/.582   .519/.522/.542

Does not hold. Late attention beats early attention, as the paper says, but
random patches beat both by far: the class token of this small encoder attends
to few places that look alike. What it means for an encoder like CLIP is not
shown.
"""

import functools

from tokjax.benchmarks import reduction_accuracy, trained_vit
from tokjax.cli.claim import Claim

_OTHERS = ("random", "fastv")
_KEEP = (32, 16, 8)


def get_config(data: str) -> Claim:
  """The claim over three encoders; the first run trains them, in "runs"."""
  return Claim(
    statement="At 32, 16 and 8 of 64 tokens, those that the class token attends"
    " to most in the block before the cut serve the rest of the "
    "encoder better than random ones, and than those that it attends "
    "to in the first block.",
    runs=trained_vit.on_seeds(f"{data}/images-cifar10"),
    measure=functools.partial(
      reduction_accuracy.claimed, keep=_KEEP, methods=("vtc_cls", *_OTHERS)
    ),
    margin=functools.partial(
      trained_vit.lead,
      name="vtc_cls",
      others=_OTHERS,
      keep=_KEEP,
      metric="accuracy",
    ),
  )

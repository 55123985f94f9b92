"""Token Transforming: mixing many tokens into few beats merging and dropping.

    tokjax claim token_transforming --data ../shared/data

Recorded 2026-11-28, two AMD EPYC cores (AVX2), jax 0.10.2, encoders of seeds 0,
1 and 2. The encoders are those of `configs/vit_cifar10.py` (.638, .656 and .634
of 3,000 test images right without reduction). Token Transforming mixes after
each of the first three blocks, ToMe merges in every block, the others cut once
after the second block. Share of the FLOPs and accuracy, one number a seed:

    Token Transforming    0.57   .530/.541/.546
    ToMe                  0.52   .607/.635/.618
    DivPrune              0.62   .596/.598/.584
    AIM (merged)          0.62   .612/.633/.617
    uniform               0.62   .573/.581/.581
    random                0.62   .574/.581/.582
    most attended         0.62   .510/.534/.536

Does not hold: it loses more than even random patches. Its centers are the most
attended tokens, and attention chooses badly in this encoder (see `vtc_cls`);
ToMe, which merges by keys alone, loses least.
"""

import functools

from tokjax.benchmarks import reduction_accuracy, trained_vit
from tokjax.cli.claim import Claim

_OTHERS = ("tome", "random", "uniform", "divprune", "vtc_cls", "hiprune")
_KEEP = (16,)


def get_config(data: str) -> Claim:
  """The claim over three encoders; the first run trains them, in "runs"."""
  return Claim(
    statement="With about 40 % of the FLOPs saved and no training, the encoder "
    "names more images right than with ToMe, and than with any method"
    " that only drops tokens.",
    runs=trained_vit.on_seeds(f"{data}/images-cifar10"),
    measure=functools.partial(
      reduction_accuracy.claimed,
      keep=_KEEP,
      methods=("transforming x3", *_OTHERS, "aim"),
    ),
    margin=functools.partial(
      trained_vit.lead,
      name="transforming x3",
      others=_OTHERS,
      keep=_KEEP,
      metric="accuracy",
    ),
  )

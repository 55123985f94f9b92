"""GlobalCom2: crops that matter get more tokens.

    tokjax claim global_com --data ../shared/data

Recorded 2026-11-28, two AMD EPYC cores (AVX2), jax 0.10.2, encoders of seeds 0,
1 and 2. 1,000 scenes of four squares, one of them a CIFAR-10 image, three
blurred pieces of Kodak photographs; encoders of `configs/vit_cifar10.py`, a
linear reader of the mean of kept tokens. Accuracy (share of kept crop tokens
that are the object's), one pair a seed:

    whole         .170 (.250)   .145 (.250)   .132 (.250)
    global 0.5    .149 (.252)   .141 (.260)   .195 (.262)
    equal 0.5     .145 (.250)   .136 (.250)   .196 (.250)
    random 0.5    .158 (.249)   .136 (.250)   .136 (.251)
    global 0.25   .130 (.252)   .141 (.260)   .170 (.262)
    equal 0.25    .130 (.250)   .148 (.250)   .162 (.250)
    random 0.25   .172 (.248)   .150 (.254)   .146 (.251)
    global 0.1    .128 (.252)   .135 (.261)   .143 (.262)
    equal 0.1     .123 (.250)   .135 (.250)   .144 (.250)
    random 0.1    .177 (.245)   .158 (.253)   .154 (.251)

Does not hold. The overview's attention does not lead to the object (budgets
give it a quarter of the tokens, as chance does; at temperature 1 too, tried
with the first encoder), so that unequal budgets change next to nothing.
Attention in the crops serves the reader less than chance with the first
encoder, at a half and a quarter more with the third. An encoder of this size
cannot show the paper's gain.
"""

import functools

from tokjax.benchmarks import crop_budgets, trained_vit
from tokjax.cli.claim import Claim


def get_config(data: str) -> Claim:
  """The claim over three encoders; the first run trains them, in "runs"."""
  return Claim(
    statement="At half, a quarter and a tenth of the tokens, budgets by the "
    "overview let a reader name more objects right than equal budgets"
    " for all crops, with the same scores of tokens.",
    runs=trained_vit.on_seeds(f"{data}/images-cifar10", f"{data}/images-kodak"),
    measure=crop_budgets.measure,
    margin=functools.partial(
      trained_vit.lead,
      name="global",
      others=("equal",),
      keep=(0.5, 0.25, 0.1),
      metric="accuracy",
    ),
  )

"""MMTok: tokens chosen for coverage cover.

    tokjax claim mmtok --data ../shared/data

Recorded 2026-11-28, two AMD EPYC cores (AVX2), jax 0.10.2, encoders of seeds 0
and 1. The first 8 Kodak photographs, 24 x 24 patches of 4 pixels, encoders of
`configs/vit_cifar10.py`. Coverage at 192, 128, 64 and 32 of 576 tokens, one
number a seed:

                    192         128         64          32
    mmtok           .960/.962   .940/.944   .909/.914   .875/.880
    todre k-center  .950/.954   .923/.928   .871/.877   .814/.819
    divprune        .950/.954   .922/.929   .870/.880   .814/.825
    uniform         .937/.940   .923/.927   .885/.890   .832/.840
    random          .937/.941   .915/.920   .875/.880   .819/.824
    todre           .902/.904   .873/.874   .827/.834   .782/.794
    vtc_cls         .849/.819   .778/.742   .661/.639   .535/.517

Holds in every seed and at every budget.
"""

import functools

from tokjax.benchmarks import reduction, trained_vit
from tokjax.cli.claim import Claim

_OTHERS = ("random", "uniform", "divprune", "todre", "vtc_cls", "hiprune")
_KEEP = (192, 128, 64, 32)


def get_config(data: str) -> Claim:
  """The claim over three encoders; the first run trains them, in "runs"."""
  return Claim(
    statement="At 192, 128, 64 and 32 of 576 tokens of photographs, the mean "
    "over all tokens of the cosine to the nearest kept one is higher "
    "than with any other method that only drops tokens.",
    runs=trained_vit.on_seeds(f"{data}/images-cifar10", f"{data}/images-kodak"),
    measure=functools.partial(
      reduction.claimed,
      keep=_KEEP,
      methods=("mmtok", *_OTHERS, "todre k-center"),
    ),
    margin=functools.partial(
      trained_vit.lead,
      name="mmtok",
      others=_OTHERS,
      keep=_KEEP,
      metric="coverage",
    ),
  )

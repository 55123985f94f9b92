"""MMTok: tokens chosen for coverage cover.

    tokjax claim mmtok --data ../shared/data

Recorded 2026-11-28, two AMD EPYC cores (AVX2), jax 0.10.2, encoders of seeds 0,
1 and 2. The first 8 Kodak photographs, 24 x 24 patches of 4 pixels, encoders of
`configs/vit_cifar10.py`. Coverage at 192, 128, 64 and 32 of 576 tokens, one
number a seed:

              192              128              64               32
    mmtok     .960/.962/.960   .940/.944/.941   .909/.914/.909   .875/.880/.875
    k-center  .950/.954/.951   .923/.928/.924   .871/.877/.873   .814/.819/.811
    divprune  .950/.954/.951   .922/.929/.924   .870/.880/.873   .814/.825/.812
    uniform   .937/.940/.938   .923/.927/.923   .885/.890/.885   .832/.840/.835
    random    .937/.941/.938   .915/.920/.916   .875/.880/.874   .819/.824/.819
    todre     .902/.904/.907   .873/.874/.876   .827/.834/.826   .782/.794/.786
    vtc_cls   .849/.819/.851   .778/.742/.807   .661/.639/.711   .535/.517/.602

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

"""ToDRE: diverse tokens cover more than attended ones.

    tokjax claim todre --data ../shared/data

Recorded 2026-11-28, two AMD EPYC cores (AVX2), jax 0.10.2, encoders of seeds 0,
1 and 2. The first 8 Kodak photographs, 24 x 24 patches of 4 pixels, encoders of
`configs/vit_cifar10.py`. Coverage at 192, 128, 64 and 32 of 576 tokens, one
number a seed:

              192              128              64               32
    todre     .902/.904/.907   .873/.874/.876   .827/.834/.826   .782/.794/.786
    k-center  .950/.954/.951   .923/.928/.924   .871/.877/.873   .814/.819/.811
    uniform   .937/.940/.938   .923/.927/.923   .885/.890/.885   .832/.840/.835
    random    .937/.941/.938   .915/.920/.916   .875/.880/.874   .819/.824/.819
    vtc_cls   .849/.819/.851   .778/.742/.807   .661/.639/.711   .535/.517/.602

Does not hold. The reading of the method as a greedy minimum of summed
similarity (max-sum, the default) covers more than attention and less than
random tokens: its picks lie far from the mean, and beside each other. The
reading as k-center covers more than random tokens at the two larger budgets
only.
"""

import functools

from tokjax.benchmarks import reduction, trained_vit
from tokjax.cli.claim import Claim

_OTHERS = ("random", "vtc_cls")
_KEEP = (192, 128, 64, 32)


def get_config(data: str) -> Claim:
  """The claim over three encoders; the first run trains them, in "runs"."""
  return Claim(
    statement="At 192, 128, 64 and 32 of 576 tokens of photographs, the mean "
    "over all tokens of the cosine to the nearest kept one is higher "
    "than for those with the most attention, and than for random "
    "ones.",
    runs=trained_vit.on_seeds(f"{data}/images-cifar10", f"{data}/images-kodak"),
    measure=functools.partial(
      reduction.claimed,
      keep=_KEEP,
      methods=("todre", *_OTHERS, "todre k-center", "uniform"),
    ),
    margin=functools.partial(
      trained_vit.lead,
      name="todre",
      others=_OTHERS,
      keep=_KEEP,
      metric="coverage",
    ),
  )

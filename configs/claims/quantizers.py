"""The quantizer zoo: plain codebooks collapse, and what keeps them alive.

    tokjax claim quantizers --data ../shared/data

Recorded 2026-11-28, two busy AMD EPYC cores, jax 0.10.2, seeds 0, 1 and 2: 6
bits for points of a mixture, 8 for patches of CIFAR-10. Usage and PSNR in dB,
the least and the most of the seeds:

                     points                   patches
    vq               .20-.42   23.5-28.7      .19-.25   19.9-20.3
    vq_ema           .22-.25   22.8-23.1      .26-.34   20.4-20.5
    vq_ema_reset     1         32.2-36.4      1         22.0-22.1
    vq_anchors       .64-.81   25.2-28.4      .97-1     21.4-21.5
    vq_simvq         .58-.80   26.9-29.4      .99-1     21.1-21.2
    vq_rotation      .61-.70   30.7-31.7      .93-.95   21.6
    vq_cosine        .41-.52   28.3-30.6      .49-.68   21.0-21.1
    vq_ibq           .61-.70   32.0-34.8      .85-.91   20.7-20.8
    vq_gumbel        .14-.23   18.7-21.7      .05-.07   18.1-18.3
    rvq              .84-.88   30.7-31.1      .98-1     21.5-21.6
    grouped_rvq      .84-.94   28.7-29.3      1         21.1-21.2
    pq               .42-.84   26.3-29.8      .99-1     21.2-21.3
    fsq              .89-.92   28.5-29.5      1         21.0-21.1
    lfq              .34-.42   23.6-24.8      .96-1     19.2-19.6
    bsq              .44-.48   22.6-23.9      .92-.99   19.6-20.3
    rvq 1, 2, 3, 4   20.0-21.1, 29.0-29.4,    19.0, 21.5,
    of 4             34.2-35.1, 35.7-36.9     22.7-22.8, 23.4-23.5

Does not hold in any of the three. True in all: resets use every code and give
the least error of one table, each stage lowers the error, and on patches FSQ,
LFQ and BSQ use .92 of their codes and more, the plain tables .34 at most. Not
true: SimVQ on points and narrow codes of length one on both use less than 90 %
of their codes; Gumbel sampling uses fewer than "vq" on patches and, in two
seeds, on points; there moving means do in two and LFQ in one.
"""

import functools

from tokjax.benchmarks import quantizers
from tokjax.cli.claim import Claim


def get_config(data: str) -> Claim:
  """The claim over three seeds."""
  return Claim(
    statement="With as many bits and steps, a table learned by gradient alone"
    " uses the fewest of its codes; resets, SimVQ and narrow codes of length"
    " one use 90 % of them at least, quantizers without tables more than the"
    " table, and each residual stage lowers the error.",
    runs=quantizers.on_seeds(f"{data}/images-cifar10"),
    measure=quantizers.measure,
    margin=functools.partial(quantizers.margin, data=("points", "patches")),
  )

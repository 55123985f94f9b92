"""CenterCLIP: medoids of the patches of some frames instead of all frames.

    tokjax claim center_clip --data ../shared/data

Recorded 2026-11-28, two AMD EPYC cores (AVX2), jax 0.10.2, encoders of seeds 0,
1 and 2. 125 videos of two of the 250 ImageNet photographs each, 250 stills,
encoders of `configs/vit_cifar10.py`; twelve frames become four pseudo-frames
before the third of four blocks, .67 of the FLOPs without the clustering. R@1,
one number a seed:

    all frames                    .404/.416/.452
    medoids, 64 of 192            .340/.328/.320
    spectral, 64                  .308/.316/.304
    means of the clusters, 64     .356/.340/.316
    random, 64                    .408/.372/.424
    mean of three frames, 64      .400/.416/.440

Does not hold: for finding a photograph again, medoids lose to the mean of the
frames and to random patches; clustering has no text to serve here. What the
paper gains on text-video retrieval is not shown.
"""

import functools

from tokjax.benchmarks import trained_vit, video_retrieval
from tokjax.cli.claim import Claim


def get_config(data: str) -> Claim:
  """The claim over three encoders; the first run trains them, in "runs"."""
  return Claim(
    statement="With 64 medoids of the 192 patches of three frames, stills find "
    "more of their videos than with the mean of the three frames, and"
    " than with 64 random patches.",
    runs=trained_vit.on_seeds(
      f"{data}/images-cifar10", f"{data}/images-imagenet-samples"
    ),
    measure=video_retrieval.measure,
    margin=functools.partial(
      trained_vit.lead,
      name="medoids",
      others=("pooling", "random"),
      keep=(64,),
      metric="R@1",
    ),
  )

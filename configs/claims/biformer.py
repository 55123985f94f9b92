"""BiFormer: regions chosen by content against windows and full attention.

    tokjax claim biformer --data ../shared/data

Recorded 2026-11-29, two busy AMD EPYC cores, jax 0.10.2, seed 0 only, 1,500
steps of 32 images. Of 3,000 test images are named right, at so many MFLOPs an
image: routing .471 (29.8), windows .474 (29.7), full attention .464 (32.1).

Does not hold, by .003: windows are ahead by nine images of 3,000, which is less
than chance explains. After 400 steps it was .321, .341 and .328. Maps of 16 x
16 and 8 x 8 tokens leave routing little to choose from; larger images were not
measured.
"""

import functools

from tokjax.benchmarks import biformer, tokenizer_probes
from tokjax.benchmarks.biformer import BiFormerRun
from tokjax.cli.claim import Claim


def get_config(data: str) -> Claim:
  """The claim of one seed: three small networks are trained."""
  return Claim(
    statement="At equal FLOPs a network of two stages names more images right "
    "where regions read the four closest to them than where they read a window "
    "of as many tokens, and than a narrower one, of 8 % more, that reads all.",
    runs=(BiFormerRun(f"{data}/images-cifar10"),),
    measure=biformer.claimed,
    margin=functools.partial(
      tokenizer_probes.margin,
      leads=(
        ("routing", "window", "accuracy", 0.0),
        ("routing", "full", "accuracy", 0.0),
      ),
    ),
  )

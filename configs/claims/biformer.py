"""BiFormer: regions chosen by content against windows and full attention.

    tokjax claim biformer --data ../shared/data

Not run yet.
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

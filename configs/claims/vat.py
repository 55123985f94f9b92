"""VAT: tokens hold more of a shape than voxels of as many bytes.

    tokjax claim vat --data ../shared/data

Not recorded yet.
"""

import functools

from tokjax.benchmarks import shape_tokens
from tokjax.cli.claim import Claim


def get_config(data: str) -> Claim:
  """The claim over one tokenizer, trained on unions and meshes."""
  return Claim(
    statement="Of random unions of balls, boxes and tori that it has not seen, "
    "VAT keeps in 8 and in 16 bytes a volume that overlaps more with the right "
    "one than a grid of voxels of as many bits does.",
    runs=(shape_tokens.ShapeRun(f"{data}/meshes"),),
    measure=shape_tokens.measure,
    margin=functools.partial(shape_tokens.lead, sizes=(8, 16), metric="iou"),
  )

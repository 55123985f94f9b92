"""VAT: tokens hold more of a shape than voxels of as many bytes.

    tokjax claim vat --data ../shared/data

Recorded 2026-11-28, two busy AMD EPYC cores, jax 0.10.2, seed 0 only, 1,500
steps. Overlap (IoU) with unseen unions, then with the 3D meshes, by bytes:

               8           16          64
    VAT       .013 .209   .012 .210   .013 .211
    voxels    .462 .553   .541 .586   .657 .720

Does not hold, by .528: after this training the decoder says "outside" nearly
everywhere, whatever the number of bytes, so that nothing is said about tokens.
A few solids are learned in a test; why unions are not is not known.
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

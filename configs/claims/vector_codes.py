"""Vector codes: additive against rotated against plain product codes.

    tokjax claim vector_codes --data ../shared/data

Not recorded yet at these settings (8 codes of 64 values, 20,000 training
vectors from the photographs that are searched). A first trial on 2026-11-28,
two AMD EPYC cores (AVX2), jax 0.10.2, seed 0, did not hold. It had 8 codes of
256 values, 10,000 training vectors from every second photograph, 20,000 stored
vectors and 500 queries from the others, and OPQ started from
`balanced_rotation`:

            R@1    R@10   R@100  distortion
    PQ      .188   .618   .930   .1744
    OPQ     .238   .640   .928   .1982
    AQ      .238   .674   .922   .1877
    RVQ 2   .030   .208   .582   .3249
    RVQ 4   .102   .374   .724   .2784
    RVQ 6   .158   .466   .808   .2491
    RVQ     .202   .532   .862   .2257

Rotated and additive codes were further from the stored vectors than plain
product codes. Suspected, not shown: too few training vectors for books of whole
width (five a code), from other photographs, and the start of OPQ.
"""

from tokjax.benchmarks import vector_codes
from tokjax.cli.claim import Claim


def get_config(data: str) -> Claim:
  """The claim over three draws of vectors from the Kodak photographs."""
  return Claim(
    statement="In 48 bits, additive codes of gradient histograms lie closer"
    " than rotated product codes and find the nearest vector more often, and"
    " those than plain product codes; residual codes improve with every two"
    " more.",
    runs=tuple(
      vector_codes.VectorCodesRun(f"{data}/images-kodak", seed)
      for seed in range(3)
    ),
    measure=vector_codes.measure,
    margin=vector_codes.lead,
  )

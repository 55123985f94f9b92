"""Correlation-guided compression: print gets tokens, blank paper does not.

    tokjax claim correlation_guided --data ../shared/data

Not recorded yet.
"""

from tokjax.benchmarks import page_reduction, trained_vit
from tokjax.cli.claim import Claim


def get_config(data: str) -> Claim:
  """The claim over three encoders; the first run trains them, in "runs"."""
  return Claim(
    statement="On each page, the tokens that the method keeps hold more of the "
    "ink than as many kept at random, evenly, or by the attention of "
    "the class token in a low or a deep block.",
    runs=trained_vit.on_seeds(f"{data}/images-cifar10"),
    measure=page_reduction.measure,
    margin=_margin,
  )


def _margin(rows):
  ink = {name: row.metrics["ink"] for name, row in rows.items()}
  pages = {name.split(":")[0] for name in rows}
  return min(
    ink[f"{page}: correlation"] - ink[f"{page}: {other}"]
    for page in pages
    for other in ("random", "uniform", "deep attention", "low attention")
  )

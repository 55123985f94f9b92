"""CATP: image tokens that agree with the words, from examples that matter.

    tokjax claim catp --data ../shared/data

Not recorded yet.
"""

from tokjax.benchmarks import prompt_reduction, trained_vit
from tokjax.cli.claim import Claim


def get_config(data: str) -> Claim:
  """The claim over three encoders; the first run trains them, in "runs"."""
  return Claim(
    statement="At 64, 32 and 16 of 256 tokens, more of what stage 1 keeps is "
    "the object's than with DivPrune or by attention, and more of "
    "what stage 2 keeps of the examples is related to the question "
    "than by attention.",
    runs=trained_vit.on_seeds(f"{data}/images-cifar10", f"{data}/images-kodak"),
    measure=prompt_reduction.measure,
    margin=_margin,
  )


def _margin(rows):
  margins = []
  for k in (64, 32, 16):
    hit = {
      name: row.metrics["object"]
      for name, row in rows.items()
      if "object" in row.metrics
    }
    others = max(hit[f"divprune {k}"], hit[f"attention {k}"])
    margins.append(hit[f"catp {k}"] - others)
    related, other = (
      rows[f"{way} context {k}"].metrics["related"]
      for way in ("catp", "attention")
    )
    margins.append(related - other)
  return min(margins)

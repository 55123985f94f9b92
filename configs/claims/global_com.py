"""GlobalCom2: crops that matter get more tokens.

    tokjax claim global_com --data ../shared/data

Not recorded yet.
"""

from tokjax.benchmarks import crop_budgets, trained_vit
from tokjax.cli.claim import Claim


def get_config(data: str) -> Claim:
  """The claim over three encoders; the first run trains them, in "runs"."""
  return Claim(
    statement="At half, a quarter and a tenth of the tokens, budgets by the "
    "overview let a reader name more objects right than equal budgets"
    " for all crops, with the same scores of tokens.",
    runs=trained_vit.on_seeds(f"{data}/images-cifar10", f"{data}/images-kodak"),
    measure=crop_budgets.measure,
    margin=_margin,
  )


def _margin(rows):
  accuracy = {name: row.metrics["accuracy"] for name, row in rows.items()}
  return min(
    accuracy[f"global {ratio}"] - accuracy[f"equal {ratio}"]
    for ratio in (0.5, 0.25, 0.1)
  )

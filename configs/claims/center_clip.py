"""CenterCLIP: medoids of the patches of some frames instead of all frames.

    tokjax claim center_clip --data ../shared/data

Not recorded yet.
"""

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
    margin=_margin,
  )


def _margin(rows):
  recall = {name: row.metrics["R@1"] for name, row in rows.items()}
  return recall["medoids 64"] - max(recall["pooling 64"], recall["random 64"])

"""LaVIT: a learned choice of patches, more of them where there is more to say.

    tokjax claim lavit --data ../shared/data

Not recorded yet.
"""

from tokjax.benchmarks import image_tokens
from tokjax.benchmarks.tokenizer_probes import ProbeRun
from tokjax.cli.claim import Claim
from tokjax.tokenizers.codebook import CodebookConfig
from tokjax.tokenizers.lavit import LavitConfig
from tokjax.tokenizers.vector_quantizer import VQConfig


def _margin(rows):
  """The smaller of: cosine ahead of chance, correlation with bytes."""
  found = rows["merge"].metrics
  return min(found["cosine"] - found["random"], found["busy"])


def get_config(data: str) -> Claim:
  """The claim; the first run trains encoder and tokenizer, in "runs"."""
  book = CodebookConfig(512, 16, metric="cosine", learning="ema")
  config = LavitConfig(
    feature_dim=128,
    num_patches=64,
    num_tokens=64,
    num_layers=2,
    num_heads=4,
    mlp_ratio=2.0,
    quantizer=VQConfig(book),
    stage="merge",
    init_scale=0.09,
  )
  run = ProbeRun(
    name="lavit",
    dataset=f"{data}/images-cifar10",
    tokenizers=(("merge", config),),
    num_steps=300,
  )
  return Claim(
    statement="The patches that the selector keeps restore the features of all "
    "better than as many random ones of the same image, and images with more "
    "bytes as JPEG get more tokens.",
    runs=(run,),
    measure=image_tokens.by_need,
    margin=_margin,
  )

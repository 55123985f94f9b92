"""LaVIT: a learned choice of patches, more of them where there is more to say.

    tokjax claim lavit --data ../shared/data

Recorded 2026-11-28, two busy AMD EPYC cores, jax 0.10.2, encoder of seed 0
only, 300 steps of 64 images. In training 21 of 64 patches are drawn an image,
as `keep_rate` asks, and restore all features at a cosine of .75; but the
selector is still undecided: no patch is likelier to stay than to go, so the
likelier choice of evaluation keeps none, and features come back at .392.

Does not hold after this training, which is too short for the selector to
choose; nothing is said about longer ones.
"""

from tokjax.benchmarks import image_tokens
from tokjax.benchmarks.tokenizer_probes import ProbeRun
from tokjax.cli.claim import Claim
from tokjax.tokenizers.codebook import CodebookConfig
from tokjax.tokenizers.lavit import LavitConfig
from tokjax.tokenizers.vector_quantizer import VQConfig


def _margin(rows):
  """The smaller of: cosine more than .01 ahead of chance, busy images."""
  found = rows["merge"].metrics
  return min(found["cosine"] - found["random"] - 0.01, found["busy"])


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
    "better by a cosine of .01 than as many random ones, and images with more "
    "bytes as JPEG get more tokens.",
    runs=(run,),
    measure=image_tokens.by_need,
    margin=_margin,
  )

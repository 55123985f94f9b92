"""LaVIT: a learned choice of patches, more of them where there is more to say.

    tokjax claim lavit --data ../shared/data

Recorded 2026-11-29, two busy AMD EPYC cores, jax 0.10.2, encoder of seed 0
only, 2,000 steps of 64 images, before codes. Of 64 patches of a test image
stay, drawn as in training and as the published code always does, or those
likelier to stay than to go; cosine of the features given back, from these and
from as many at random; rank correlation of their number with the bytes of the
JPEG:

               tokens      cosine   random   correlation
    drawn    21.4 +- 3.8    .8380    .8383      -.007
    surest   13.9 +- 5.1    .7810    .8048       .475

Does not hold, by .010: the choice is no better than chance for what is given
back. What the selector prefers does follow the image: the surest are more where
there is more to see. But odds stay near a third, and numbers that are drawn
vary as those of coins do. Its gradient says how patches serve as context of
others, not whether their own row is worth a token. After 300 and 713 steps as
many were drawn (cosine .821 after 713, at random .820), and none and 6.2 were
surest.
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
    num_steps=2000,
  )
  return Claim(
    statement="The patches that the selector keeps restore the features of all "
    "better by a cosine of .01 than as many random ones, and images with more "
    "bytes as JPEG get more tokens.",
    runs=(run,),
    measure=image_tokens.by_need,
    margin=_margin,
  )

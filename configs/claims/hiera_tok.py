"""HieraTok: several scales against one, at as many numbers an image.

    tokjax claim hiera_tok --data ../shared/data

Not recorded yet.
"""

import dataclasses
import functools

from tokjax.benchmarks import image_tokens, tokenizer_probes
from tokjax.benchmarks.tokenizer_probes import ProbeRun
from tokjax.cli.claim import Claim
from tokjax.tokenizers.hiera_tok import HieraTokConfig
from tokjax.tokenizers.transformer import TransformerConfig


def get_config(data: str) -> Claim:
  """The claim; the first run trains the tokenizers, in "runs"."""
  trunk = TransformerConfig(96, 2, 4, init_scale=0.1)
  several = HieraTokConfig(
    image_size=32,
    patch_size=4,
    sides=(1, 2, 4, 8),
    latent_dim=6,
    encoder=trunk,
    decoder=trunk,
  )
  run = ProbeRun(
    name="hiera_tok",
    dataset=f"{data}/images-cifar10",
    tokenizers=(
      ("scales", several),
      # 64 tokens of 8 numbers for 85 of 6: 512 for 510.
      ("one", dataclasses.replace(several, sides=(8,), latent_dim=8)),
      (
        "one as wide",
        dataclasses.replace(several, sides=(8,), latent_dim=6),
      ),
    ),
    num_steps=400,
  )
  return Claim(
    statement="Latents of four scales under scale-causal attention give images "
    "back better than one scale of as many numbers, and than one of as wide "
    "latents.",
    runs=(run,),
    measure=image_tokens.by_scale,
    margin=functools.partial(
      tokenizer_probes.margin,
      leads=(
        ("scales", "one", "psnr", 0.0),
        ("scales", "one as wide", "psnr", 0.0),
      ),
    ),
  )

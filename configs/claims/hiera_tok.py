"""HieraTok: several scales against one, at as many numbers an image.

    tokjax claim hiera_tok --data ../shared/data

Recorded 2026-11-28, two busy AMD EPYC cores, jax 0.10.2, seed 0 only, 400 steps
of 64 images. PSNR over 3,000 test images:

                                               PSNR   numbers an image
    scales 1, 2, 4, 8, latents of 6            26.74  510
    scale 8 alone, latents of 8                28.73  512
    scale 8 alone, latents of 6                26.85  384

Does not hold, by 1.98 dB: on pictures of 32 pixels as many numbers on the
finest scale say more, and the coarse scales add nothing to latents as wide.
The published comparison has an adversarial and a semantic loss, 256 pixels and
a generator behind it; none of these is measured here.
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

"""One-D-Piece: dropped tails make the first tokens an image.

    tokjax claim one_d_piece --data ../shared/data

Recorded 2026-11-28, two busy AMD EPYC cores, jax 0.10.2, seed 0 only, 600 steps
of 64 images. PSNR over 3,000 test images from the first tokens, and of JPEG and
WebP in as many bytes without their headers, over those of 500 images that a
setting brings below (their share in brackets):

    tokens          1      2      4      8      16     32
    bytes           2      3      5      10     20     40
    drop            14.62  15.09  16.20  16.93  17.19  17.23
    whole           12.27  13.22  13.73  14.69  16.02  19.94
    JPEG            -      -      (.00)  (.04)  (.34)  21.01 (.97)
    WebP            -      -      -      -      -      (.18)

Holds, by 1.17 dB at least. The price: from all 32 tokens an image comes back
2.7 dB worse, and JPEG, where it fits, is ahead.
"""

import dataclasses
import functools

from tokjax.benchmarks import image_tokens, tokenizer_probes
from tokjax.benchmarks.tokenizer_probes import ProbeRun
from tokjax.cli.claim import Claim
from tokjax.tokenizers.codebook import CodebookConfig
from tokjax.tokenizers.one_d_piece import OneDPieceConfig
from tokjax.tokenizers.transformer import TransformerConfig
from tokjax.tokenizers.vector_quantizer import VQConfig

_LENGTHS = (1, 2, 4, 8, 16, 32)
_SHORT = (1, 2, 4, 8, 16)


def tokenizer() -> OneDPieceConfig:
  """The one of `configs/one_d_piece_cifar.py`."""
  trunk = TransformerConfig(
    width=128, num_layers=3, num_heads=4, init_scale=0.09
  )
  book = CodebookConfig(
    1024, 12, metric="cosine", learning="ema", reset="batch"
  )
  return OneDPieceConfig(
    image_size=32,
    patch_size=8,
    num_tokens=32,
    encoder=trunk,
    decoder=trunk,
    quantizer=VQConfig(book),
  )


def get_config(data: str) -> Claim:
  """The claim; the first run trains both tokenizers, in "runs"."""
  drop = tokenizer()
  run = ProbeRun(
    name="one_d_piece",
    dataset=f"{data}/images-cifar10",
    tokenizers=(
      ("drop", drop),
      ("whole", dataclasses.replace(drop, lengths="all")),
    ),
    num_steps=600,
  )
  return Claim(
    statement="Trained with dropped tails, the first 1, 2, 4, 8 or 16 of 32 "
    "tokens give a better image than those of the same tokenizer trained "
    "without.",
    runs=(run,),
    measure=functools.partial(image_tokens.by_length, lengths=_LENGTHS),
    margin=functools.partial(
      tokenizer_probes.margin,
      leads=tuple((f"drop {k}", f"whole {k}", "psnr", 0.0) for k in _SHORT),
    ),
  )

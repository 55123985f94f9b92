"""The shape of a BiFormer, the shapes that are published, and their cost."""

import dataclasses
from typing import Literal, get_args

from tokjax import checks

__all__ = [
  "CONFIGS",
  "BiFormerConfig",
  "check",
  "convolutions",
  "flops",
  "shape",
]

Attention = Literal["routing", "window", "full"]
Stem = Literal["convs", "patches"]
Lepe = Literal["input", "values"]


@dataclasses.dataclass(unsafe_hash=True)
class BiFormerConfig:
  """Stages of blocks; the defaults are those of BiFormer-T.

  "full" is the published block of the last stage, whose parts differ from those
  of routing: eight heads, no bias, the scale dim^-1/2, and a depthwise
  convolution of its input where routing has one of its values. The fields
  `full_*` say otherwise. "window" is routing in which a region reads itself.
  """

  widths: tuple[int, ...] = (64, 128, 256, 512)  # channels of each stage
  depths: tuple[int, ...] = (2, 2, 8, 2)  # blocks of each stage
  attention: tuple[Attention, ...] = ("routing", "routing", "routing", "full")
  num_regions: tuple[int, ...] = (7, 7, 7, 7)  # a side; "full" has none
  top_k: tuple[int, ...] = (1, 4, 16, 1)  # regions read; "routing" only
  head_dim: int = 32  # of a head of "routing" and "window"
  full_num_heads: int = 8  # of "full"; 0 for width / head_dim
  full_lepe: Lepe = "input"  # what its convolution reads
  full_bias: bool = False  # of its queries, keys and values
  mlp_ratio: int = 3  # width inside an MLP over the width outside
  position_size: int = 3  # side of the convolution in front; 0 for none
  lepe_size: int = 5  # side of the convolution beside attention
  stem: Stem = "convs"  # 3 x 3 of stride 2; "patches": of 4 x 4 and 2 x 2
  stem_stride: int = 4  # of the image over the first stage; 4 or 2
  soft_routing: bool = False  # see `tokjax.sparse.biformer`
  block_size: int | None = None  # of routing and windows, see there
  block_queries: int | None = None  # likewise
  num_channels: int = 3  # of the image
  num_outputs: int = 1000  # classes
  norm_epsilon: float = 1e-6  # added to the variance in layer norm
  batch_norm_epsilon: float = 1e-5  # likewise in batch norm
  batch_norm_momentum: float = 0.1  # how far moving statistics move a step
  drop_path_rate: float = 0.0  # of the last block, from 0; published S: .15
  init_scale: float = 0.02  # standard deviation of initial linear weights

  def num_heads(self, stage: int) -> int:
    """Heads of a stage."""
    if self.attention[stage] == "full" and self.full_num_heads:
      return self.full_num_heads
    return self.widths[stage] // self.head_dim


# Published shapes by name.
CONFIGS: dict[str, BiFormerConfig] = {
  "biformer-tiny": BiFormerConfig(),
  "biformer-small": BiFormerConfig(depths=(4, 4, 18, 4), drop_path_rate=0.15),
  "biformer-base": BiFormerConfig(
    depths=(4, 4, 18, 4), widths=(96, 192, 384, 768)
  ),
  # The layout of Swin-T.
  "biformer-stl": BiFormerConfig(
    depths=(2, 2, 6, 2),
    widths=(96, 192, 384, 768),
    mlp_ratio=4,
    position_size=0,
    stem="patches",
    drop_path_rate=0.1,
  ),
}


def shape(name: str) -> BiFormerConfig:
  """The shape of a published network, to change with `dataclasses.replace`.

  Args:
    name: one of `CONFIGS`.

  Returns:
    A copy of its config.

  Raises:
    ValueError: for an unknown name; lists those that are known.

  Example:
    >>> shape("biformer-base").widths
    (96, 192, 384, 768)

  Source: `models/biformer.py` and `biformer_stl.py` of the published code.
  """
  checks.one_of(tuple(CONFIGS), name=name)
  return dataclasses.replace(CONFIGS[name])


def flops(config: BiFormerConfig, image_size: int) -> int:
  """Of one square image forward, multiply and add counted apart.

  Convolutions and products of matrices; no norms, activations, softmax or
  biases. Papers count a multiply-add as one: theirs is half of this.

  Args:
    config: the shape.
    image_size: pixels a side.

  Returns:
    FLOPs.

  Raises:
    ValueError: if fields of the config do not fit each other.

  Example:
    >>> round(flops(shape("biformer-tiny"), 224) / 2e9, 1)
    2.2
  """
  check(config)
  side, total = image_size, 2 * config.widths[-1] * config.num_outputs
  for stage, depth in enumerate(config.depths):
    for size, stride, inputs, outputs in convolutions(config, stage):
      side = side // stride if config.stem == "patches" else -(-side // stride)
      total += 2 * size**2 * inputs * outputs * side**2
    total += depth * _block_flops(config, stage, side)
  return total


def convolutions(
  config: BiFormerConfig, stage: int
) -> list[tuple[int, int, int, int]]:
  """What comes before the blocks of a stage.

  Args:
    config: the shape.
    stage: from 0.

  Returns:
    Side, stride, channels in and channels out of each convolution.

  Example:
    >>> convolutions(shape("biformer-tiny"), 1)
    [(3, 2, 64, 128)]
  """
  width, patches = config.widths[stage], config.stem == "patches"
  if stage:
    return [(2 if patches else 3, 2, config.widths[stage - 1], width)]
  inputs, stride = config.num_channels, config.stem_stride
  if patches:
    return [(stride, stride, inputs, width)]
  if stride == 2:
    return [(3, 2, inputs, width)]
  return [(3, 2, inputs, width // 2), (3, 2, width // 2, width)]


def check(config: BiFormerConfig) -> None:
  """Raises ValueError for fields that do not fit each other.

  Args:
    config: the shape; the message names its field.

  Example:
    >>> check(BiFormerConfig(head_dim=24))
    Traceback (most recent call last):
    ValueError: width_of_stage_0 must be a multiple of 24, got 64
  """
  checks.in_range(1, 16, num_stages=len(config.widths))
  checks.same_size(
    **{
      name: len(getattr(config, name))
      for name in ("widths", "depths", "attention", "num_regions", "top_k")
    }
  )
  checks.one_of(get_args(Stem), stem=config.stem)
  checks.one_of((2, 4), stem_stride=config.stem_stride)
  checks.one_of(get_args(Lepe), full_lepe=config.full_lepe)
  checks.in_range(0, 0.9, drop_path_rate=config.drop_path_rate)
  checks.one_of((0, 1, 3, 5, 7), position_size=config.position_size)
  checks.one_of((1, 3, 5, 7), lepe_size=config.lepe_size)
  for stage, width in enumerate(config.widths):
    kind, regions = config.attention[stage], config.num_regions[stage]
    checks.one_of(get_args(Attention), attention=kind)
    checks.in_range(1, 1 << 10, depth=config.depths[stage])
    full = kind == "full" and config.full_num_heads
    divisor = config.full_num_heads if full else config.head_dim
    checks.divisible(divisor, **{f"width_of_stage_{stage}": width})
    checks.in_range(1, 1 << 10, num_regions=regions)
    checks.in_range(1, regions**2, top_k=config.top_k[stage])


def _block_flops(config, stage, side):
  width, tokens = config.widths[stage], side**2
  regions = config.num_regions[stage]
  local = config.position_size**2 + config.lepe_size**2
  total = 2 * tokens * width * local
  total += (8 + 4 * config.mlp_ratio) * tokens * width**2
  if config.attention[stage] == "full":
    return total + 4 * tokens**2 * width
  filled = (-(-side // regions) * regions) ** 2  # tokens with what is filled up
  chosen = 1
  if config.attention[stage] == "routing":
    total += 2 * regions**4 * width
    chosen = config.top_k[stage]
  return total + 4 * chosen * filled**2 * width // regions**2

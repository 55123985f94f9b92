"""The shape of a vision transformer, and the shapes that are published."""

import dataclasses

from tokjax import checks

__all__ = ["ACTIVATIONS", "POOLS", "SHAPES", "VitConfig", "check", "shape"]

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")
POOLS = ("class", "mean", "attention")


@dataclasses.dataclass(unsafe_hash=True)
class VitConfig:
  """Shape of the encoder; the defaults are those of ViT-B/16."""

  image_size: int = 224  # pixels a side that the positions were learned at
  patch_size: int = 16  # pixels a side of a patch
  num_channels: int = 3  # of the image
  width: int = 768  # hidden width D
  num_layers: int = 12  # blocks
  num_heads: int = 12  # attention heads; must divide width
  mlp_width: int = 3072  # width between the two linear layers of a block
  activation: str = "gelu"  # of the MLP: gelu (exact), gelu_tanh, quick_gelu
  norm_epsilon: float = 1e-6  # added to the variance in layer norm
  class_token: bool = True  # row 0
  distill_token: bool = False  # row 1 (DeiT)
  num_registers: int = 0  # rows without position after those (DINOv2)
  patch_bias: bool = True  # of the patch projection; False in CLIP
  norm_input: bool = False  # norm before the first block (CLIP)
  layer_scale: float | None = None  # initial factor of residuals (DINOv2)
  antialias_positions: bool = False  # see `positions`; DINOv2 with registers
  pool: str = "class"  # what `head` reads: class (token), mean, attention
  num_outputs: int = 0  # width of a linear layer after that; 0 for none
  head_bias: bool = True  # of that layer; False in CLIP
  distill_head: bool = False  # one more for the distillation token (DeiT)
  init_scale: float = 0.02  # standard deviation of the initial weights

  @property
  def num_special(self) -> int:
    """Rows before the patches."""
    return self.class_token + self.distill_token + self.num_registers

  @property
  def grid(self) -> tuple[int, int]:
    """Patches per column and per row of the positions."""
    return (self.image_size // self.patch_size,) * 2


_SMALL = {"width": 384, "num_heads": 6, "mlp_width": 1536}
_BASE = {"width": 768, "num_heads": 12, "mlp_width": 3072}
_LARGE = {
  "width": 1024,
  "num_heads": 16,
  "mlp_width": 4096,
  "num_layers": 24,
}

_CLIP = VitConfig(
  activation="quick_gelu",
  norm_epsilon=1e-5,
  patch_bias=False,
  norm_input=True,
  head_bias=False,
)
_SIGLIP = VitConfig(activation="gelu_tanh", class_token=False, pool="attention")
_DINOV2 = VitConfig(image_size=518, patch_size=14, layer_scale=1.0)
_DINOV2_REGISTERS = dataclasses.replace(
  _DINOV2, num_registers=4, antialias_positions=True
)
_VIT = VitConfig(norm_epsilon=1e-12, num_outputs=1000)
_DEIT = dataclasses.replace(_VIT, distill_token=True, distill_head=True)


def _made(config, size, **changes):
  return dataclasses.replace(config, **{**size, **changes})


# What each is published as on the Hugging Face hub stands beside it.
SHAPES: dict[str, VitConfig] = {
  # openai/clip-vit-base-patch32
  "clip_b32": _made(_CLIP, _BASE, patch_size=32, num_outputs=512),
  # openai/clip-vit-base-patch16
  "clip_b16": _made(_CLIP, _BASE, patch_size=16, num_outputs=512),
  # openai/clip-vit-large-patch14
  "clip_l14": _made(_CLIP, _LARGE, patch_size=14, num_outputs=768),
  # openai/clip-vit-large-patch14-336, the encoder of LLaVA-1.5
  "clip_l14_336": _made(
    _CLIP, _LARGE, patch_size=14, image_size=336, num_outputs=768
  ),
  # google/siglip-base-patch16-224
  "siglip_b16": _made(_SIGLIP, _BASE),
  # google/siglip-so400m-patch14-384, the encoder of LLaVA-OneVision
  "siglip_so400m": _made(
    _SIGLIP,
    {"width": 1152, "num_heads": 16, "mlp_width": 4304, "num_layers": 27},
    patch_size=14,
    image_size=384,
  ),
  # facebook/dinov2-small, -base, -large and dinov2-with-registers-...
  "dinov2_s14": _made(_DINOV2, _SMALL),
  "dinov2_b14": _made(_DINOV2, _BASE),
  "dinov2_l14": _made(_DINOV2, _LARGE),
  "dinov2_registers_s14": _made(_DINOV2_REGISTERS, _SMALL),
  "dinov2_registers_b14": _made(_DINOV2_REGISTERS, _BASE),
  "dinov2_registers_l14": _made(_DINOV2_REGISTERS, _LARGE),
  # facebook/deit-small-patch16-224 and the distilled one
  "deit_s16": _made(_VIT, _SMALL),
  "deit_s16_distilled": _made(_DEIT, _SMALL),
  # google/vit-base-patch16-224 and -large-, AugReg
  "vit_b16": _made(_VIT, _BASE),
  "vit_l16": _made(_VIT, _LARGE),
}


def shape(name: str) -> VitConfig:
  """The shape of a published encoder, to change with `dataclasses.replace`.

  Args:
    name: one of `SHAPES`.

  Returns:
    A copy of its config.

  Raises:
    ValueError: for an unknown name; lists those that are known.

  Example:
    >>> shape("clip_l14_336").grid
    (24, 24)

  Source: the `config.json` of the models that `SHAPES` names.
  """
  checks.one_of(tuple(SHAPES), name=name)
  return dataclasses.replace(SHAPES[name])


def check(config: VitConfig) -> None:
  """Raises ValueError for fields that do not fit each other.

  Args:
    config: the shape; the message names its field.

  Example:
    >>> check(VitConfig(width=10, num_heads=3))
    Traceback (most recent call last):
    ValueError: width must be a multiple of 3, got 10
  """
  checks.divisible(config.num_heads, width=config.width)
  checks.in_range(1, config.image_size, patch_size=config.patch_size)
  checks.one_of(ACTIVATIONS, activation=config.activation)
  checks.one_of(POOLS, pool=config.pool)
  if config.pool == "class" and not config.class_token:
    raise ValueError("pool must not be 'class' without a class_token")
  if config.distill_token and not config.class_token:
    raise ValueError("distill_token needs a class_token before it")
  if config.distill_head and not (config.distill_token and config.num_outputs):
    raise ValueError("distill_head needs a distill_token and num_outputs")

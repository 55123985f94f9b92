"""Named real shapes of attention over rings, for tests and compiles."""

import dataclasses

__all__ = ["SHAPES", "Shape"]


@dataclasses.dataclass(frozen=True)
class Shape:
  """Sizes of the attention of one layer, on one device of a ring.

  Attributes:
    name: short name for tables.
    num_rows: of a device.
    heads: query heads.
    key_heads: key heads, a divisor of `heads`.
    dim: width of one head.
  """

  name: str
  num_rows: int
  heads: int
  key_heads: int
  dim: int


# llama: the 8 billion weights of Llama 3 on 32,768 tokens of 4 devices. vit:
# patches of 64 frames of ViT-L/14 at 224 pixels, on 4 devices.
SHAPES: dict[str, Shape] = {
  shape.name: shape
  for shape in (
    Shape("llama", 8_192, heads=32, key_heads=8, dim=128),
    Shape("vit", 4_096, heads=16, key_heads=16, dim=64),
  )
}

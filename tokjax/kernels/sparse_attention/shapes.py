"""Named real shapes of attention under rules, shared by tests and compiles."""

import dataclasses

__all__ = ["SHAPES", "Shape"]


@dataclasses.dataclass(frozen=True)
class Shape:
  """Sizes of one layer.

  Attributes:
    name: short name for tables.
    num_tokens: rows and keys.
    heads: query heads.
    key_heads: key heads, a divisor of `heads`.
    dim: width of one head.
  """

  name: str
  num_tokens: int
  heads: int
  key_heads: int
  dim: int = 128


# prompt: a Llama 3.1 8B reading 32,768 tokens. scales: the 680 tokens of VAR
# over ten scales. window: one group of AnchorAttention with its first and last
# keys, a head. pictures: LLaVA-NeXT, five pictures of 576 in a text.
SHAPES: dict[str, Shape] = {
  shape.name: shape
  for shape in (
    Shape("prompt", 32_768, 32, 8),
    Shape("scales", 680, 16, 16, dim=64),
    Shape("window", 2_304, 1, 1),
    Shape("pictures", 3_008, 32, 32),
  )
}

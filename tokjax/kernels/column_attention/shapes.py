"""Named real shapes of column attention, shared by tests and compiles."""

import dataclasses

__all__ = ["SHAPES", "Shape"]


@dataclasses.dataclass(frozen=True)
class Shape:
  """Sizes of one self-attention layer whose columns are wanted.

  Attributes:
    name: short name for tables.
    num_tokens: rows and keys.
    heads: query heads.
    key_heads: key heads, a divisor of `heads`.
    dim: width of one head.
  """

  name: str
  num_tokens: int
  heads: int = 16
  key_heads: int = 16
  dim: int = 64

  @property
  def flops(self) -> int:
    """Operations of one product of all rows with all keys."""
    return 2 * self.heads * self.num_tokens**2 * self.dim


# image: the patches of one CLIP ViT-L/14 image at 336 pixels. tiles: the five
# crops of LLaVA-NeXT. video: thirty frames of about 550 tokens. decoder: a
# prompt of 2,880 visual tokens in a language model with grouped keys.
SHAPES: dict[str, Shape] = {
  shape.name: shape
  for shape in (
    Shape("image", 576),
    Shape("tiles", 2_880),
    Shape("video", 16_384),
    Shape("decoder", 3_072, heads=28, key_heads=4, dim=128),
  )
}

"""Named real shapes of nearest-code search, for tests, benchmarks, compiles."""

import dataclasses

__all__ = ["SHAPES", "Shape"]


@dataclasses.dataclass(frozen=True)
class Shape:
  """Sizes of one search.

  Attributes:
    name: short name for tables.
    num_tokens: vectors that are quantised at once.
    num_codes: size of the codebook.
    dim: width of a code.
  """

  name: str
  num_tokens: int
  num_codes: int
  dim: int

  @property
  def flops(self) -> int:
    """Operations of the product of all tokens with all codes."""
    return 2 * self.num_tokens * self.num_codes * self.dim


# Images times tokens of an image. titok: TiTok-L-32. var: one pass over the
# largest scale of VAR. llamagen: LlamaGen at 256 pixels, whose scores would
# take 4.3 GB. vqgan: VQGAN with 16,384 codes. ibq: index backpropagation with
# the largest published codebook.
SHAPES: dict[str, Shape] = {
  shape.name: shape
  for shape in (
    Shape("titok", 256 * 32, 4_096, 12),
    Shape("var", 32 * 256, 4_096, 32),
    Shape("llamagen", 256 * 256, 16_384, 8),
    Shape("vqgan", 16 * 256, 16_384, 256),
    Shape("ibq", 16 * 256, 262_144, 256),
  )
}

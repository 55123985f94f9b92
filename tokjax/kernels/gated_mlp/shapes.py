"""Named real shapes of gated MLPs, for tests, benchmarks and compiles."""

import dataclasses

__all__ = ["SHAPES", "Shape"]


@dataclasses.dataclass(frozen=True)
class Shape:
  """Sizes of one MLP.

  Attributes:
    name: short name for tables.
    dim: width of a token.
    num_units: hidden units, F.
  """

  name: str
  dim: int
  num_units: int

  @property
  def num_weights(self) -> int:
    """Values of one of the three matrices."""
    return self.dim * self.num_units


SHAPES: dict[str, Shape] = {
  shape.name: shape
  for shape in (
    Shape("llama_7b", 4096, 11_008),
    Shape("mistral_7b", 4096, 14_336),
  )
}

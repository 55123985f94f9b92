"""Named real shapes of greedy selection, for tests, benchmarks, compiles."""

import dataclasses

__all__ = ["SHAPES", "Shape"]


@dataclasses.dataclass(frozen=True)
class Shape:
  """Sizes of one greedy selection.

  Attributes:
    name: short name for tables.
    batch: examples selected from at once.
    num_tokens: candidates of each.
    num_keep: picks of each.
    num_texts: targets on top of the tokens themselves, in "coverage".
    dtype: element type of the table.
  """

  name: str
  batch: int
  num_tokens: int
  num_keep: int
  num_texts: int = 64
  dtype: str = "float32"


def _named(*shapes: Shape) -> dict[str, Shape]:
  return {shape.name: shape for shape in shapes}


# image: one image of LLaVA-1.5. tiles: five tiles of LLaVA-NeXT in one pool.
# video: 64 frames of 256 tokens, whose float32 table would take 1 GiB.
SHAPES: dict[str, Shape] = _named(
  Shape("image", 8, 576, 64),
  Shape("tiles", 8, 2_880, 320),
  Shape("video", 1, 16_384, 1_024, dtype="bfloat16"),
)

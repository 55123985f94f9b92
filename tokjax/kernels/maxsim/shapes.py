"""Named real shapes of MaxSim, shared by tests, benchmarks and compiles."""

import dataclasses

__all__ = ["DIMS", "SHAPES", "Shape"]

# Widths of published late-interaction models, most common first: ColBERT (128),
# mxbai-edge (64), answerai-colbert-small (96), colbert-muvera-femto (48).
DIMS = (128, 96, 64, 48)


@dataclasses.dataclass(frozen=True)
class Shape:
  """Sizes of one MaxSim call.

  Attributes:
    name: short name for tables.
    num_queries: queries scored at once.
    num_documents: documents scored at once.
    query_tokens: vectors of one query.
    document_tokens: vectors of one document.
    dim: width of a vector.
  """

  name: str
  num_queries: int
  num_documents: int
  query_tokens: int
  document_tokens: int
  dim: int = 128

  @property
  def flops(self) -> int:
    """Floating-point operations of the similarities, two per product."""
    rows = self.num_queries * self.query_tokens
    columns = self.num_documents * self.document_tokens
    return 2 * rows * columns * self.dim


def _named(*shapes: Shape) -> dict[str, Shape]:
  return {shape.name: shape for shape in shapes}


# rerank: one query, the candidates of a first stage. long: candidates of a
# long-context encoder. corpus: a shard of a corpus. batch: a training batch
# with in-batch negatives. patches: page images, both sides 1,024 vectors.
SHAPES: dict[str, Shape] = _named(
  Shape("rerank", 1, 1_000, 32, 300),
  Shape("long", 1, 1_000, 32, 1_024),
  Shape("corpus", 1, 10_000, 32, 300),
  Shape("batch", 128, 128, 32, 300),
  Shape("patches", 1, 1_000, 1_024, 1_024),
)

"""How the TPU kernels of MaxSim cut their arrays into tiles.

The axes of a grid have one letter each: i query tiles, c parts of a query, j
document tiles, l token blocks of a document. R is the number of query rows of
a tile; bq, bd and bl are its queries, documents and document tokens.
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl

__all__ = ["Tiles"]


class Tiles:
  """How the arrays are cut into tiles.

  Documents stay as they are, since a copy would double the traffic: blocks at
  the edge reach past the array and the mask, which is padded with False,
  keeps what lies there out. The small arrays are padded and regrouped.

  Attributes:
    num_i: query tiles.
    num_c: parts into which the tokens of each query are cut.
    num_j: document tiles.
    num_l: token blocks of a document.
  """

  def __init__(self, sizes, query_shape, document_shape):
    self.sizes = sizes
    self.num_queries, self.query_tokens, self.width = query_shape
    self.num_documents, self.document_tokens, _ = document_shape
    self.num_i = pl.cdiv(self.num_queries, sizes.queries)
    self.num_c = pl.cdiv(self.query_tokens, sizes.query_tokens)
    self.num_j = pl.cdiv(self.num_documents, sizes.documents)
    self.num_l = pl.cdiv(self.document_tokens, sizes.document_tokens)
    if self.num_c > 1 and sizes.queries > 1:
      raise ValueError(
        "a tile holds parts of one query or several whole queries, got "
        f"queries={sizes.queries} and query_tokens={sizes.query_tokens} of "
        f"{self.query_tokens}"
      )

  def query_tiles(self, x):
    """[Nq, Q, k] -> [I, C, R, k], padded with zeros."""
    x = _pad(x, self._padded_queries, self._padded_query_tokens)
    return x.reshape(self.num_i, self.num_c, self.sizes.rows, -1)

  def queries_from_tiles(self, x):
    """[I, C, R, k] -> [Nq, Q, k]."""
    x = x.reshape(self._padded_queries, self._padded_query_tokens, -1)
    return x[: self.num_queries, : self.query_tokens]

  def pad_tokens(self, document_mask):
    """[Nd, N] -> [J * bd, L * bl], padded with False."""
    return _pad(
      document_mask,
      self._padded_documents,
      self.num_l * self.sizes.document_tokens,
    )

  def pad_pairs(self, x):
    """[Nq, Nd] -> [I * bq, J * bd], padded with zeros."""
    return _pad(x, self._padded_queries, self._padded_documents)

  def blocks_in_use(self, document_mask):
    """int32[J]: token blocks up to the last valid token of a tile."""
    mask = self.pad_tokens(document_mask)
    mask = mask.reshape(self.num_j, self.sizes.documents, self.num_l, -1)
    used = jnp.any(mask, axis=(1, 3))  # [J, L]
    ends = jnp.where(used, jnp.arange(1, self.num_l + 1)[None], 0)
    return jnp.max(ends, axis=1).astype(jnp.int32)

  def index_to_tiles(self, index):
    """[Nq, Nd, Q] -> [I, C, J * bd, R], padded with -1."""
    index = jnp.pad(
      index,
      (
        (0, self._padded_queries - self.num_queries),
        (0, self._padded_documents - self.num_documents),
        (0, self._padded_query_tokens - self.query_tokens),
      ),
      constant_values=-1,
    )
    sizes = self.sizes
    index = index.reshape(
      self.num_i, sizes.queries, -1, self.num_c, sizes.query_tokens
    )
    index = index.transpose(0, 3, 2, 1, 4)  # [I, C, J * bd, bq, bQ]
    return index.reshape(self.num_i, self.num_c, -1, sizes.rows)

  def index_from_tiles(self, index):
    """[I, C, J * bd, R] -> [Nq, Nd, Q]."""
    sizes = self.sizes
    index = index.reshape(
      self.num_i, self.num_c, -1, sizes.queries, sizes.query_tokens
    )
    index = index.transpose(0, 3, 2, 1, 4)  # [I, bq, J * bd, C, bQ]
    index = index.reshape(self._padded_queries, -1, self._padded_query_tokens)
    return index[: self.num_queries, : self.num_documents, : self.query_tokens]

  def cost(self, bytes_accessed):
    """What one kernel tells XLA: a product of every pair of tokens."""
    pairs = self.num_queries * self.query_tokens * self.num_documents
    return pl.CostEstimate(
      flops=2 * pairs * self.document_tokens * self.width,
      transcendentals=0,
      bytes_accessed=bytes_accessed,
    )

  @property
  def _padded_queries(self):
    return self.num_i * self.sizes.queries

  @property
  def _padded_query_tokens(self):
    return self.num_c * self.sizes.query_tokens

  @property
  def _padded_documents(self):
    return self.num_j * self.sizes.documents


def _pad(x, rows, columns):
  """Zeros after the first two axes, up to these sizes."""
  pads = [(0, rows - x.shape[0]), (0, columns - x.shape[1])]
  return jnp.pad(x, pads + [(0, 0)] * (x.ndim - 2))

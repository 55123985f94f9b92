"""Additive codes: a vector as a sum of codes, one of each of several books.

Product and residual codes are the special cases whose books are zero outside
of a group, and whose codes were chosen one after the other. Here all codes of
a vector are chosen together (`additive_encoding`) and all books are learned
together (`additive_training`).

    decoded = aq_decode(codebooks, codes)              # [M, K, D], [N, M]
    norms = aq_squared_norms(codebooks, codes)         # stored beside codes
    distances = aq_distances(codebooks, codes, norms, queries)

A code -1 adds nothing. |sum e|^2 = sum |e|^2 + the cross term, twice the sum of
the inner products of codes of different books. Composite quantisation keeps
the cross term nearly constant, so that distances need no stored number.

Sources: Babenko, Lempitsky, 2014, "Additive Quantization for Extreme Vector
Compression"; Zhang, Du, Wang, 2014, "Composite Quantization for Approximate
Nearest Neighbor Search".
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.ops.rows import take_rows
from tokjax.typing import Array, Float, Int

__all__ = [
  "CrossTerm",
  "aq_cross_term",
  "aq_decode",
  "aq_distances",
  "aq_from_pq",
  "aq_scores",
  "aq_squared_norms",
]


class CrossTerm(NamedTuple):
  """The cross term over vectors: constant where the spread is 0.

  Attributes:
    mean: over the vectors that have codes; 0 without any.
    spread: standard deviation over them.
  """

  mean: Float[Array, "*batch"]
  spread: Float[Array, "*batch"]


def aq_decode(
  codebooks: Float[Array, "M K D"], codes: Int[Array, "*batch M"]
) -> Float[Array, "*batch D"]:
  """Sums of codes.

  Args:
    codebooks: M books of K codes, whole on every device.
    codes: one number per book, -1 for none.

  Returns:
    float32 vectors, laid out as the codes. Their gradient goes to the books.

  Raises:
    ValueError: if the number of books disagrees.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> books = jnp.array([[[0.0, 1.0], [2.0, 0.0]], [[0.5, 0.5], [0.0, 4.0]]])
    >>> jax.jit(aq_decode)(books, jnp.array([[1, 0], [0, -1]])).tolist()
    [[2.5, 0.5], [0.0, 1.0]]

  Cost: reads and adds N M D numbers.
  """
  return _sums(codebooks, codes)[0]


def aq_cross_term(
  codebooks: Float[Array, "M K D"], codes: Int[Array, "*batch M"]
) -> CrossTerm:
  """Mean and spread of what norms have beyond those of the single codes.

  Args:
    codebooks: M books of K codes.
    codes: one number per book; a vector without any code does not count.

  Returns:
    float32, over all vectors. The gradient goes to the books.

  Raises:
    ValueError: if the number of books disagrees.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> books = jnp.array([[[0.0, 1.0], [2.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]]])
    >>> cross = jax.jit(aq_cross_term)(books, jnp.array([[0, 0], [1, 1]]))
    >>> cross.mean.item(), cross.spread.item()
    (3.0, 1.0)

  Cost: reads and adds 2 N M D numbers.
  """
  decoded, squares = _sums(codebooks, codes)
  cross = jnp.sum(jnp.square(decoded), axis=-1) - squares
  counts = jnp.any(codes >= 0, axis=-1)
  total = jnp.maximum(jnp.sum(counts), 1)
  mean = jnp.sum(jnp.where(counts, cross, 0)) / total
  away = jnp.where(counts, jnp.square(cross - mean), 0)
  variance = jnp.sum(away) / total
  # The inner `where` keeps sqrt away from 0, whose gradient is infinite.
  spread = jnp.sqrt(jnp.where(variance > 0, variance, 1))
  return CrossTerm(mean, jnp.where(variance > 0, spread, 0))


def aq_squared_norms(
  codebooks: Float[Array, "M K D"],
  codes: Int[Array, "*batch M"],
  cross_term: float | Float[Array, ""] | None = None,
) -> Float[Array, "*batch"]:
  """Squared lengths of decoded vectors, which distances need.

  Args:
    codebooks: M books of K codes.
    codes: one number per book.
    cross_term: its mean, for books of composite quantisation: lengths are then
      a sum over the single codes and need not be stored. None: as they are.

  Returns:
    float32.

  Raises:
    ValueError: if the number of books disagrees.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> books = jnp.array([[[0.0, 1.0], [2.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]]])
    >>> norms = jax.jit(aq_squared_norms)
    >>> codes = jnp.array([[0, 0], [1, 1]])
    >>> norms(books, codes).tolist(), norms(books, codes, 3.0).tolist()
    ([4.0, 9.0], [5.0, 8.0])

  Cost: reads and adds N M D numbers.
  """
  decoded, squares = _sums(codebooks, codes)
  if cross_term is None:
    return jnp.sum(jnp.square(decoded), axis=-1)
  return squares + cross_term


@functools.partial(jax.jit, static_argnames=("block_size",))
def aq_scores(
  codebooks: Float[Array, "M K D"],
  codes: Int[Array, "Nd M"],
  queries: Float[Array, "Nq D"],
  *,
  block_size: int = 256,
) -> Float[Array, "Nq Nd"]:
  """Inner products of float queries with documents stored as additive codes.

  Equals queries @ aq_decode(codebooks, codes).T without the decoded matrix. A
  few queries (under 16, as in `quantize.pq_scores`) look up M tables of
  <query, code>; more share the decoding of a block of documents.

  Args:
    codebooks: M books of K codes.
    codes: of the documents.
    queries: float queries.
    block_size: documents decoded at a time.

  Returns:
    float32 scores.

  Raises:
    ValueError: if books or widths disagree.

  Example:
    >>> import jax.numpy as jnp
    >>> books = jnp.array([[[0.0, 1.0], [2.0, 0.0]], [[0.5, 0.5], [0.0, 4.0]]])
    >>> codes = jnp.array([[1, 0], [0, 1]])
    >>> aq_scores(books, codes, jnp.array([[1.0, 2.0]])).tolist()
    [[3.5, 10.0]]

  Cost: 2 M K D Nq FLOPs and M Nq Nd reads; or M Nd D reads and 2 Nq Nd D
  FLOPs.
  """
  _check(codebooks, codes)
  checks.has_rank(2, codes=codes, queries=queries)
  checks.same_size(
    queries_width=queries.shape[1], codebooks_width=codebooks.shape[2]
  )
  checks.in_range(1, 1 << 30, block_size=block_size)
  codebooks = codebooks.astype(jnp.float32)
  queries = queries.astype(jnp.float32)
  if queries.shape[0] < 16:
    tables = jnp.einsum("mkd,qd->mkq", codebooks, queries, precision="highest")
    return aq_decode(tables, codes).T  # a sum of rows of tables, too

  def score(block):  # [b, M] -> [b, Nq]
    decoded = aq_decode(codebooks, block)
    return jnp.matmul(decoded, queries.T, precision="highest")

  size = min(block_size, codes.shape[0])
  blocks = jnp.pad(codes, [(0, -codes.shape[0] % size), (0, 0)])
  blocks = blocks.reshape(-1, size, codes.shape[1])
  scores = jax.lax.map(score, blocks).reshape(-1, queries.shape[0])
  return scores[: codes.shape[0]].T


def aq_distances(
  codebooks: Float[Array, "M K D"],
  codes: Int[Array, "Nd M"],
  squared_norms: Float[Array, " Nd"],
  queries: Float[Array, "Nq D"],
  *,
  block_size: int = 256,
) -> Float[Array, "Nq Nd"]:
  """Squared distances of float queries to additive codes.

  |q - x|^2 = |q|^2 - 2 <q, x> + |x|^2, with rounding relative to |q|^2: centre
  vectors that lie far from zero.

  Args:
    codebooks: M books of K codes.
    codes: of the documents.
    squared_norms: of the documents, from `aq_squared_norms`.
    queries: float queries.
    block_size: documents decoded at a time.

  Returns:
    float32; below 0 by rounding, or with norms that are only nearly right.

  Raises:
    ValueError: if sizes disagree.

  Example:
    >>> import jax.numpy as jnp
    >>> books = jnp.array([[[0.0, 1.0], [2.0, 0.0]], [[0.5, 0.5], [0.0, 4.0]]])
    >>> codes = jnp.array([[1, 0], [0, 1]])
    >>> norms = aq_squared_norms(books, codes)
    >>> aq_distances(books, codes, norms, jnp.array([[1.0, 2.0]])).tolist()
    [[4.5, 10.0]]

  Cost: as `aq_scores`.
  """
  checks.same_size(codes=codes.shape[0], squared_norms=squared_norms.shape[0])
  scores = aq_scores(codebooks, codes, queries, block_size=block_size)
  squares = jnp.sum(jnp.square(queries.astype(jnp.float32)), axis=1)
  return squares[:, None] - 2 * scores + squared_norms[None, :]


def aq_from_pq(
  codebook: Float[Array, "M K g"], rotation: Float[Array, "D D"] | None = None
) -> Float[Array, "M K D"]:
  """Product codebooks as books of whole width, for the same codes.

  Args:
    codebook: centroids of each group of dimensions.
    rotation: R of `product_codes.OPQ`; None for plain product codes.

  Returns:
    float32 books, zero (before R^T) outside of their group.

  Raises:
    ValueError: if the widths disagree.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> codebook = jnp.array([[[1.0], [2.0]], [[3.0], [4.0]]])
    >>> jax.jit(aq_from_pq)(codebook).tolist()
    [[[1.0, 0.0], [2.0, 0.0]], [[0.0, 3.0], [0.0, 4.0]]]

  Cost: 2 M K D^2 FLOPs with a rotation.
  """
  checks.has_rank(3, codebook=codebook)
  num_groups, _, group_size = codebook.shape
  place = jnp.eye(num_groups * group_size).reshape(num_groups, group_size, -1)
  if rotation is not None:
    checks.same_size(
      rotation_rows=rotation.shape[0], codebook_width=place.shape[2]
    )
    place = jnp.matmul(place, rotation.astype(jnp.float32), precision="highest")
  return jnp.einsum(
    "mkg,mgd->mkd", codebook.astype(jnp.float32), place, precision="highest"
  )


def _sums(codebooks, codes):
  """Decoded vectors and the sums of |e|^2 of their codes."""
  _check(codebooks, codes)
  codebooks = codebooks.astype(jnp.float32)

  def book(sums, inputs):
    table, code = inputs  # [K, D], [*batch]
    chosen = take_rows(table, code.astype(jnp.int32))
    found = chosen, jnp.sum(jnp.square(chosen), axis=-1)
    return jax.tree.map(jnp.add, sums, found), None

  inputs = codebooks, jnp.moveaxis(codes, -1, 0)
  first = jax.tree.map(lambda x: x[0], inputs)
  start = jax.tree.map(jnp.zeros_like, book((0.0, 0.0), first)[0])
  return jax.lax.scan(book, start, inputs)[0]


def _check(codebooks, codes):
  checks.has_rank(3, codebooks=codebooks)
  checks.same_size(codes_books=codes.shape[-1], codebooks=codebooks.shape[0])

"""Random projections: SimHash bits, sign projections, count sketches.

All keep inner products in expectation (or, for SimHash, angles), so two sides
that are compared must use the same random numbers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.typing import Array, Bool, Float, Int, Key

__all__ = [
  "CountSketch",
  "bits_to_index",
  "count_sketch",
  "init_count_sketch",
  "init_hyperplanes",
  "init_signs",
  "nearest_by_hamming",
  "simhash_bits",
  "sign_projection",
  "sketch_matrix",
]


class CountSketch(NamedTuple):
  """Where each coordinate goes, and with which sign.

  Attributes:
    index: output coordinate of every input coordinate, int32.
    sign: +1 or -1, int8.
  """

  index: Int[Array, "*batch n"]
  sign: Int[Array, "*batch n"]


def init_hyperplanes(
  key: Key[Array, ""], shape: tuple[int, ...]
) -> Float[Array, "..."]:
  """Normals of random hyperplanes: standard normal numbers, float32.

  The numbers are rounded to what bfloat16 can hold, so that bfloat16 tokens
  are hashed by the very hyperplanes that float32 tokens are. A rounded normal
  is as random a direction as any.

  Args:
    key: PRNG key.
    shape: for one set of k hyperplanes (D, k).

  Returns:
    float32 of the shape.

  Example:
    >>> import jax
    >>> init_hyperplanes(jax.random.key(0), (8, 3)).shape
    (8, 3)
  """
  normal = jax.random.normal(key, shape, jnp.float32)
  return normal.astype(jnp.bfloat16).astype(jnp.float32)


def simhash_bits(
  x: Float[Array, "*batch D"], hyperplanes: Float[Array, "D k"]
) -> Bool[Array, "*batch k"]:
  """On which side of each hyperplane a vector lies: 1[x . h > 0].

  Two vectors at angle a differ in each bit with probability a / pi. The
  comparison is strict: a zero vector has no bit set.

  Args:
    x: vectors, any float dtype; products of float32 inputs are exact to
      float32, sums are float32.
    hyperplanes: normals in columns (`init_hyperplanes`).

  Returns:
    Booleans. No gradient flows.

  Raises:
    ValueError: if the widths disagree.

  Example:
    >>> import jax.numpy as jnp
    >>> simhash_bits(jnp.array([[0.8, 0.6], [1.0, 0.0]]), jnp.eye(2)).tolist()
    [[True, True], [True, False]]

  Source: Charikar, 2002, "Similarity Estimation Techniques from Rounding
  Algorithms".
  """
  checks.same_size(x_width=x.shape[-1], hyperplanes=hyperplanes.shape[0])
  x, hyperplanes = jax.lax.stop_gradient((x, hyperplanes))
  sides = jnp.matmul(
    x,
    hyperplanes.astype(x.dtype),
    precision="highest",
    preferred_element_type=jnp.float32,
  )
  return sides > 0


def bits_to_index(bits: Bool[Array, "*batch k"]) -> Int[Array, "*batch"]:
  """The integer sum_t bits[t] 2^t, which names a cell of the hypercube.

  Args:
    bits: at most 30 of them, the lowest first.

  Returns:
    int32 in 0..2^k - 1; zeros for k = 0.

  Raises:
    ValueError: if there are too many bits.

  Example:
    >>> import jax.numpy as jnp
    >>> bits_to_index(jnp.array([[True, False], [True, True]])).tolist()
    [1, 3]
  """
  checks.in_range(0, 30, num_bits=bits.shape[-1])
  index = jnp.zeros_like(bits, shape=bits.shape[:-1], dtype=jnp.int32)
  for t in range(bits.shape[-1]):
    index = index + bits[..., t].astype(jnp.int32) * 2**t
  return index


def nearest_by_hamming(
  first: Int[Array, "*batch C"], *, num_tokens: int
) -> Int[Array, "*batch C"]:
  """The token whose bits differ least from each cell, ties to the lowest token.

  A distance transform of the hypercube: the key of a cell, Hamming distance
  times `num_tokens` plus token, is relaxed along one bit after the other, so k
  passes over C = 2^k cells replace a comparison of every token with every
  cell.

  Args:
    first: lowest token in each cell, `num_tokens` or more where there is none.
      C is a power of two; cell numbers come from `bits_to_index`.
    num_tokens: tokens are 0..num_tokens - 1; times k + 2 it must fit int32.

  Returns:
    int32 token for every cell, a cell's own first token where it has one;
    `num_tokens` everywhere if no cell has one.

  Raises:
    ValueError: if C is not a power of two.

  Example:
    >>> import jax.numpy as jnp
    >>> cells = jnp.array([9, 9, 2, 0])  # tokens 0 in 11, 2 in 10
    >>> nearest_by_hamming(cells, num_tokens=3).tolist()
    [2, 0, 2, 0]
  """
  num_cells = first.shape[-1]
  num_bits = num_cells.bit_length() - 1
  checks.one_of((2**num_bits,), num_cells=num_cells)
  # Above any real key, and low enough that k more steps do not overflow.
  nobody = (num_bits + 1) * num_tokens
  checks.in_range(0, 2**31 - 1, largest_key=nobody + num_bits * num_tokens)
  key = jnp.where(first < num_tokens, first, nobody)
  for t in range(num_bits):
    pairs = key.reshape(*first.shape[:-1], -1, 2, 2**t)  # axis -2 is bit t
    moved = jnp.flip(pairs, axis=-2) + num_tokens
    key = jnp.minimum(pairs, moved).reshape(first.shape)
  return jnp.where(key < nobody, key % num_tokens, num_tokens)


def init_signs(
  key: Key[Array, ""], shape: tuple[int, ...]
) -> Float[Array, "..."]:
  """Independent +1 and -1 with equal chance, float32.

  Args:
    key: PRNG key.
    shape: for one projection from D to d (D, d).

  Returns:
    float32 of the shape.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> bool(jnp.all(jnp.abs(init_signs(jax.random.key(0), (4, 2))) == 1))
    True
  """
  return jax.random.rademacher(key, shape, jnp.float32)


def sign_projection(
  x: Float[Array, "*batch D"], signs: Float[Array, "D d"]
) -> Float[Array, "*batch d"]:
  """x @ signs / sqrt(d): inner products are kept in expectation.

  For independent signs, E <Px, Py> = <x, y> with a variance of at most
  2 |x|^2 |y|^2 / d. The scale is applied after the product, so that signs stay
  exact in bfloat16. Costs 2 D d FLOPs per vector. Gradients flow through x.

  Args:
    x: vectors, any float dtype; sums are float32.
    signs: +1 and -1 (`init_signs`).

  Returns:
    float32.

  Raises:
    ValueError: if the widths disagree.

  Example:
    >>> import jax.numpy as jnp
    >>> signs = jnp.array([[1.0], [-1.0]])
    >>> sign_projection(jnp.array([3.0, 1.0]), signs).tolist()
    [2.0]

  Source: Achlioptas, 2003, "Database-friendly random projections".
  """
  checks.same_size(x_width=x.shape[-1], signs=signs.shape[0])
  projected = jnp.matmul(
    x,
    signs.astype(x.dtype),
    precision="highest",
    preferred_element_type=jnp.float32,
  )
  return projected / signs.shape[1] ** 0.5


def init_count_sketch(
  key: Key[Array, ""], shape: tuple[int, ...], *, num_outputs: int
) -> CountSketch:
  """A random output coordinate and a random sign for every input coordinate.

  Args:
    key: PRNG key.
    shape: (n,) for inputs of width n, or with leading axes for several
      sketches.
    num_outputs: width of the outputs.

  Returns:
    The sketch, index and sign of the shape.

  Raises:
    ValueError: if `num_outputs` is below 1.

  Example:
    >>> import jax
    >>> sketch = init_count_sketch(jax.random.key(0), (6,), num_outputs=2)
    >>> bool((sketch.index < 2).all())
    True
  """
  checks.in_range(1, 2**31 - 1, num_outputs=num_outputs)
  index_key, sign_key = jax.random.split(key)
  return CountSketch(
    index=jax.random.randint(index_key, shape, 0, num_outputs, jnp.int32),
    sign=jax.random.rademacher(sign_key, shape, jnp.int8),
  )


def count_sketch(
  x: Float[Array, "*batch n"], sketch: CountSketch, *, num_outputs: int
) -> Float[Array, "*batch o"]:
  """out[index[t]] += sign[t] x[t]: a shorter vector, unbiased inner products.

  Linear in x, one addition per coordinate, and E <Cx, Cy> = <x, y> over random
  sketches. Gradients flow through x.

  Args:
    x: vectors, any float dtype; sums are float32.
    sketch: from `init_count_sketch`, the same for all vectors compared.
    num_outputs: as given to `init_count_sketch`, static.

  Returns:
    float32.

  Raises:
    ValueError: if the sketch is for another width.

  Example:
    >>> import jax.numpy as jnp
    >>> sketch = CountSketch(jnp.array([0, 1, 0, 1]), jnp.array([1, -1, -1, 1]))
    >>> count_sketch(jnp.arange(1.0, 5.0), sketch, num_outputs=2).tolist()
    [-2.0, 2.0]

  Source: Charikar, Chen, Farach-Colton, 2002, "Finding Frequent Items in Data
  Streams".
  """
  checks.has_rank(1, index=sketch.index, sign=sketch.sign)
  checks.same_size(
    x_width=x.shape[-1], index=sketch.index.shape[0], sign=sketch.sign.shape[0]
  )
  checks.in_range(1, 2**31 - 1, num_outputs=num_outputs)
  sign = sketch.sign.astype(jnp.float32)
  # Coordinates first: the scatter then adds whole rows of the batch.
  rows = jnp.moveaxis(x.astype(jnp.float32), -1, 0)  # [n, ...]
  rows = rows * sign.reshape(-1, *(1,) * (x.ndim - 1))
  # Zeros that inherit the sharding of the batch axes.
  out = jnp.pad(rows[:0], [(0, num_outputs)] + [(0, 0)] * (x.ndim - 1))
  return jnp.moveaxis(out.at[sketch.index].add(rows), 0, -1)


def sketch_matrix(
  sketch: CountSketch, *, num_outputs: int
) -> Float[Array, "*batch n o"]:
  """The count sketch as a dense matrix, for narrow inputs: x @ matrix.

  Args:
    sketch: index and sign of every input coordinate.
    num_outputs: width of the outputs, static.

  Returns:
    float32 with one +1 or -1 in each row.

  Example:
    >>> import jax.numpy as jnp
    >>> sketch = CountSketch(jnp.array([0, 1]), jnp.array([1, -1]))
    >>> sketch_matrix(sketch, num_outputs=3).tolist()
    [[1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]
  """
  chosen = jax.nn.one_hot(sketch.index, num_outputs, dtype=bool)
  return jnp.where(chosen, sketch.sign.astype(jnp.float32)[..., None], 0)

"""Learning the books of additive quantisation: codes and books in turns.

Given the codes, the best books are a least squares problem: x ~ B C, where row
n of B marks the codes of vector n. Given the books, `additive_encoding` chooses
the codes. Both steps together never raise the error.

    books = aq_from_pq(pq_train(key, sample, group_size=16))
    fit = aq_fit(key, sample, books, pq_codes)
    codes = aq_encode_icm(fit.codebooks, vectors, num_rounds=16, key=key)

A start from residual quantisation is as good: its books and codes have the same
form. Nothing here passes a gradient.

Sources: least squares, Babenko, Lempitsky, 2014, "Additive Quantization for
Extreme Vector Compression"; with co-occurrences and a Cholesky factor, in turns
with ICM, Martinez et al., 2018, "LSQ++: Lower running time and higher recall in
multi-codebook quantization" (without its annealing); the penalty, Zhang, Du,
Wang, 2014, "Composite Quantization for Approximate Nearest Neighbor Search".
Written from the methods; there was no code to compare with.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy import linalg

from tokjax import checks
from tokjax.ops.additive_codes import aq_cross_term, aq_decode
from tokjax.ops.additive_encoding import CrossPenalty, aq_encode_icm
from tokjax.ops.rows import sum_rows
from tokjax.typing import Array, Float, Int, Key

__all__ = ["AdditiveFit", "aq_fit", "aq_update", "cq_update"]


class AdditiveFit(NamedTuple):
  """Books, the codes of the training vectors, and how it went.

  Attributes:
    codebooks: M books of K codes.
    codes: of the training vectors.
    distortion: mean squared error of the start and after each iteration.
    cross_spread: standard deviation of the cross term, likewise.
  """

  codebooks: Float[Array, "*batch M K D"]
  codes: Int[Array, "*batch n M"]
  distortion: Float[Array, "*batch I"]
  cross_spread: Float[Array, "*batch I"]


@functools.partial(
  jax.jit,
  static_argnames=(
    "num_iterations",
    "num_rounds",
    "num_sweeps",
    "num_perturbed",
    "block_size",
  ),
)
def aq_fit(
  key: Key[Array, ""],
  points: Float[Array, "n D"],
  codebooks: Float[Array, "M K D"],
  codes: Int[Array, "n M"],
  *,
  num_iterations: int = 25,
  num_rounds: int = 8,
  num_sweeps: int = 4,
  num_perturbed: int = 4,
  cross_weight: float | Float[Array, ""] | None = None,
  ridge: float | Float[Array, ""] = 1e-4,
  block_size: int = 1024,
) -> AdditiveFit:
  """Books of additive quantisation, from a start of another kind.

  An iteration chooses codes by `aq_encode_icm`, from those it has, then books
  by `aq_update`. Neither raises the distortion, but for roundings. With a
  cross weight, books come from `cq_update`, and what never rises is distortion
  + cross_weight * variance of the cross term.

  Args:
    key: of orders and perturbations.
    points: a sample of the vectors to store.
    codebooks: to start from, of product codes (`additive_codes.aq_from_pq`) or
      of residual ones.
    codes: of the points in those books; a row of -1 does not count, and gets
      codes like the others.
    num_iterations: at least 1; 25 to 100 are usual.
    num_rounds: perturbed rounds of an iteration, 8 (ours).
    num_sweeps: of `aq_encode_icm`.
    num_perturbed: likewise.
    cross_weight: for composite quantisation, of the squared deviation of the
      cross term from its mean; in units of 1 / |x|^2. None: additive.
    ridge: of `aq_update`.
    block_size: of `aq_encode_icm`.

  Returns:
    float32 books, int32 codes and num_iterations + 1 distortions and spreads.

  Raises:
    ValueError: if sizes disagree or are out of range.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> points = jnp.array([[0.0], [1.0], [3.0], [4.0]])
    >>> books = jnp.array([[[0.0], [2.5]], [[0.0], [1.0]]])
    >>> codes = jnp.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    >>> fit = aq_fit(jax.random.key(0), points, books, codes, num_iterations=1)
    >>> fit.distortion.round(3).tolist()
    [0.125, 0.0]

  Cost: per iteration 2 n M K D num_sweeps (1 + num_rounds) FLOPs for the codes
  and those of `aq_update`.
  """
  checks.has_rank(2, points=points, codes=codes)
  checks.same_size(points=points.shape[0], codes=codes.shape[0])
  checks.in_range(1, 1 << 20, num_iterations=num_iterations)

  def measured(codebooks, codes):
    left = _left(codebooks, points, codes)
    distortion = jnp.sum(jnp.square(left)) / _total(codes)
    return distortion, aq_cross_term(codebooks, codes).spread

  def iterate(carry, key):
    codebooks, codes = carry
    penalty = None
    if cross_weight is not None:
      target = aq_cross_term(codebooks, codes).mean
      penalty = CrossPenalty(cross_weight, target)
    codes = aq_encode_icm(
      codebooks,
      points,
      codes,
      num_rounds=num_rounds,
      num_sweeps=num_sweeps,
      num_perturbed=num_perturbed,
      penalty=penalty,
      key=key,
      block_size=block_size,
    )
    if cross_weight is None:
      codebooks = aq_update(codebooks, points, codes, ridge=ridge)
    else:
      codebooks = cq_update(
        codebooks, points, codes, cross_weight=cross_weight, ridge=ridge
      )
    return (codebooks, codes), measured(codebooks, codes)

  points, codebooks = jax.lax.stop_gradient((points, codebooks))
  start = codebooks.astype(jnp.float32), codes.astype(jnp.int32)
  (codebooks, codes), after = jax.lax.scan(
    iterate, start, jax.random.split(key, num_iterations)
  )
  history = (
    jnp.concatenate([first[None], rest])
    for first, rest in zip(measured(*start), after, strict=True)
  )
  return AdditiveFit(codebooks, codes, *history)


@jax.jit
def aq_update(
  codebooks: Float[Array, "M K D"],
  points: Float[Array, "*batch D"],
  codes: Int[Array, "*batch M"],
  *,
  ridge: float | Float[Array, ""] = 1e-4,
) -> Float[Array, "M K D"]:
  """The best books for given codes, by least squares.

  With one row of B for each vector, ones where its codes are, and r what the
  old books leave: new = old + (B^T B + a I)^-1 B^T r, where a = ridge times
  the mean of the diagonal of B^T B. The ridge holds the books where they are:
  the error never rises, codes that nobody uses stay, and B^T B, which is
  singular (a vector may move from all codes of one book to those of another),
  has a solution. From books of zeros it is ridge regression.

  Args:
    codebooks: the old books.
    points: vectors; those without any code may hold anything.
    codes: their codes, -1 for none.
    ridge: above 0; 1e-4 (ours) is small and well above float32 roundings.

  Returns:
    float32 books, whole on every device.

  Raises:
    ValueError: if sizes disagree, or a table of pairs of codes is too large.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> points = jnp.array([[0.0], [1.0], [3.0], [4.0]])
    >>> codes = jnp.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    >>> books = aq_update(jnp.zeros((2, 2, 1)), points, codes)
    >>> x = books[0, codes[:, 0], 0] + books[1, codes[:, 1], 0]
    >>> [round(abs(float(x)), 2) for x in x]
    [0.0, 1.0, 3.0, 4.0]

  Cost: N M^2 counts of pairs, N M D additions, (M K)^3 / 3 + 2 (M K)^2 D FLOPs
  and (M K)^2 floats.
  """
  left = _left(codebooks, points, codes)
  num_books, num_codes, width = codebooks.shape
  factor = _factor(codes, num_books, num_codes, ridge)
  sums = _sums_of_codes(left, codes, num_codes)
  step = linalg.cho_solve((factor, True), sums.reshape(-1, width))
  return codebooks.astype(jnp.float32) + step.reshape(codebooks.shape)


@functools.partial(jax.jit, static_argnames=("num_steps",))
def cq_update(
  codebooks: Float[Array, "M K D"],
  points: Float[Array, "*batch D"],
  codes: Int[Array, "*batch M"],
  *,
  cross_weight: float | Float[Array, ""],
  num_steps: int = 10,
  ridge: float | Float[Array, ""] = 1e-4,
) -> Float[Array, "M K D"]:
  """Better books for given codes under composite quantisation's penalty.

  Lowers distortion + cross_weight * variance of the cross term (its best
  constant is the mean). Steps are those of conjugate gradients (Polak-Ribiere),
  preconditioned by the least squares matrix of `aq_update`: without a weight
  the first step is that update. Along a direction the objective is a polynomial
  of degree four, whose lowest value on a fine grid of sizes and 0 is taken, so
  that it never rises.

  Args:
    codebooks: the old books.
    points: vectors.
    codes: their codes; a row of -1 does not count.
    cross_weight: 0 or more, in units of 1 / |x|^2.
    num_steps: at least 1; 10 is ours, where the paper takes L-BFGS.
    ridge: of `aq_update`.

  Returns:
    float32 books.

  Raises:
    ValueError: if sizes disagree or are out of range.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> points = jnp.array([[1.0, 0.1], [0.1, 1.0], [1.0, 1.0], [0.1, 0.1]])
    >>> codes = jnp.array([[1, 0], [0, 1], [1, 1], [0, 0]])
    >>> books = aq_update(jnp.zeros((2, 2, 2)), points, codes)
    >>> better = cq_update(books, points, codes, cross_weight=10.0)
    >>> spread = [aq_cross_term(x, codes).spread for x in (books, better)]
    >>> bool(spread[1] < 0.1 * spread[0])
    True

  Cost: as `aq_update`, and a step 4 N M D + 2 (M K)^2 D FLOPs.
  """
  checks.in_range(1, 1 << 20, num_steps=num_steps)
  num_books, num_codes, width = codebooks.shape
  factor = _factor(codes, num_books, num_codes, ridge)
  points, codebooks = jax.lax.stop_gradient((points, codebooks))
  total = _total(codes)

  def objective(codebooks):
    left = _left(codebooks, points, codes)
    spread = aq_cross_term(codebooks, codes).spread
    distortion = jnp.sum(jnp.square(left)) / total
    return distortion + cross_weight * jnp.square(spread)

  def step(carry, _):
    codebooks, old_slope, old_size, direction = carry
    slope = jax.grad(objective)(codebooks)
    steepest = linalg.cho_solve((factor, True), slope.reshape(-1, width))
    steepest = total / 2 * steepest.reshape(slope.shape)
    kept = jnp.sum(steepest * (slope - old_slope)) / old_size
    direction = jnp.maximum(kept, 0) * direction - steepest
    change = _along(codebooks, direction, points, codes, cross_weight)
    sizes = 2.0 ** (jnp.arange(8, -80, -1) / 4)
    sizes = jnp.concatenate([jnp.zeros(1), sizes])
    size = sizes[jnp.argmin(change(sizes))]
    length = jnp.maximum(jnp.sum(steepest * slope), 1e-30)
    return (codebooks + size * direction, slope, length, direction), None

  start = codebooks.astype(jnp.float32)
  none = jnp.zeros_like(start)
  carry = start, none, jnp.full_like(start[0, 0, 0], jnp.inf), none
  return jax.lax.scan(step, carry, length=num_steps)[0][0]


def _along(codebooks, step, points, codes, cross_weight):
  """The change of the objective from books e to e + t step, for sizes t."""
  dots = [codebooks**2, codebooks * step, step**2]
  dots = [jnp.sum(x, axis=-1, keepdims=True) for x in dots]
  tables = jnp.concatenate([codebooks, step, *dots], axis=-1)
  width = codebooks.shape[2]
  found = aq_decode(tables, codes)
  old, new = found[..., :width], found[..., width : 2 * width]
  left = _left(codebooks, points, codes)

  def dot(a, b):
    return jnp.sum(a * b, axis=-1)

  # The cross term is c[0] + t c[1] + t^2 c[2].
  crosses = [dot(old, old), 2 * dot(old, new), dot(new, new)]
  own = [found[..., 2 * width], 2 * found[..., -2], found[..., -1]]
  crosses = [x - y for x, y in zip(crosses, own, strict=True)]
  counts, total = jnp.any(codes >= 0, axis=-1), _total(codes)

  def mean(x):
    return jnp.sum(jnp.where(counts, x, 0)) / total

  centred = [x - mean(x) for x in crosses]
  c = [[mean(x * y) for y in centred] for x in centred]
  slope, bend = -2 * mean(dot(left, new)), mean(dot(new, new))

  def change(t):
    distortion = t * slope + t**2 * bend
    variance = 2 * t * c[0][1] + t**2 * (c[1][1] + 2 * c[0][2])
    variance = variance + 2 * t**3 * c[1][2] + t**4 * c[2][2]
    return distortion + cross_weight * variance

  return change


def _left(codebooks, points, codes):
  """What the codes leave of vectors; zeros where there is no code."""
  checks.same_size(
    points_width=points.shape[-1], codebooks_width=codebooks.shape[2]
  )
  left = points.astype(jnp.float32) - aq_decode(codebooks, codes)
  return jnp.where(jnp.any(codes >= 0, axis=-1)[..., None], left, 0)


def _total(codes):
  return jnp.maximum(jnp.sum(jnp.any(codes >= 0, axis=-1)), 1)


def _sums_of_codes(rows, codes, num_codes):
  """B^T rows, [M, K, D]: for each code the sum of the rows that have it."""
  return jax.lax.map(
    lambda code: sum_rows(rows, code, num_rows=num_codes),
    jnp.moveaxis(codes, -1, 0),
  )


def _factor(codes, num_books, num_codes, ridge):
  """The Cholesky factor of B^T B + a I, [M K, M K]."""
  size = num_books * num_codes
  checks.in_range(1, 2**31 - 1, pairs_of_codes=num_codes * size)
  first = num_codes * jnp.arange(num_books)
  first = first.reshape((1,) * (codes.ndim - 1) + (-1,))
  flat = jnp.where(codes >= 0, first + codes, -1)
  ones = jnp.ones_like(flat, jnp.float32)[..., None]

  def pairs(code):  # of one book with all -> [K, M K]
    code = code[..., None]
    both = jnp.where((code >= 0) & (flat >= 0), code * size + flat, -1)
    counts = sum_rows(ones, both, num_rows=num_codes * size)
    return counts.reshape(num_codes, size)

  gram = jax.lax.map(pairs, jnp.moveaxis(codes, -1, 0)).reshape(size, size)
  diagonal = jnp.maximum(jnp.trace(gram), 1) / size
  return linalg.cholesky(gram + ridge * diagonal * jnp.eye(size), lower=True)

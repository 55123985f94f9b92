"""Choosing the codes of additive quantisation, all of a vector together.

No order of the books is best for every vector, and the exact choice is a hard
problem. Two searches, both over blocks of vectors so that memory is bounded:

- `aq_encode_icm`: one code at a time is replaced by the best given the others,
  over and over (iterated conditional modes), with random changes to get out of
  where that ends;
- `aq_encode_beam`: partial sums are extended by a code of any book not yet in
  use, and the best of them kept.

    codes = aq_encode_icm(codebooks, x, key=key, num_rounds=16)

Nothing here passes a gradient. Sources: the beam, Babenko, Lempitsky, 2014,
"Additive Quantization for Extreme Vector Compression"; ICM with perturbations,
Martinez et al., 2016, "Revisiting Additive Quantization"; the penalty, Zhang,
Du, Wang, 2014, "Composite Quantization for Approximate Nearest Neighbor
Search". Written from the methods; there was no code to compare with.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.ops.rows import take_rows
from tokjax.typing import Array, Float, Int, Key

__all__ = ["CrossPenalty", "aq_encode_beam", "aq_encode_icm"]


class CrossPenalty(NamedTuple):
  """What composite quantisation adds to the squared error of a vector.

  weight * (cross term - target)^2, see `additive_codes.aq_cross_term`.

  Attributes:
    weight: 0 or more.
    target: the constant that the cross term should be.
  """

  weight: float | Float[Array, ""]
  target: float | Float[Array, ""]


@functools.partial(
  jax.jit,
  static_argnames=("num_rounds", "num_sweeps", "num_perturbed", "block_size"),
)
def aq_encode_icm(
  codebooks: Float[Array, "M K D"],
  points: Float[Array, "*batch D"],
  codes: Int[Array, "*batch M"] | None = None,
  *,
  num_rounds: int = 0,
  num_sweeps: int = 4,
  num_perturbed: int = 4,
  penalty: CrossPenalty | None = None,
  key: Key[Array, ""] | None = None,
  block_size: int = 1024,
) -> Int[Array, "*batch M"]:
  """Codes by iterated conditional modes; their error never rises.

  A sweep goes through the books: k_m = argmin_k |x - sum of the other codes -
  e_mk|^2 (ties: lowest). Started from nothing, the first sweep is the greedy
  choice of residual quantisation, so the result is never worse than that. A
  round puts random codes in some places, sweeps again, and each vector keeps
  what is better. The first sweep takes the books in order, the others in
  random orders if there is a key.

  The codes given the others are found by a search for the nearest code to what
  they leave, not in a table of unary and pairwise terms as published: the same
  numbers with fewer roundings, no K M x K M table, and matrix products.

  Args:
    codebooks: M books of K codes.
    points: vectors; a float32 is made of them.
    codes: to start from, such as product codes; -1 for none. None: nothing.
    num_rounds: perturbed rounds after the first sweeps; 8 in training and 16
      to 32 for storing are ours.
    num_sweeps: in every round, at least 1; 4 as recalled of LSQ.
    num_perturbed: codes of a vector drawn anew in a round, all if there are no
      more; 4 as recalled of LSQ.
    penalty: of the cross term, added to the error; None for none.
    key: for orders and perturbations. None: no randomness.
    block_size: vectors at a time. The result does not depend on it.

  Returns:
    int32 codes.

  Raises:
    ValueError: if sizes disagree or are out of range, or rounds have no key.

  Example:
    >>> import jax.numpy as jnp
    >>> books = jnp.array([[[0.0], [1.0]], [[0.0], [0.6]]])
    >>> x = jnp.array([[0.55]])
    >>> aq_encode_icm(books, x, num_sweeps=1).tolist()  # greedy
    [[1, 0]]
    >>> key = jax.random.key(0)
    >>> aq_encode_icm(books, x, num_rounds=8, key=key).tolist()
    [[0, 1]]

  Cost: 2 N M K D FLOPs a sweep (twice that with a penalty), and a scratch of
  `block_size` K floats. On an Explicit mesh points may be sharded; under
  `shard_map` each device works on its own.
  """
  _check(codebooks, points, block_size)
  num_books = codebooks.shape[0]
  checks.in_range(0, 1 << 20, num_rounds=num_rounds)
  checks.in_range(1, 1 << 20, num_sweeps=num_sweeps)
  checks.in_range(1, 1 << 20, num_perturbed=num_perturbed)
  if num_rounds and key is None:
    raise ValueError(f"key must be given for {num_rounds} rounds, got None")
  codebooks, points = jax.lax.stop_gradient((codebooks, points))
  codebooks = codebooks.astype(jnp.float32)
  if codes is None:
    none = jnp.zeros_like(points[..., 0], jnp.int32) - 1
    codes = jnp.stack([none] * num_books, axis=-1)
  checks.same_size(codes_books=codes.shape[-1], codebooks=num_books)
  settings = _Icm(num_rounds, num_sweeps, num_perturbed)
  encode = functools.partial(_icm_block, settings=settings)
  orders, vector_keys = _orders(key, num_books, settings)
  shared = codebooks, penalty, orders, vector_keys
  return _over_rows(encode, (points, codes), shared, block_size)


class _Icm(NamedTuple):
  num_rounds: int
  num_sweeps: int
  num_perturbed: int


def _orders(key, num_books, settings):
  """Orders [1 + rounds, sweeps, M], the same for all vectors, and keys."""
  in_order = jnp.arange(num_books, dtype=jnp.int32)
  if key is None:
    return jnp.stack([in_order] * settings.num_sweeps)[None], None
  order_key, vector_key = jax.random.split(key)
  keys = jax.random.split(
    order_key, (1 + settings.num_rounds, settings.num_sweeps)
  )
  one = lambda key: jax.random.permutation(key, in_order)  # noqa: E731
  orders = jax.vmap(jax.vmap(one))(keys).at[0, 0].set(in_order)
  return orders, jax.random.split(vector_key, settings.num_rounds)


def _icm_block(
  number, points, codes, codebooks, penalty, orders, vector_keys, *, settings
):
  """[b, D], [b, M] -> [b, M]; the rows are those from `number` on."""
  size, num_codes = points.shape[0], codebooks.shape[1]
  x, codes = points.astype(jnp.float32), codes.astype(jnp.int32)
  codes, error = _descend(x, codes, codebooks, penalty, orders[0])
  if vector_keys is None:
    return codes

  def perturbed(key, codes):
    place, code = jax.random.split(key)
    rank = jnp.argsort(jnp.argsort(jax.random.uniform(place, codes.shape)))
    drawn = jax.random.randint(code, codes.shape, 0, num_codes)
    return jnp.where(rank < settings.num_perturbed, drawn, codes)

  def one_round(best, keys):
    codes, error = best
    order, vector_key = keys
    rows = number + jnp.arange(size)
    of_rows = jax.vmap(lambda i: jax.random.fold_in(vector_key, i))(rows)
    start = jax.vmap(perturbed)(of_rows, codes)
    found, new = _descend(x, start, codebooks, penalty, order)
    better = new < error
    codes = jnp.where(better[:, None], found, codes)
    return (codes, jnp.where(better, new, error)), None

  keys = orders[1:], vector_keys
  (codes, _), _ = jax.lax.scan(one_round, (codes, error), keys)
  return codes


def _descend(x, codes, codebooks, penalty, orders):
  """Codes after sweeps in given orders [sweeps, M], and the errors [b]."""
  squares = jnp.sum(jnp.square(codebooks), axis=-1)  # [M, K]

  def chosen(codes):  # [b, M] -> [M, b, D]
    return jax.vmap(take_rows)(codebooks, codes.T)

  def book(carry, m):
    codes, left, own = carry  # own: sum of |e|^2 of a vector's codes
    table, square = codebooks[m], squares[m]
    code = jax.lax.dynamic_index_in_dim(codes, m, axis=1, keepdims=False)
    old = take_rows(table, code)
    wanted = left + old  # what the other codes leave
    own = own - jnp.sum(jnp.square(old), axis=1)
    inner = jnp.matmul(wanted, table.T, precision="highest")
    score = square[None, :] - 2 * inner
    if penalty is not None:
      others = x - wanted
      cross = jnp.sum(jnp.square(others), axis=1) - own
      inner = jnp.matmul(others, table.T, precision="highest")
      away = cross[:, None] + 2 * inner - penalty.target
      score = score + penalty.weight * jnp.square(away)
    code = jnp.argmin(score, axis=1).astype(jnp.int32)
    codes = jax.lax.dynamic_update_index_in_dim(codes, code, m, axis=1)
    new = take_rows(table, code)
    own = own + jnp.sum(jnp.square(new), axis=1)
    return (codes, wanted - new, own), None

  before = chosen(codes)
  start = codes, x - jnp.sum(before, axis=0), jnp.sum(before**2, axis=(0, 2))
  (codes, _, _), _ = jax.lax.scan(book, start, orders.reshape(-1))
  after = chosen(codes)  # summed afresh: no roundings of the way here
  total = jnp.sum(after, axis=0)
  error = jnp.sum(jnp.square(x - total), axis=1)
  if penalty is not None:
    cross = jnp.sum(jnp.square(total), axis=1) - jnp.sum(after**2, axis=(0, 2))
    error = error + penalty.weight * jnp.square(cross - penalty.target)
  return codes, error


@functools.partial(jax.jit, static_argnames=("beam_size", "block_size"))
def aq_encode_beam(
  codebooks: Float[Array, "M K D"],
  points: Float[Array, "*batch D"],
  *,
  beam_size: int = 64,
  block_size: int = 32,
) -> Int[Array, "*batch M"]:
  """Codes by a beam over sums of codes, in no order of the books.

  Starts from the best single codes of any book. M - 1 times every sum of the
  beam is extended by every code of every book it does not use yet, and the
  `beam_size` best different ones are kept. Scores come from the products of
  codes with the vector and with each other: error + |e|^2 - 2 <x, e> + 2 sum
  <e, codes in use>. Two ways to the same set of codes are found by comparing
  sets, so no place in the beam is lost to repeats.

  Args:
    codebooks: M books of K codes.
    points: vectors; a float32 is made of them.
    beam_size: sums kept; 16 in training and 64 for storing are ours. With
      room for all sums the choice is exact.
    block_size: vectors at a time.

  Returns:
    int32 codes.

  Raises:
    ValueError: if sizes disagree or are out of range.

  Example:
    >>> import jax.numpy as jnp
    >>> books = jnp.array([[[0.0], [1.0]], [[0.0], [0.6]]])
    >>> aq_encode_beam(books, jnp.array([[0.55]]), beam_size=2).tolist()
    [[0, 1]]

  Cost: 2 N M K D FLOPs, and for each of M steps b M K additions and a choice
  of b among b M K a vector; holds 2 b M K `block_size` floats and (M K)^2.
  """
  _check(codebooks, points, block_size)
  checks.in_range(1, 1 << 20, beam_size=beam_size)
  codebooks, points = jax.lax.stop_gradient((codebooks, points))
  codebooks = codebooks.astype(jnp.float32)
  encode = functools.partial(_beam_block, beam_size=beam_size)
  return _over_rows(encode, (points,), (codebooks,), block_size)


def _beam_block(number, points, codebooks, *, beam_size):
  """[b, D] -> [b, M]."""
  del number
  num_books, num_codes, width = codebooks.shape
  codes = codebooks.reshape(-1, width)  # [M K, D]
  gram = 2 * jnp.matmul(codes, codes.T, precision="highest")
  inner = jnp.matmul(points.astype(jnp.float32), codes.T, precision="highest")
  alone = jnp.sum(jnp.square(codes), axis=1)[None, :] - 2 * inner
  first = jnp.arange(beam_size) == 0

  def one(alone):  # [M K] -> [M]
    paths = jnp.zeros_like(alone, jnp.int32, shape=(beam_size, num_books)) - 1
    error = jnp.where(first, 0 * alone[0], jnp.inf)
    cost = jnp.broadcast_to(alone[None], (beam_size, alone.shape[0]))

    def step(carry, count):
      paths, error, cost = carry
      score = error[:, None] + cost
      taken = jnp.repeat(paths >= 0, num_codes, axis=1)
      score = jnp.where(taken, jnp.inf, score)
      score = _without_repeats(score, paths, count, num_codes)
      best, place = jax.lax.top_k(-score.reshape(-1), beam_size)
      parent, added = place // alone.shape[0], place % alone.shape[0]
      here = jnp.arange(num_books)[None] == (added // num_codes)[:, None]
      paths = jnp.where(here, (added % num_codes)[:, None], paths[parent])
      return (paths, -best, cost[parent] + gram[added]), None

    steps = jnp.arange(num_books)
    (paths, _, _), _ = jax.lax.scan(step, (paths, error, cost), steps)
    return paths[0]

  return jax.vmap(one)(alone)


def _without_repeats(score, paths, count, num_codes):
  """Infinity where a sum earlier in the beam leads to the same set of codes.

  Sums of `count` codes, all different: p with one more code can equal q with
  one more only if they share all but one code each, and then the code of q
  that p lacks is the one that p must not add.
  """
  same = (paths[:, None] == paths[None]) & (paths >= 0)[None]  # [p, q, M]
  apart = jnp.sum(same, axis=2) == count - 1
  size = paths.shape[0]
  earlier = jnp.arange(size)[None, :] < jnp.arange(size)[:, None]
  lacks = ~same & (paths >= 0)[None]
  book = jnp.argmax(lacks, axis=2)  # [p, q], the one where there is one
  code = paths[jnp.arange(size)[None, :], book]
  free = jnp.take_along_axis(paths, book, axis=1) < 0
  repeat = apart & earlier & free
  flat = jnp.where(repeat, book * num_codes + code, score.shape[1])
  rows = jnp.broadcast_to(jnp.arange(size)[:, None], flat.shape)
  return score.at[rows, flat].set(jnp.inf, mode="drop")


def _over_rows(encode, rows, shared, block_size):
  """`encode(number of first row, *blocks, *shared)` over blocks of rows."""

  def local(rows, shared):
    batch = rows[0].shape[:-1]
    flat = [x.reshape(-1, x.shape[-1]) for x in rows]
    total = flat[0].shape[0]
    size = max(1, min(block_size, total))
    blocks = [jnp.pad(x, [(0, -total % size), (0, 0)]) for x in flat]
    blocks = [x.reshape(-1, size, x.shape[-1]) for x in blocks]
    numbers = size * jnp.arange(blocks[0].shape[0])
    found = jax.lax.map(lambda each: encode(*each, *shared), (numbers, *blocks))
    found = found.reshape(-1, found.shape[-1])[:total]
    return found.reshape(*batch, -1)

  spec = tuple(jax.typeof(rows[0]).sharding.spec)
  if any(axis is not None for axis in spec):
    layout = jax.P(*spec[:-1], None)
    return jax.sharding.auto_axes(local, out_sharding=layout)(rows, shared)
  return local(rows, shared)


def _check(codebooks, points, block_size):
  checks.has_rank(3, codebooks=codebooks)
  checks.same_size(
    points_width=points.shape[-1], codebooks_width=codebooks.shape[2]
  )
  checks.in_range(1, 1 << 30, block_size=block_size)

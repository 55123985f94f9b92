"""Joint choices of codes: never worse than greedy, exact where they can be."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import compiled
from tokjax.ops import additive_codes, additive_encoding, quantize
from tokjax.ops.additive_encoding import CrossPenalty

encoding, quantize = compiled(additive_encoding), compiled(quantize)

M, K, D = 3, 4, 3


def books(seed=0, scale=0.8):
  random = np.random.default_rng(seed)
  scales = scale ** np.arange(M).reshape(-1, 1, 1)
  return (random.normal(size=(M, K, D)) * scales).astype(np.float32)


def points(seed=1, n=30):
  random = np.random.default_rng(seed)
  return (2 * random.normal(size=(n, D))).astype(np.float32)


PATHS = np.array(list(itertools.product(range(K), repeat=M)))


def errors_of_all(e, x):
  sums = e.astype(float)[np.arange(M)[None], PATHS].sum(1)  # [K^M, D]
  return np.sum((x[:, None] - sums[None]) ** 2, -1)


def errors(e, x, codes):
  place = np.ravel_multi_index(np.asarray(codes).T, (K,) * M)
  return errors_of_all(e, x)[np.arange(len(x)), place]


def greedy(e, x):
  left, codes = x.astype(float), []
  for table in e.astype(float):
    codes.append(np.sum((left[:, None] - table[None]) ** 2, -1).argmin(1))
    left = left - table[codes[-1]]
  return np.stack(codes, 1)


def test_a_beam_with_room_for_all_sums_is_exhaustive():
  e, x = books(), points()
  best = errors_of_all(e, x).argmin(1)
  got = encoding.aq_encode_beam(e, x, beam_size=K**M, block_size=7)
  np.testing.assert_array_equal(got, PATHS[best])


def test_a_narrow_beam_keeps_no_set_twice():
  """A loop over sets of codes, from the definition."""
  e, x = books(2).astype(float), points(n=12)
  size = 5
  for i, got in enumerate(
    np.asarray(encoding.aq_encode_beam(books(2), x, beam_size=size))
  ):
    beam = [frozenset()]
    for _ in range(M):
      longer = {
        part | {(m, k)}
        for part in beam
        for m in set(range(M)) - {m for m, _ in part}
        for k in range(K)
      }
      beam = sorted(
        longer, key=lambda part: np.sum((x[i] - sum(e[p] for p in part)) ** 2)
      )[:size]
    assert {(m, int(k)) for m, k in enumerate(got)} == beam[0]


def test_greed_misses_what_both_find():
  e = np.array([[[0.0], [1.0]], [[0.0], [0.6]]], np.float32)
  x = np.array([[0.55]], np.float32)
  assert encoding.aq_encode_icm(e, x, num_sweeps=1).tolist() == [[1, 0]]
  assert encoding.aq_encode_beam(e, x, beam_size=2).tolist() == [[0, 1]]
  key = jax.random.key(0)
  assert encoding.aq_encode_icm(e, x, num_rounds=8, key=key).tolist() == [
    [0, 1]
  ]


def test_the_first_sweep_is_greedy_and_nothing_after_it_is_worse():
  e, x, key = books(), points(n=60), jax.random.key(3)
  first = encoding.aq_encode_icm(e, x, num_sweeps=1)
  np.testing.assert_array_equal(first, greedy(e, x))
  least = errors_of_all(e, x).min(1)
  last, means = errors(e, x, first), []
  for num_rounds in (0, 2, 8):
    codes = encoding.aq_encode_icm(
      e, x, num_rounds=num_rounds, num_perturbed=2, key=key
    )
    error = errors(e, x, codes)
    assert np.all(error >= least - 1e-9)
    if num_rounds != 2:  # more rounds of one key go through those of fewer
      assert np.all(error <= last + 1e-5)
    last = error
    means.append(error.mean())
  assert means[2] < means[1] < means[0] < errors(e, x, first).mean()
  assert np.mean(last < least + 1e-5) > 0.9
  beam = errors(e, x, encoding.aq_encode_beam(e, x, beam_size=4))
  assert beam.mean() < errors(e, x, first).mean()


def test_a_sweep_equals_a_loop():
  e, x = books(), points()
  start = np.random.default_rng(4).integers(0, K, (len(x), M))
  want = start.copy()
  for codes, v in zip(want, x.astype(float), strict=True):
    for m in range(M):
      others = sum(e[n, codes[n]].astype(float) for n in range(M) if n != m)
      codes[m] = np.sum((v - others - e[m]) ** 2, -1).argmin()
  got = encoding.aq_encode_icm(e, x, start, num_sweeps=1)
  np.testing.assert_array_equal(got, want)


def test_product_books_are_solved_by_one_sweep():
  random = np.random.default_rng(5)
  book = random.normal(size=(M, K, 2)).astype(np.float32)
  x = random.normal(size=(20, 2 * M)).astype(np.float32)
  wide = jax.jit(additive_codes.aq_from_pq)(book)
  start = random.integers(0, K, (20, M))
  got = encoding.aq_encode_icm(wide, x, start, num_sweeps=1)
  np.testing.assert_array_equal(got, quantize.pq_encode(book, x))


def test_the_penalty_is_part_of_the_objective():
  """A single book's best code given the others, by a loop over its codes."""
  e, x = books(), points(n=20)
  penalty = CrossPenalty(0.7, 0.4)
  start = np.random.default_rng(4).integers(0, K, (len(x), M))

  def objective(v, codes):
    each = e.astype(float)[np.arange(M), codes]
    cross = np.sum(each.sum(0) ** 2) - np.sum(each**2)
    return np.sum((v - each.sum(0)) ** 2) + 0.7 * (cross - 0.4) ** 2

  want = start.copy()
  for codes, v in zip(want, x.astype(float), strict=True):
    for m in range(M):
      trials = [np.where(np.arange(M) == m, k, codes) for k in range(K)]
      codes[m] = np.argmin([objective(v, trial) for trial in trials])
  got = encoding.aq_encode_icm(e, x, start, num_sweeps=1, penalty=penalty)
  np.testing.assert_array_equal(got, want)
  key = jax.random.key(0)
  rounds = encoding.aq_encode_icm(
    e, x, start, num_sweeps=1, num_rounds=4, penalty=penalty, key=key
  )
  before = [objective(v, c) for v, c in zip(x, want, strict=True)]
  after = [objective(v, c) for v, c in zip(x, np.asarray(rounds), strict=True)]
  assert np.all(np.subtract(after, before) < 1e-5)
  assert np.mean(after) < np.mean(before)


def test_blocks_and_neighbours_do_not_matter():
  e, x, key = books(), points(), jax.random.key(1)
  settings = {"num_rounds": 2, "num_perturbed": 2, "key": key}
  want = encoding.aq_encode_icm(e, x, **settings)
  x[10:] = np.nan
  got = encoding.aq_encode_icm(e, x, block_size=7, **settings)
  np.testing.assert_array_equal(got[:10], want[:10])


@pytest.mark.unchecked
def test_errors():
  e, x = books(), points()
  with pytest.raises(ValueError, match="key must be given for 2 rounds"):
    encoding.aq_encode_icm(e, x, num_rounds=2)
  with pytest.raises(ValueError, match="points_width=2, codebooks_width=3"):
    encoding.aq_encode_beam(e, x[:, :2])
  with pytest.raises(ValueError, match="codes_books=2, codebooks=3"):
    encoding.aq_encode_icm(e, x, jnp.zeros((30, 2), jnp.int32))
  with pytest.raises(ValueError, match="beam_size must lie in"):
    encoding.aq_encode_beam(e, x, beam_size=0)

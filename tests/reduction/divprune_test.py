"""DivPrune against the published loop, its bound and its worked example."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.reduction.divprune import divprune

run = jax.jit(
  divprune,
  static_argnames=(
    "num_keep", "metric", "first", "gram", "positions", "implementation"
  ),
)  # fmt: skip


def distances(x, metric):
  x = np.asarray(x, np.float64)
  if metric == "cosine":
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return 1 - unit @ unit.T
  step = x[:, None] - x[None, :]
  return np.abs(step).sum(-1) if metric == "l1" else np.square(step).sum(-1)


def published(far, mask, num_keep, start=None):
  """The steps as they are described, with a kept token out of the game."""
  valid = np.flatnonzero(mask).tolist()
  kept, gaps = [], []
  while len(kept) < min(num_keep, len(valid)):
    free = [j for j in valid if j not in kept]
    if kept:
      score = {j: min(far[c, j] for c in kept) for j in free}
    elif start is not None:
      kept.append(start if mask[start] else valid[0])
      gaps.append(np.inf)
      continue
    else:  # the second smallest of the column; the smallest is itself
      score = {j: ([*sorted(far[valid, j]), 0, 0])[1] for j in free}
    order = sorted(free, key=lambda j: (-score[j], j))
    gaps.append(score[order[0]] - score[order[1]] if len(order) > 1 else np.inf)
    kept.append(order[0])
  return kept, gaps


def check(got, far, mask, num_keep, start=None, exact=False):
  """The loop's tokens while it is sure of them; after that, near the best.

  A farthest-first choice has at least half of the best smallest distance
  however it breaks ties, hence half of the loop's; `far` must be a metric, or
  its square.
  """
  want, gaps = published(far, mask, num_keep, start)
  index, kept = np.asarray(got.index), np.asarray(got.mask)
  assert kept.sum() == len(want) and (np.diff(index[kept]) > 0).all()
  assert mask[index[kept]].all()
  if exact or min(gaps, default=1) > 1e-4:
    np.testing.assert_array_equal(index[kept], np.sort(want))
  elif len(want) > 1:

    def smallest(chosen):
      return min(far[a, b] for a, b in itertools.combinations(chosen, 2))

    assert smallest(index[kept]) >= smallest(want) / 4 - 1e-5


def cases(seed, batch=200, num_tokens=10, dim=5):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(batch, num_tokens, dim)).astype(np.float32)
  x[: batch // 4] = np.round(x[: batch // 4])  # duplicates and zeros
  mask = rng.random((batch, num_tokens)) < 0.8
  mask[0] = False
  mask[1] = np.arange(num_tokens) == 3
  mask[2] = True
  return x, mask


@pytest.mark.parametrize("gram", ["table", "stream"])
@pytest.mark.parametrize("metric", ["cosine", "l1", "l2"])
def test_equals_the_published_loop(metric, gram):
  x, mask = cases(0)
  poisoned = jnp.asarray(np.where(mask[:, :, None], x, np.nan))
  for num_keep in (1, 4, 10):
    got = run(
      poisoned,
      jnp.asarray(mask),
      num_keep=num_keep,
      metric=metric,
      gram=gram,
    )
    assert np.isfinite(np.asarray(got.tokens)).all()
    for b in range(len(x)):
      one = jax.tree.map(lambda leaf, b=b: leaf[b], got)
      far = distances(x[b], metric)
      # Sums of small integers are exact, ties included.
      exact = metric != "cosine" and b < len(x) // 4
      check(one, far, mask[b], num_keep, exact=exact)


@pytest.mark.parametrize("gram", ["table", "stream"])
def test_index_makes_it_k_center(gram):
  x, mask = cases(1)
  start = np.random.default_rng(2).integers(0, 10, len(x)).astype(np.int32)
  got = run(
    jnp.asarray(x),
    jnp.asarray(mask),
    jnp.asarray(start),
    num_keep=4,
    first="index",
    gram=gram,
  )
  for b in range(len(x)):
    one = jax.tree.map(lambda leaf, b=b: leaf[b], got)
    check(one, distances(x[b], "cosine"), mask[b], 4, start[b])
  without = run(
    jnp.asarray(x), jnp.asarray(mask), num_keep=4, first="index", gram=gram
  )
  zero = run(
    jnp.asarray(x),
    jnp.asarray(mask),
    jnp.zeros(len(x), jnp.int32),
    num_keep=4,
    first="index",
    gram=gram,
  )
  np.testing.assert_array_equal(without.index, zero.index)


def circle(*degrees):
  angle = np.deg2rad(degrees)
  return jnp.asarray(
    np.stack([np.cos(angle), np.sin(angle)], -1)[None], jnp.float32
  )


def test_worked_example():
  x = circle(0, 10, 20, 90, 100, 180)
  for num_keep, want in ((1, [5]), (2, [0, 5]), (3, [0, 3, 5]),
                         (4, [0, 2, 3, 5])):  # fmt: skip
    got = run(x, num_keep=num_keep)
    assert got.index[0].tolist() == want
    np.testing.assert_array_equal(got.tokens[0], x[0, np.array(want)])
  assert got.position_ids[0].tolist() == [0, 2, 3, 5]
  again = run(x, num_keep=4, positions="renumber")
  assert again.position_ids[0].tolist() == [0, 1, 2, 3]


def test_at_least_half_of_the_best_square_root_distance():
  x, _ = cases(3, batch=50, num_tokens=9)
  for num_keep in (2, 3, 4):
    got = run(jnp.asarray(x), num_keep=num_keep)
    subsets = np.array(list(itertools.combinations(range(9), num_keep)))
    a, b = np.triu_indices(num_keep, 1)
    for i in range(50):
      far = np.sqrt(np.maximum(distances(x[i], "cosine"), 0))
      best = far[subsets[:, a], subsets[:, b]].min(axis=1).max()
      kept = np.asarray(got.index[i])
      assert far[kept[a], kept[b]].min() >= best / 2 - 1e-3


def test_duplicates_are_kept_once_while_there_are_others():
  rng = np.random.default_rng(4)
  distinct = rng.normal(size=(30, 5, 8))
  order = np.stack([rng.permutation(15) % 5 for _ in range(30)])
  x = np.take_along_axis(distinct, order[:, :, None], axis=1)
  got = run(jnp.asarray(x, jnp.float32), num_keep=5)
  for b in range(30):
    assert sorted(order[b][np.asarray(got.index[b])]) == list(range(5))
  # All five again: the published code would return one of them twice.
  got = run(jnp.asarray(x, jnp.float32), num_keep=9)
  assert all(len(set(row)) == 9 for row in np.asarray(got.index).tolist())


def test_rotation_scale_and_order_change_nothing():
  rng = np.random.default_rng(5)
  x = rng.normal(size=(60, 10, 6))
  # Two tokens nearest to each other are equally isolated: a tie by right.
  mask = np.ones(10, bool)
  leads = [min(published(distances(a, "cosine"), mask, 4)[1]) for a in x]
  x = x[np.array(leads) > 1e-4]
  assert len(x) > 20

  def index(x):
    return np.asarray(run(jnp.asarray(x, jnp.float32), num_keep=4).index)

  want = index(x)
  turn, _ = np.linalg.qr(rng.normal(size=(6, 6)))
  np.testing.assert_array_equal(index(x @ turn), want)
  scale = np.exp(rng.normal(size=(*x.shape[:2], 1)))
  np.testing.assert_array_equal(index(x * scale), want)
  order = rng.permutation(10)
  np.testing.assert_array_equal(np.sort(order[index(x[:, order])]), want)


def test_keeping_all_is_the_identity():
  x, _ = cases(6)
  got = run(jnp.asarray(x), num_keep=10)
  np.testing.assert_array_equal(got.tokens, x)
  np.testing.assert_array_equal(got.index, np.tile(np.arange(10), (len(x), 1)))
  assert got.mask.all() and (got.size == 1).all()


def test_batch_equals_one_by_one():
  x, mask = cases(7, batch=6)
  got = run(jnp.asarray(x), jnp.asarray(mask), num_keep=4)
  for b in range(6):
    part = slice(b, b + 1)
    alone = run(jnp.asarray(x[part]), jnp.asarray(mask[part]), num_keep=4)
    np.testing.assert_array_equal(alone.index[0], got.index[b])


def test_gradient_flows_through_kept_features_only():
  x, mask = cases(8, batch=6)
  mask[2, 0] = False
  x, mask = jnp.asarray(x), jnp.asarray(mask)
  gradient = jax.grad(lambda x: run(x, mask, num_keep=4).tokens.sum())(x)
  got = run(x, mask, num_keep=4)
  want = np.zeros(x.shape, np.float32)
  for b in range(6):
    want[b, np.asarray(got.index[b])[np.asarray(got.mask[b])]] = 1
  np.testing.assert_array_equal(gradient, want)


def test_bfloat16_keeps_nearly_the_same_tokens():
  x = np.random.default_rng(9).normal(size=(8, 64, 128)).astype(np.float32)
  low = run(jnp.asarray(x, jnp.bfloat16), num_keep=16)
  assert low.tokens.dtype == jnp.bfloat16
  exact = run(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32), num_keep=16)
  np.testing.assert_array_equal(low.index, exact.index)


@pytest.mark.unchecked
def test_errors_name_the_argument():
  x = jax.ShapeDtypeStruct((2, 6, 3), jnp.float32)

  def attempt(mask=(2, 6), start=None, **settings):
    arrays = [x, jax.ShapeDtypeStruct(mask, jnp.bool_)]
    if start is not None:
      arrays.append(jax.ShapeDtypeStruct(start, jnp.int32))
    settings = dict(num_keep=3) | settings
    jax.eval_shape(functools.partial(divprune, **settings), *arrays)

  attempt()
  for message, wrong in {
    "features_tokens=6, mask_tokens=5": dict(mask=(2, 5)),
    "num_keep must lie in 1..6, got 7": dict(num_keep=7),
    "metric must be one of 'cosine', 'l1', 'l2'": dict(metric="dot"),
    "first must be one of": dict(first="random"),
    "gram must be one of": dict(gram="tables"),
    "start has no meaning": dict(start=(2,)),
    "implementation has no meaning": dict(gram="stream", implementation="xla"),
    "positions must be one of": dict(positions="compact"),
  }.items():
    with pytest.raises(ValueError, match=message):
      attempt(**wrong)

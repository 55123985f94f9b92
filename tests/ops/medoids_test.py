import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import compiled, run
from tokjax.ops import distances, medoids, merging, plans

distances = compiled(distances)
medoids = compiled(medoids)
merging = compiled(merging)
plans = compiled(plans)


LINE = np.array([[0], [1], [2], [10], [11], [13]], np.float32)
N = 12


def cases(seed, number, whole):
  """Tokens and masks; whole numbers on a line have many exact ties."""
  random = np.random.default_rng(seed)
  if whole:
    x = np.zeros((number, N, 3))
    x[..., 0] = random.integers(0, 8, (number, N))
  else:
    x = random.normal(size=(number, N, 3))
  mask = random.random((number, N)) < random.uniform(0.2, 1.3, (number, 1))
  return x.astype(np.float32), mask


class Oracle:
  """k-medoids as a person would do it, and how close its decisions were."""

  def __init__(self, x, mask, num_clusters, num_iterations=100):
    self.gap = np.inf
    valid = [n for n in range(len(x)) if mask[n]]
    x = x.astype(np.float64)
    away = {(i, j): np.linalg.norm(x[i] - x[j]) for i in valid for j in valid}
    away.update({(i, i): -1.0 for i in valid})
    self.away = away

    def best(choices):  # (value, name), the lower of each
      choices = sorted(choices)
      # An exact tie (two members of one cluster) is decided by position.
      apart = [value - choices[0][0] for value, _ in choices]
      self.gap = min([self.gap] + [gap for gap in apart if gap > 0])
      return choices[0][1]

    live = min(num_clusters, len(valid))
    picked = []
    for k in range(live):
      rest = [n for n in valid if n not in picked]
      if k == 0:
        value = {n: -np.linalg.norm(x[n]) for n in rest}
      else:
        value = {n: -min(away[n, p] for p in picked) for n in rest}
      picked.append(best([(value[n], n) for n in rest]))
    self.seeds = list(picked)

    def assign(medoids):
      return {
        n: best([(away[n, m], k) for k, m in enumerate(medoids)]) for n in valid
      }

    for _ in range(num_iterations if live else 0):
      owner = assign(picked)
      new = []
      for k in range(live):
        members = [n for n in valid if owner[n] == k]
        cost = [(sum(away[i, j] for j in members), i) for i in members]
        new.append(best(cost))
      if new == picked:
        break
      picked = new
    self.index = sorted(picked)
    self.owner = assign(self.index) if live else {}


def check(got_index, got_mask, got_owner, x, mask, num_clusters, exact):
  oracle = Oracle(x, mask, num_clusters)
  live = len(oracle.index)
  assert got_mask.tolist() == [k < live for k in range(num_clusters)]
  assert (got_index[live:] == N - 1).all()
  assert (got_owner[~mask] == num_clusters).all()
  if exact or oracle.gap > 1e-5:
    assert got_index[:live].tolist() == oracle.index
    assert {n: got_owner[n] for n in oracle.owner} == oracle.owner
    return True
  # A close decision may go the other way; the answer is still a fixed point.
  away = oracle.away
  for n in oracle.owner:
    nearest = min(away[n, m] for m in got_index[:live])
    assert away[n, got_index[got_owner[n]]] < nearest + 1e-4
  for k in range(live):
    members = [n for n in oracle.owner if got_owner[n] == k]
    cost = {i: sum(away[i, j] for j in members) for i in members}
    assert cost[got_index[k]] < min(cost.values()) + 1e-4
  return False


@pytest.mark.parametrize("whole", [True, False], ids=["ties", "normal"])
@pytest.mark.parametrize("num_clusters", [1, 4, N])
def test_kmedoids_equals_the_oracle(num_clusters, whole):
  x, mask = cases(num_clusters, 170, whole)
  mask[0], mask[1] = False, True
  method = jax.jit(
    functools.partial(medoids.kmedoids, num_clusters=num_clusters)
  )
  found = jax.device_get(method(np.where(mask[..., None], x, np.nan), mask))
  equal = sum(
    check(*row, num_clusters, whole)
    for row in zip(*found[:3], x, mask, strict=True)
  )
  assert equal > 150


def test_kkz_seeds_equal_the_oracle():
  x, mask = cases(9, 200, True)
  far = run(distances.pairwise_distances, x, mask)
  norms = jnp.linalg.norm(x, axis=-1)
  got = np.asarray(run(medoids.kkz_seeds, far, norms, mask, num_clusters=5))
  for g, x_one, m in zip(got, x, mask, strict=True):
    want = Oracle(x_one, m, 5, num_iterations=0).seeds
    assert g[: len(want)].tolist() == want
  line = run(distances.pairwise_distances, LINE)
  assert run(medoids.kkz_seeds, line, LINE[:, 0], num_clusters=2).tolist() == [
    5,
    0,
  ]


def test_points_on_a_line():
  found = run(medoids.kmedoids, LINE, num_clusters=2)
  assert found.index.tolist() == [1, 4]
  assert found.assignment.tolist() == [0, 0, 0, 1, 1, 1]
  assert found.mask.all()


def test_the_objective_never_increases():
  x = np.random.default_rng(3).normal(size=(20, N, 2)).astype(np.float32)
  far = np.asarray(run(distances.pairwise_distances, x))
  before = np.full(20, np.inf)
  for steps in range(4):
    found = run(medoids.kmedoids, x, num_clusters=3, num_iterations=steps)
    row = np.take_along_axis(
      np.asarray(found.index), np.asarray(found.assignment), axis=1
    )
    cost = np.take_along_axis(far, row[..., None], axis=2).sum(axis=(1, 2))
    assert (cost <= before + 1e-5).all()
    before = cost
  assert (cost < far.sum(axis=(1, 2))).all()


def test_all_tokens_are_medoids_when_there_is_room():
  x, _ = cases(0, 5, False)
  x[1] = x[1, :1]  # all equal
  found = run(medoids.kmedoids, x, num_clusters=N)
  np.testing.assert_array_equal(found.index, np.tile(np.arange(N), (5, 1)))
  np.testing.assert_array_equal(found.assignment, found.index)


def test_repeated_frames_give_back_each_token_once():
  x = np.random.default_rng(5).normal(size=(4, 3)).astype(np.float32)
  found = run(medoids.kmedoids, np.concatenate([x, x, x]), num_clusters=4)
  assert sorted(np.asarray(found.index) % 4) == [0, 1, 2, 3]
  copies = np.asarray(found.assignment).reshape(3, 4)
  np.testing.assert_array_equal(copies[0], copies[1])
  np.testing.assert_array_equal(copies[0], copies[2])


def test_order_of_tokens_and_shift_do_not_matter():
  x = np.random.default_rng(6).normal(size=(N, 3)).astype(np.float32)
  order = np.random.default_rng(7).permutation(N)
  want = set(np.asarray(run(medoids.kmedoids, x, num_clusters=4).index))
  moved = run(medoids.kmedoids, x[order], num_clusters=4)
  assert {order[i] for i in np.asarray(moved.index)} == want


def test_cosine_ignores_lengths():
  x = np.random.default_rng(8).normal(size=(N, 3)).astype(np.float32)
  far = run(distances.pairwise_distances, x, metric="cosine")
  start = jnp.linalg.norm(x, axis=1)
  want = run(medoids.kmedoids_of_distances, far, start, num_clusters=3)
  got = run(medoids.kmedoids, x, num_clusters=3, metric="cosine")
  np.testing.assert_array_equal(got.index, want.index)
  # The longest stays the longest.
  longer = run(medoids.kmedoids, 7 * x, num_clusters=3, metric="cosine")
  np.testing.assert_array_equal(longer.index, want.index)
  plain = run(medoids.kmedoids, x, num_clusters=3)
  assert plain.index.tolist() != got.index.tolist()


def test_equal_norms_start_from_the_first_valid_token():
  far = run(distances.pairwise_distances, LINE)
  mask = jnp.arange(6) > 1
  seeds = run(medoids.kkz_seeds, far, jnp.ones(6), mask, num_clusters=2)
  assert seeds.tolist() == [2, 5]


def test_batch_equals_one_by_one():
  x, mask = cases(11, 8, False)
  found = run(medoids.kmedoids, x, mask, num_clusters=3)
  for b in range(8):
    one = run(medoids.kmedoids, x[b], mask[b], num_clusters=3)
    for got, want in zip(found, one, strict=True):
      np.testing.assert_array_equal(got[b], want)


def test_mean_plan_is_the_mean_of_each_cluster():
  owner = jnp.array([[0, 1, 0, 2], [1, 1, 1, 2]])
  x = jnp.array([[[1.0], [2.0], [5.0], [9.0]]] * 2)
  plan = merging.mean_plan(owner, 2)
  means = plans.apply_plan(plan, x, 2)
  np.testing.assert_allclose(means[..., 0], [[3, 2], [0, 8 / 3]], rtol=1e-6)


def test_no_gradient_and_none_needed():
  def total(x):
    found = run(medoids.kmedoids, x, num_clusters=2)
    return jnp.sum(x[found.index])

  gradient = jax.grad(total)(jnp.asarray(LINE))
  np.testing.assert_array_equal(gradient[:, 0], [0, 1, 0, 0, 1, 0])


@pytest.mark.unchecked
def test_errors():
  x = jnp.asarray(LINE)
  with pytest.raises(ValueError, match="num_clusters must lie in 1..6, got 7"):
    medoids.kmedoids(x, num_clusters=7)
  with pytest.raises(ValueError, match="x_tokens=6, mask_tokens=5"):
    medoids.kmedoids(x, jnp.ones(5, bool), num_clusters=2)
  with pytest.raises(ValueError, match="distances_tokens=6, norms_tokens=5"):
    medoids.kkz_seeds(jnp.ones((6, 6)), jnp.ones(5), num_clusters=2)

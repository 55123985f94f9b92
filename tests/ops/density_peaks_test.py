import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import run
from tokjax.ops import density_peaks as peaks

N = 11


def oracle(x, mask, num_clusters, num_neighbors):
  """Centers, owners, scores by token, and the closest of its decisions."""
  valid = [n for n in range(len(x)) if mask[n]]
  x = x.astype(np.float64) / np.sqrt(x.shape[-1])
  away = {(i, j): np.linalg.norm(x[i] - x[j]) for i in valid for j in valid}
  density = {}
  for i in valid:
    near = sorted(away[i, j] for j in valid)[:num_neighbors]
    density[i] = np.exp(-np.mean(np.square(near)))
  score, gap = {}, np.inf
  for i in valid:
    denser = [j for j in valid if (density[j], -j) > (density[i], -i)]
    gap = min([gap] + [abs(density[i] - density[j]) for j in valid if j != i])
    height = min((away[i, j] for j in denser), default=max(away.values()))
    score[i] = density[i] * height
  order = sorted(valid, key=lambda n: (-score[n], n))
  live = min(num_clusters, len(valid))
  if live < len(valid):
    gap = min(gap, score[order[live - 1]] - score[order[live]])
  centers = sorted(order[:live])
  owner = {}
  for n in valid:
    choices = sorted(
      (-1.0 if n == c else away[n, c], k) for k, c in enumerate(centers)
    )
    owner[n] = choices[0][1]
    if len(choices) > 1:
      gap = min(gap, choices[1][0] - choices[0][0])
  return centers, owner, score, gap


@pytest.mark.parametrize("settings", [(1, 1), (3, 3), (3, 5), (N, N)], ids=str)
def test_equals_the_oracle(settings):
  num_clusters, num_neighbors = settings
  random = np.random.default_rng(num_neighbors)
  x = random.normal(size=(200, N, 4)).astype(np.float32)
  mask = random.random((200, N)) < random.uniform(0.2, 1.4, (200, 1))
  mask[0], mask[1] = False, True
  method = jax.jit(
    functools.partial(
      peaks.density_peaks,
      num_clusters=num_clusters,
      num_neighbors=num_neighbors,
    )
  )
  found = jax.device_get(method(np.where(mask[..., None], x, np.nan), mask))
  equal = 0
  for index, live, owner, one, m in zip(*found, x, mask, strict=True):
    centers, want, score, gap = oracle(one, m, num_clusters, num_neighbors)
    assert live.sum() == len(centers) and live[: len(centers)].all()
    assert (owner[~m] == num_clusters).all()
    if gap > 1e-5 or num_neighbors == 1 or num_clusters == N:
      equal += 1
      assert index[live].tolist() == centers
      assert {n: owner[n] for n in want} == want
    else:
      total = sum(score[n] for n in index[live])
      assert total >= sum(score[n] for n in centers) - 1e-4
  assert equal > 180


def test_ties_go_to_the_lower_position():
  # Four equal distances everywhere: all densities and heights are equal.
  corners = jnp.eye(4)
  found = run(peaks.density_peaks, corners, num_clusters=2)
  assert found.index.tolist() == [0, 1]
  assert found.assignment.tolist() == [0, 1, 0, 0]
  same = run(peaks.density_peaks, jnp.ones((5, 2)), num_clusters=2)
  assert same.index.tolist() == [0, 1]
  assert same.assignment.tolist() == [0, 1, 0, 0, 0]


def test_far_tokens_do_not_underflow():
  # Three corners; the middle token of each has density exp(-100), others less.
  corner = np.zeros((3, 4))
  corner[1, 0] = corner[2, 1] = np.sqrt(600)
  x = np.concatenate([corner, corner, corner])
  x[:, 3] = np.repeat([0, 4000, 9000], 3)
  label = np.repeat([0, 1, 2], 3)
  order = np.random.default_rng(0).permutation(9)
  x, label = x[order].astype(np.float32), label[order]
  found = run(peaks.density_peaks, x, num_clusters=3)
  assert sorted(order[np.asarray(found.index)]) == [0, 3, 6]
  owner = np.asarray(found.assignment)
  assert ((owner[:, None] == owner) == (label[:, None] == label)).all()


def test_batch_equals_one_by_one_and_no_gradient():
  x = np.random.default_rng(1).normal(size=(4, N, 3)).astype(np.float32)
  found = run(peaks.density_peaks, x, num_clusters=3)
  for b in range(4):
    one = run(peaks.density_peaks, x[b], num_clusters=3)
    np.testing.assert_array_equal(found.index[b], one.index)
    np.testing.assert_array_equal(found.assignment[b], one.assignment)

  def total(x):
    return jnp.sum(x[run(peaks.density_peaks, x, num_clusters=2).index])

  gradient = np.asarray(jax.grad(total)(jnp.asarray(x[0])))
  assert sorted(gradient[:, 0])[-3:] == [0, 1, 1]


@pytest.mark.unchecked
def test_errors():
  x = jnp.ones((4, 2))
  with pytest.raises(ValueError, match="num_clusters must lie in 1..4, got 5"):
    peaks.density_peaks(x, num_clusters=5)
  with pytest.raises(ValueError, match="num_neighbors must lie in 1..4, got 6"):
    peaks.density_peaks(x, num_clusters=2, num_neighbors=6)
  with pytest.raises(ValueError, match="x_tokens=4, mask_tokens=3"):
    peaks.density_peaks(x, jnp.ones(3, bool), num_clusters=2)

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import run
from tokjax.ops import medoids, spectral


def tokens(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def same_groups(a, b):
  """Whether two labellings put the same tokens together."""
  a, b = np.asarray(a), np.asarray(b)
  return ((a[:, None] == a[None]) == (b[:, None] == b[None])).all()


def graph(x, sigma, num_neighbors=None, window=None):
  n = len(x)
  x = x.astype(np.float64)
  away = np.array([[np.linalg.norm(p - q) for q in x] for p in x])
  allowed = np.ones((n, n), bool) if window is None else window
  near = np.zeros((n, n), bool)
  for i in range(n):
    row = sorted(
      (j for j in range(n) if allowed[i, j]),
      key=lambda j: (j != i, away[i, j], j),
    )
    near[i, row[:num_neighbors]] = True
  near = (near | near.T) & allowed
  return np.where(near, np.exp(-(away**2) / (2 * sigma**2)), 0)


@pytest.mark.parametrize("num_neighbors", [None, 1, 4])
@pytest.mark.parametrize("windowed", [False, True])
def test_affinity_graph_equals_a_loop(num_neighbors, windowed):
  x = tokens(0, 3, 12, 2)
  window = spectral.spatio_temporal_window((3, 2, 2), spatial=3, temporal=3)
  window = window if windowed else None
  got = run(
    spectral.affinity_graph,
    x,
    sigma=1.5,
    num_neighbors=num_neighbors,
    window=window,
  )
  for g, one in zip(np.asarray(got), x, strict=True):
    want = graph(one, 1.5, num_neighbors, window)
    np.testing.assert_allclose(g, want, atol=1e-6)


def test_window_equals_a_loop():
  got = spectral.spatio_temporal_window((4, 3, 5), spatial=3, temporal=5)
  places = [(t, y, x) for t in range(4) for y in range(3) for x in range(5)]
  for i, (t, y, x) in enumerate(places):
    for j, (s, v, u) in enumerate(places):
      near = abs(t - s) <= 2 and abs(y - v) <= 1 and abs(x - u) <= 1
      assert got[i, j] == near


def test_embedding_spans_the_space_of_the_svd():
  checked = 0
  for seed in range(30):
    w = graph(tokens(seed, 10, 2), 1.0)
    degree = w.sum(axis=1)
    laplacian = np.diag(degree) - w
    laplacian /= np.sqrt(degree[:, None] * degree[None, :])
    left, values, _ = np.linalg.svd(laplacian)
    if values[-5] - values[-4] < 1e-2:
      continue  # which vectors are the first four is a matter of rounding
    checked += 1
    rows = left[:, -4:]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    got = run(
      spectral.spectral_embedding, jnp.asarray(w, "float32"), num_components=4
    )
    got = np.asarray(got)
    np.testing.assert_allclose(got @ got.T, rows @ rows.T, atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)
  assert checked > 15


def test_embedding_is_turned_to_its_heavier_side():
  # A path of three: the second eigenvector has entries +a, 0, -a or so; the
  # first is all of one sign, and must be positive.
  w = graph(np.array([[0.0], [1.0], [2.0], [4.0]]), 1.0)
  got = run(
    spectral.spectral_embedding, jnp.asarray(w, "float32"), num_components=1
  )
  np.testing.assert_allclose(got, np.ones((4, 1)), atol=1e-5)


@pytest.mark.parametrize("num_neighbors", [None, 6])
def test_far_apart_groups_are_found(num_neighbors):
  label = np.array([0, 0, 1, 2, 1, 0, 2, 2, 1, 0, 1, 2])
  x = tokens(1, 12, 3) * 0.2 + 20 * label[:, None]
  found = run(
    spectral.spectral_medoids,
    x.astype(np.float32),
    num_clusters=3,
    num_neighbors=num_neighbors,
  )
  assert same_groups(found.assignment, label)
  assert sorted(label[np.asarray(found.index)]) == [0, 1, 2]


def test_groups_need_not_be_round():
  line = np.stack([np.arange(14) * 0.5, np.zeros(14)], axis=1)
  x = np.concatenate([line, line + np.array([0.2, 1.5])]).astype(np.float32)
  label = np.repeat([0, 1], 14)
  found = run(spectral.spectral_medoids, x, num_clusters=2, num_neighbors=3)
  assert same_groups(found.assignment, label)
  round_ones = run(medoids.kmedoids, x, num_clusters=2)
  assert not same_groups(round_ones.assignment, label)


def test_masked_tokens_have_no_influence():
  x = tokens(2, 14, 3)
  mask = np.arange(14) % 4 > 0
  poisoned = np.where(mask[:, None], x, np.nan)
  found = run(
    spectral.spectral_medoids, poisoned, jnp.asarray(mask), num_clusters=3
  )
  alone = run(spectral.spectral_medoids, x[mask], num_clusters=3)
  place = np.flatnonzero(mask)
  np.testing.assert_array_equal(found.index, place[np.asarray(alone.index)])
  np.testing.assert_array_equal(
    np.asarray(found.assignment)[mask], alone.assignment
  )
  assert (np.asarray(found.assignment)[~mask] == 3).all()
  rows = run(
    spectral.spectral_embedding,
    run(spectral.affinity_graph, poisoned, jnp.asarray(mask)),
    jnp.asarray(mask),
    num_components=3,
  )
  assert not np.asarray(rows)[~mask].any()


def test_few_valid_tokens_all_stay():
  x = tokens(3, 6, 2)
  mask = jnp.array([False, True, False, True, False, False])
  found = run(spectral.spectral_medoids, x, mask, num_clusters=4)
  assert found.index.tolist() == [1, 3, 5, 5]
  assert found.mask.tolist() == [True, True, False, False]
  none = run(spectral.spectral_medoids, x, jnp.zeros(6, bool), num_clusters=4)
  assert not none.mask.any()


def test_batch_equals_one_by_one_under_jit():
  x = tokens(4, 5, 10, 3)
  method = jax.jit(lambda x: run(spectral.spectral_medoids, x, num_clusters=3))
  found = method(x)
  for b in range(5):
    one = method(x[b : b + 1])
    np.testing.assert_array_equal(found.index[b], one.index[0])


def test_no_gradient():
  gradient = jax.grad(
    lambda x: jnp.sum(
      x[run(spectral.spectral_medoids, x, num_clusters=2).index]
    )
  )(jnp.asarray(tokens(5, 6, 2)))
  assert sorted(np.asarray(gradient[:, 0])) == [0, 0, 0, 0, 1, 1]


@pytest.mark.unchecked
def test_errors():
  x = jnp.ones((4, 2))
  with pytest.raises(ValueError, match="num_neighbors must lie in 1..4, got 5"):
    spectral.affinity_graph(x, num_neighbors=5)
  with pytest.raises(ValueError, match="x_tokens=4, window_rows=3"):
    spectral.affinity_graph(x, window=np.ones((3, 3), bool))
  with pytest.raises(ValueError, match="spatial_minus_1 must be a multiple"):
    spectral.spatio_temporal_window((1, 2, 2), spatial=4)
  with pytest.raises(ValueError, match="num_components must lie in 1..4"):
    spectral.spectral_embedding(jnp.ones((4, 4)), num_components=0)

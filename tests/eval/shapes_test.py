"""Distances between shapes against all pairs, and their edge cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import compiled, run
from tokjax.eval import shapes as module

shapes = compiled(module)


def sets(number=(7, 5), seed=0, width=3):
  random = np.random.default_rng(seed)
  return tuple(
    random.normal(size=(2, n, width)).astype(np.float32) for n in number
  )


def pairs(x, y):
  x, y = x.astype(np.float64), y.astype(np.float64)
  return np.linalg.norm(x[:, :, None] - y[:, None], axis=-1)


@pytest.mark.parametrize("block_size", [1, 3, 1024])
def test_equal_all_pairs_whatever_the_blocks(block_size):
  x, y = sets()
  away = pairs(x, y)
  there, back = away.min(2), away.min(1)
  got = shapes.nearest_distances(x, y, block_size=block_size)
  np.testing.assert_allclose(got, there, rtol=1e-5)
  got = shapes.chamfer(x, y, block_size=block_size)
  np.testing.assert_allclose(got, there.mean(1) + back.mean(1), rtol=1e-5)
  got = shapes.chamfer(x, y, squared=True, block_size=block_size)
  want = (there**2).mean(1) + (back**2).mean(1)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  found = shapes.f_score(x, y, threshold=1.0, block_size=block_size)
  precision, recall = (there <= 1).mean(1), (back <= 1).mean(1)
  np.testing.assert_allclose(found.precision, precision, rtol=1e-6)
  np.testing.assert_allclose(found.recall, recall, rtol=1e-6)
  want = 2 * precision * recall / (precision + recall)
  np.testing.assert_allclose(found.f_score, want, rtol=1e-6)


def test_three_against_three_by_hand():
  x, y = jnp.array([[0.0], [1], [2]]), jnp.array([[0.0], [1.05], [5]])
  found = shapes.f_score(x, y, threshold=0.1)
  assert float(found.precision) == pytest.approx(2 / 3)
  assert float(found.recall) == pytest.approx(2 / 3)
  assert float(found.f_score) == pytest.approx(2 / 3)
  same = shapes.f_score(x, x, threshold=0.0)
  assert [float(v) for v in same] == pytest.approx([1, 1, 1])
  apart = shapes.f_score(x, x + 9, threshold=0.1)
  assert [float(v) for v in apart] == [0, 0, 0]


def test_padding_changes_nothing():
  x, y = sets()
  mask = np.array([[1, 1, 0, 1, 1, 0, 1], [1, 1, 1, 0, 0, 0, 0]], bool)
  target_mask = np.array([[1, 0, 1, 1, 1], [0, 1, 1, 1, 0]], bool)
  x[~mask], y[~target_mask] = np.nan, np.nan
  f = shapes.f_score(x, y, mask, target_mask, threshold=1.0, block_size=2)
  chamfer = shapes.chamfer(x, y, mask, target_mask, block_size=2)
  for b in range(2):
    one, other = x[b : b + 1, mask[b]], y[b : b + 1, target_mask[b]]
    want = run(module.f_score, one, other, threshold=1.0, block_size=2)
    assert float(f.f_score[b]) == pytest.approx(float(want.f_score[0]))
    want = run(module.chamfer, one, other, block_size=2)
    assert float(chamfer[b]) == pytest.approx(float(want[0]), rel=1e-5)


def test_empty_sets():
  x, y = sets()
  none = np.zeros(y.shape[:2], bool)
  found = shapes.f_score(x, y, None, none, threshold=9.0)
  assert all(not np.any(value) for value in found)
  assert np.all(np.isinf(shapes.chamfer(x, y, None, none)))
  nobody = np.zeros(x.shape[:2], bool)
  assert not np.any(shapes.chamfer(x, y, nobody, none))


def test_gradient_of_chamfer_and_none_where_points_coincide():
  x = np.array([[0.0, 0], [3, 4]], np.float32)
  y = np.array([[0.0, 0], [3, 7]], np.float32)
  total = lambda x, y: module.chamfer(x, y)  # noqa: E731
  of_x, of_y = jax.jit(jax.grad(total, argnums=(0, 1)))(x, y)
  np.testing.assert_allclose(of_x, [[0, 0], [0, -1]], atol=1e-6)
  np.testing.assert_allclose(of_y, [[0, 0], [0, 1]], atol=1e-6)


def test_overlap():
  x = np.array([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], bool)
  y = np.array([[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]], bool)
  np.testing.assert_allclose(shapes.volume_iou(x, y), [1 / 3, 1, 0.25])
  mask = np.array([[1, 1, 0, 1], [1, 1, 1, 1], [1, 0, 0, 0]], bool)
  np.testing.assert_allclose(shapes.volume_iou(x, y, mask), [0.5, 1, 1])


@pytest.mark.unchecked
def test_errors():
  x, y = sets()
  with pytest.raises(ValueError, match="width_of_points=3, others=2"):
    module.nearest_distances(x, y[..., :2])
  with pytest.raises(ValueError, match="others=5, other_mask=7"):
    module.nearest_distances(x, y, np.ones((2, 7), bool))
  with pytest.raises(ValueError, match="occupied=3, target=4"):
    module.volume_iou(np.ones(3, bool), np.ones(4, bool))

"""Search among short codes, on a few windows of random photographs."""

import numpy as np
import PIL.Image
import pytest

from tokjax.benchmarks import vector_codes
from tokjax.cli import claim


def smooth(seed):
  draw = np.random.default_rng(seed)
  coarse = draw.integers(0, 255, (9, 11, 3), dtype=np.uint8)
  return np.asarray(PIL.Image.fromarray(coarse).resize((66, 54)))


def test_histograms_equal_a_loop():
  pixels = smooth(0)
  grey = pixels.astype(float) @ [0.299, 0.587, 0.114]
  dy, dx = np.gradient(grey)
  want = np.zeros((16, 8))
  for y in range(16):
    for x in range(16):
      angle = np.arctan2(dy[y, x], dx[y, x]) / (2 * np.pi) * 8 % 8
      low, share = int(angle) % 8, angle - int(angle)
      cell, size = y // 4 * 4 + x // 4, np.hypot(dy[y, x], dx[y, x])
      want[cell, low] += (1 - share) * size
      want[cell, (low + 1) % 8] += share * size
  want = np.minimum(want.ravel() / np.linalg.norm(want), 0.2)
  got = vector_codes.gradient_histograms(pixels)
  assert got.shape == (10 * 13, 128) and got.dtype == np.float32
  np.testing.assert_allclose(got[0], want / np.linalg.norm(want), atol=1e-5)
  flat = np.full((32, 32, 3), 9, np.uint8)
  assert vector_codes.gradient_histograms(flat).shape == (0, 128)


def test_ties_of_distances_go_to_the_lower_index():
  distances = np.array([[1.0, 1.0, 2.0], [1.0, 1.0, 2.0]])
  got = vector_codes.recalls(distances, np.array([0, 1]))
  assert got == {"R@1": 0.5, "R@10": 1.0, "R@100": 1.0}


def test_all_kinds_of_codes_are_measured(tmp_path, capsys):
  for i in range(4):
    PIL.Image.fromarray(smooth(i)).save(tmp_path / f"{i}.png")
  run = vector_codes.VectorCodesRun(
    str(tmp_path), num_train=200, num_base=150, num_queries=40, num_books=4,
    num_codes=16, num_iterations=3, num_rounds=1, num_rounds_stored=2,
  )  # fmt: skip
  train, base, queries = vector_codes.vectors(run)
  assert (len(train), len(base), len(queries)) == (200, 150, 40)
  found = {tuple(x) for x in np.concatenate([train, base, queries])}
  assert len(found) > 380  # different windows
  rows = vector_codes.measure(run)
  assert list(rows) == ["PQ", "OPQ", "AQ", "RVQ 2", "RVQ"]
  assert rows["PQ"].bytes_per_document == 2
  assert rows["AQ"].bytes_per_document == 6
  for row in rows.values():
    recall = [row.metrics[f"R@{r}"] for r in (1, 10, 100)]
    assert sorted(recall) == recall and recall[2] > 0.9
    assert 0 < row.metrics["distortion"] < 0.7
  assert rows["AQ"].metrics["distortion"] < rows["PQ"].metrics["distortion"]
  assert -1 < vector_codes.lead(rows) < 1
  assert "RVQ 2" in capsys.readouterr().out
  with pytest.raises(ValueError, match="vectors_wanted must lie in"):
    vector_codes.vectors(vector_codes.VectorCodesRun(str(tmp_path)))


def test_the_claim_can_be_read():
  found = claim.load("vector_codes", "data")
  assert [(run.dataset, run.seed) for run in found.runs] == [
    ("data/images-kodak", seed) for seed in range(3)
  ]
  row = vector_codes.Row(
    {"R@1": 0.5, "R@10": 1.0, "R@100": 1.0, "distortion": 1.0}, 8.0
  )
  rows = dict.fromkeys(("PQ", "OPQ", "AQ", "RVQ 2", "RVQ"), row)
  assert found.margin(rows) == 0
  low = vector_codes.Row(row.metrics | {"R@1": 0.25}, 8.0)
  assert found.margin(rows | {"OPQ": low}) == -0.25
  deeper = vector_codes.Row(row.metrics | {"distortion": 1.5}, 8.0)
  assert found.margin(rows | {"RVQ": deeper}) == -0.5

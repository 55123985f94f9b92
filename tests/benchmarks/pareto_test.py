"""The picture of a file of rows: its points, its front, its names."""

import json

import matplotlib.image
import numpy as np
import pytest

from tokjax.benchmarks import pareto, trained_retrieval


def write(path, rows):
  with path.open("w") as file:
    for name, seed, size, value, *changes in rows:
      config = {"seed": seed, "num_steps": 300, **dict(changes)}
      row = {"name": name, "metrics": {"nDCG@10": value}, "config": config}
      file.write(json.dumps({**row, "bytes_per_document": size}) + "\n")
  return path


ROWS = [
  ("dense", 0, 768, 0.46),
  ("colbert", 0, 47_461, 0.56),
  ("colbert", 1, 47_461, 0.54),
  ("crisp", 0, 6_144, 0.44),
  ("head", 0, 15_820, 0.54),
]


def test_seeds_are_one_point(tmp_path):
  points = pareto.read(write(tmp_path / "rows.jsonl", ROWS))
  assert [p.name for p in points] == ["dense", "colbert", "crisp", "head"]
  colbert = points[1]
  assert (colbert.size, colbert.low, colbert.high) == (47_461, 0.54, 0.56)
  assert colbert.mean == pytest.approx(0.55)
  assert [p.name for p in pareto.front(points)] == ["dense", "head", "colbert"]


def test_rows_of_other_settings_are_refused(tmp_path):
  rows = [*ROWS, ("late", 0, 99, 0.4, ("num_steps", 900))]
  with pytest.raises(ValueError, match="num_steps=300 and 900"):
    pareto.read(write(tmp_path / "rows.jsonl", rows))
  with pytest.raises(ValueError, match="holds no row"):
    pareto.read(write(tmp_path / "none.jsonl", []))


def test_picture_names_every_point_on_any_ground(tmp_path):
  rows, svg = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "a" / "plot.svg"
  trained_retrieval.main(["--seeds", "--out", str(rows), "--plot", str(svg)])
  text = svg.read_text()
  for word in ("dense", "colbert", "crisp", "head", "nDCG@10", "log scale"):
    assert f">{word}" in text or word in text
  assert rows.read_text().count("\n") == len(ROWS)  # nothing was measured
  png = tmp_path / "plot.png"
  pareto.plot(pareto.read(rows), png)
  pixels = matplotlib.image.imread(png)  # red, green, blue, alpha
  assert np.mean(pixels[..., 3] == 0) > 0.8  # the ground shows through
  drawn = pixels[pixels[..., 3] == 1][:, :3]
  luminance = drawn @ np.array([0.2126, 0.7152, 0.0722])
  assert 0.2 < luminance.min() and luminance.max() < 0.7
  with pytest.raises(ValueError, match="end in .svg or .png, got 'plot.gif'"):
    pareto.plot(pareto.read(rows), tmp_path / "plot.gif")
  with pytest.raises(SystemExit):
    trained_retrieval.main(["--seeds", "--plot", str(svg)])

"""The collapse bench, on two images and for two steps."""

import jax
import numpy as np
import pytest

from tokjax.benchmarks import quantizers
from tokjax.benchmarks.trained_vit import Row
from tokjax.cli import claim


def test_points_lie_around_as_many_means():
  points = np.asarray(
    quantizers.mixture(jax.random.key(0), 2000, num_components=4)
  )
  means = np.asarray(
    quantizers.mixture(jax.random.key(0), 4000, num_components=4)
  )
  assert points.shape == (2000, 2)
  # The components come of the key alone: both sets lie around the same four.
  far = np.linalg.norm(points[:, None] - means[None], axis=-1)
  assert far.min(axis=1).max() < 0.03
  group = [points[0]]
  for point in points:
    if min(np.linalg.norm(point - g) for g in group) > 0.09:
      group.append(point)
  assert len(group) == 4
  near = points[np.linalg.norm(points - group[0], axis=1) < 0.09]
  np.testing.assert_allclose(near.std(axis=0), 0.01, rtol=0.15)
  assert len(near) == pytest.approx(500, abs=80)


def test_rows(tmp_path):
  draw = np.random.default_rng(0)
  arrays = {}
  for part, number in (("train", 40), ("test", 200)):
    x = draw.integers(0, 255, (number, 32, 32, 3), dtype=np.uint8)
    labels = (np.arange(number) % 10).astype(np.uint8)
    arrays |= {f"{part}_x": x, f"{part}_y": labels}
  np.savez(tmp_path / "cifar10.npz", **arrays)
  run = quantizers.QuantizerRun(str(tmp_path), 0, 2, 2, ("fsq", "rvq of 4"))
  rows = quantizers.measure(run)
  assert list(rows) == [
    f"{title} {name}"
    for title in ("points", "patches")
    for name in ("fsq", *(f"rvq {n} of 4" for n in quantizers.DEPTHS))
  ]
  for title in ("points", "patches"):
    found = rows[f"{title} fsq"].metrics
    assert 0 < found["usage"] <= 1 and found["perplexity"] >= 1
    assert 0 < found["psnr"] < 40
    assert set(rows[f"{title} rvq 2 of 4"].metrics) == {"psnr"}


def test_the_margin_is_what_fails_most():
  usage = {"vq": 0.1, "vq_ema_reset": 1, "vq_simvq": 0.95, "vq_cosine": 1,
           "fsq": 0.5}  # fmt: skip
  rows = {f"points {name}": Row({"usage": x}) for name, x in usage.items()}
  for depth, psnr in zip((1, 2, 3, 4), (10, 11, 15, 20), strict=True):
    rows[f"points rvq {depth} of 4"] = Row({"psnr": psnr})

  def margin(**other):
    more = {f"points {name}": Row({"usage": x}) for name, x in other.items()}
    return quantizers.margin(rows | more, data=("points",))

  assert margin() == pytest.approx(0.05)  # simvq above 90 %
  assert margin(fsq=0.08) == pytest.approx(-0.02)
  assert margin(vq_cosine=0.6) == pytest.approx(-0.3)
  rows["points rvq 3 of 4"] = Row({"psnr": 10})
  assert margin() == pytest.approx(-0.1)


def test_the_claim_can_be_read():
  found = claim.load("quantizers", "data")
  assert [run.seed for run in found.runs] == [0, 1, 2]
  assert found.runs[0].dataset == "data/images-cifar10"
  assert quantizers.on_seeds("d", seeds=(4, 5))[1].seed == 5

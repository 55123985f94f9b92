"""Every method runs on what an encoder gives; its numbers by hand."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from flax import nnx

from tokjax.benchmarks import reduction, reduction_methods
from tokjax.models import vit
from tokjax.models.reducing import Taps
from tokjax.reduction import types

CONFIG = vit.VitConfig(
  image_size=24, patch_size=4, width=16, num_layers=3, num_heads=2,
  mlp_width=16, num_outputs=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def signals():
  images = jax.random.normal(jax.random.key(0), (2, 24, 24, 3))
  return reduction_methods.read(vit.Vit(CONFIG, rngs=nnx.Rngs(0)), images)


@pytest.mark.parametrize("name", reduction_methods.METHODS)
def test_a_method_keeps_what_it_is_told(name, signals):
  method = reduction_methods.METHODS[name]
  reduced = jax.jit(lambda s: method(s, 9, (6, 6)))(signals)
  assert reduced.tokens.shape == (2, 9, 16)
  kept = np.asarray(jnp.sum(reduced.mask, axis=1))
  # By content, where it is the content that decides how many.
  assert (kept <= 9).all() if name == "correlation" else (kept == 9).all()
  assert np.isfinite(np.asarray(reduced.tokens)).all()


def test_controls_are_methods():
  assert set(reduction_methods.CONTROLS) < set(reduction_methods.METHODS)


def test_signals_are_those_of_the_layers(signals):
  model = vit.Vit(CONFIG, rngs=nnx.Rngs(0))
  images = jax.random.normal(jax.random.key(0), (2, 24, 24, 3))
  tap = model.encode(images, taps=Taps(keys=(1,), hidden=(1,))).taps[1]
  np.testing.assert_allclose(signals.deep.keys, tap.keys, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(
    signals.features, tap.hidden[:, 1:], rtol=1e-5, atol=1e-6
  )


def test_a_model_without_class_token_is_refused():
  config = vit.VitConfig(
    image_size=8, patch_size=4, width=8, num_layers=2, num_heads=1,
    mlp_width=8, class_token=False, pool="mean",
  )  # fmt: skip
  with pytest.raises(ValueError, match="got 0 special tokens"):
    reduction_methods.read(
      vit.Vit(config, rngs=nnx.Rngs(0)), jnp.ones((1, 8, 8, 3))
    )


def test_quality_by_hand():
  x = jnp.array([[[1.0, 0], [1, 0], [0, 1], [-1, 0]]])
  logits = jnp.log(jnp.array([1.0, 1, 2, 3, 3]))  # class token, patches
  keys = logits[None, None, :, None]
  attention = reduction_methods.Attention(jnp.ones_like(keys), keys)
  signals = reduction_methods.Signals(x, attention, attention, attention, x)
  got = reduction.quality(signals, types.selected(x, jnp.array([[0, 2]])))
  assert float(got["distance"][0]) == 1.0
  assert float(got["coverage"][0]) == pytest.approx((1 + 1 + 1 + 0) / 4)
  assert float(got["attention"][0]) == pytest.approx((1 + 3) / 9)
  one = types.selected(x, jnp.array([[0, 2]]), jnp.array([[False, True]]))
  got = reduction.quality(signals, one)
  assert float(got["kept"][0]) == 1 and float(got["distance"][0]) == 2


def test_statistics_of_a_picture():
  image = np.zeros((1, 4, 8, 1), np.float32)
  image[0, :, 4:] = 2.0
  signals = reduction_methods.statistics(jnp.asarray(image), 4)
  assert signals.features.shape == (1, 2, 4)
  np.testing.assert_allclose(signals.features[0, :, 0], [-1, 1], atol=1e-5)
  np.testing.assert_allclose(signals.features[0, :, 1:], 0, atol=1e-5)


def test_the_command_prints_and_writes_rows(tmp_path, capsys):
  random = np.random.default_rng(0)
  for name in ("a.png", "b.png"):
    pixels = random.integers(0, 255, (60, 80, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / name)
  out = tmp_path / "rows.jsonl"
  common = ["--side", "4", "--repeats", "1", "--out", str(out)]
  plot = tmp_path / "plot.svg"
  reduction.main(
    [str(tmp_path), *common, "--keep", "5", "3", "--plot", str(plot)]
    + ["--methods", "random", "divprune"]
  )
  reduction.main([str(tmp_path), *common, "--crops", "--methods", "uniform"])
  assert "divprune" in capsys.readouterr().out
  rows = [json.loads(line) for line in out.read_text().splitlines()]
  names = [row["implementation"] for row in rows]
  assert names == [
    "encoder", *["random", "divprune"] * 2, "encoder", *["uniform"] * 3
  ]  # fmt: skip
  assert rows[4]["shape"] == {"N": 16, "K": 3, "D": 12, "images": 2}
  assert rows[4]["distance"] > rows[3]["distance"]
  assert rows[-1]["shape"]["N"] == 80
  # A 7B model spends some 13 GFLOPs on a token.
  assert rows[4]["saved_tflops"] == pytest.approx(13 * 13e-3, rel=0.1)
  assert plot.read_text().count("divprune") == 1
  drawn = reduction.points(rows[:5])
  assert [(p.name, p.mean) for p in drawn] == [
    (row["implementation"], row["coverage"]) for row in rows[3:5]
  ]


def test_an_empty_folder(tmp_path):
  with pytest.raises(ValueError, match="no .png or .jpg image in"):
    reduction.run(str(tmp_path))


def test_views_are_an_overview_and_quarters():
  image = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1)
  views = reduction._views(image)[0, ..., 0]
  np.testing.assert_array_equal(views[0], [[2.5, 4.5], [10.5, 12.5]])
  np.testing.assert_array_equal(views[2], [[2, 3], [6, 7]])
  np.testing.assert_array_equal(views[3], [[8, 9], [12, 13]])

"""Experiments behind the claims about reductions, on a tiny encoder."""

import pathlib

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from flax import nnx

from tokjax.benchmarks import (
  crop_budgets,
  page_reduction,
  prompt_reduction,
  reduction,
  reduction_accuracy,
  scenes,
  trained_vit,
  video_retrieval,
)
from tokjax.cli import claim
from tokjax.data import cifar10, image_batches
from tokjax.models import vit, vit_weights
from tokjax.ops import plans
from tokjax.reduction import types

CLAIMS = (
  "aim catp center_clip correlation_guided divprune global_com hiprune mmtok"
  " todre token_transforming visiondrop vtc_cls"
).split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """An untrained encoder of 16 patches, forty images, four photographs."""
  folder = tmp_path_factory.mktemp("claims")
  config = vit.VitConfig(
    image_size=32, patch_size=8, width=16, num_layers=4, num_heads=2,
    mlp_width=32, num_outputs=10,
  )  # fmt: skip
  model = vit.Vit(config, rngs=nnx.Rngs(0))
  vit_weights.save(folder / "vit_cifar10_0" / "model", model)
  draw = np.random.default_rng(0)
  arrays = {}
  for part in ("train", "test"):
    x = draw.integers(0, 255, (40, 32, 32, 3), dtype=np.uint8)
    arrays |= {f"{part}_x": x, f"{part}_y": np.arange(40, dtype=np.uint8) % 10}
  np.savez(folder / "cifar10.npz", **arrays)
  for i in range(4):
    pixels = draw.integers(0, 255, (60, 90, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(folder / f"{i}.png")
  return trained_vit.VitRun(str(folder), str(folder), runs=str(folder))


def photographs(count=2):
  draw = np.random.default_rng(1)
  return [
    draw.integers(0, 255, (60, 90, 3), dtype=np.uint8) for _ in range(count)
  ]


def test_what_is_trained_is_not_trained_again(run):
  path = pathlib.Path(trained_vit.folder(run))
  before = sorted(path.parent.rglob("*"))
  assert trained_vit.load(run).config.width == 16
  assert sorted(path.parent.rglob("*")) == before
  assert [x.seed for x in trained_vit.on_seeds("d", seeds=(4, 5))] == [4, 5]


def test_lead_is_over_the_best_other_at_the_worst_budget():
  table = {"a": (0.5, 0.75), "b": (0.25, 0.125), "c": (0.0, 0.625)}
  rows = {
    f"{name} {k}": trained_vit.Row({"R@1": x})
    for name, values in table.items()
    for k, x in zip((4, 8), values, strict=True)
  }
  settings = dict(keep=(4, 8), metric="R@1")
  assert trained_vit.lead(rows, "a", ("b", "c"), **settings) == 0.125
  assert trained_vit.lead(rows, "b", ("c",), **settings) == -0.5


def test_photographs_of_a_run_come_in_order(run):
  shapes = [x.shape for x in trained_vit.photographs(run)]
  assert shapes == [(60, 90, 3)] * 4


@pytest.mark.parametrize("name", CLAIMS)
def test_claims_can_be_read(name):
  found = claim.load(name, "data")
  assert [run.seed for run in found.runs] == [0, 1, 2]
  assert found.runs[0].dataset == "data/images-cifar10"


def test_a_pan_moves_and_a_still_is_mirrored():
  ramp = (
    np.zeros((60, 90, 3), np.uint8) + np.arange(90, dtype=np.uint8)[:, None]
  )
  frames = video_retrieval.pan(ramp, 3, 32)
  assert frames.shape == (3, 32, 32, 3)
  assert (np.diff(frames[:, 0, 0, 0].astype(int)) > 0).all()
  picture = video_retrieval.still(ramp, 32)
  assert (np.diff(picture[0, :, 0].astype(int)) <= 0).all()


@pytest.mark.parametrize("fuse", [False, True])
def test_pseudo_frame_holds_the_mean_class_token_and_the_reduced(fuse):
  x = jnp.arange(6.0).reshape(1, 6, 1)  # two frames: class 0 and 3
  patches = jnp.array([[[1.0], [2.0], [4.0], [5.0]]])
  reduced = types.selected(patches, jnp.array([[1, 2]]))
  want = [1.5, 2, 4]
  if fuse:
    slot, weight = jnp.array([[0, 2, 0, 1]]), jnp.array([[0.5, 1, 0.5, 1]])
    plan = plans.Merge(slot, weight)  # the second is dropped
    reduced = types.fused(patches, plan, jnp.array([[0, 3]]))
    want = [1.5, 2.5, 5]
  got = video_retrieval.pseudo_frame(reduced, x, 2)
  assert got.tokens[0, :, 0].tolist() == want
  assert got.index.tolist() == [[0, 1, 5] if fuse else [0, 2, 4]]


def test_videos_are_found_by_their_first_frame(run, monkeypatch):
  """Where the still is a frame itself, every video comes first."""
  model = trained_vit.load(run)
  monkeypatch.setattr(
    video_retrieval, "still", lambda x, side: video_retrieval.pan(x, 6, side)[0]
  )
  flat = [np.full((60, 90, 3), 80 * i, np.uint8) for i in range(4)]
  pairs = [flat[0], flat[0], flat[3], flat[3]]
  assert video_retrieval.found_videos(model, pairs, None) == 1


def test_video_rows(run):
  rows = video_retrieval.measure(run, keep=(16,))
  assert set(rows) == {
    "all frames", *(f"{name} 16" for name in video_retrieval.METHODS)
  }  # fmt: skip
  assert rows["all frames"].metrics["share"] == 1
  assert 0.5 < rows["medoids 16"].metrics["share"] < 0.8  # a half, and a third
  assert all(0 <= row.metrics["R@1"] <= 1 for row in rows.values())


def test_a_scene_shows_its_object_where_it_says(run):
  _, test = cifar10.load(run.dataset)
  made = scenes.compose(test, photographs(), num_scenes=40, seed=0)
  assert made.squares.shape == (40, 4, 32, 32, 3)
  for i in range(40):
    same = (made.squares[i] == test.images[i]).all(axis=(1, 2, 3))
    assert np.flatnonzero(same).tolist() == [made.place[i]]
  few = scenes.compose(test, photographs(), num_scenes=30, seed=0)
  shown = few.squares[np.arange(30), few.place]
  every = [image.tobytes() for image in test.images]
  rows = [every.index(image.tobytes()) for image in shown]
  assert len(set(rows)) == 30 and max(rows) > 30  # drawn, none twice
  np.testing.assert_array_equal(few.labels, test.labels[rows])


def test_the_reader_reads_what_it_was_fitted_to(run):
  """Classes that differ in color only are read from the mean of patches."""
  color = np.linspace(0, 255, 10).astype(np.uint8)
  labels = np.arange(40) % 10
  images = np.zeros((40, 32, 32, 3), np.uint8)
  images += color[labels][:, None, None, None]
  images[..., 1] = color[(labels * 3) % 10][:, None, None]
  data = image_batches.ImageSet(images, labels, cifar10.CLASSES)
  model = trained_vit.load(run)
  accuracy, of_class = scenes.reader(model, data)
  seen = scenes.see(model, images)
  all_kept = types.selected(seen.patches, jnp.tile(jnp.arange(16), (40, 1)))
  assert (
    accuracy(all_kept, labels) > 0.5 > accuracy(all_kept, (labels + 1) % 10)
  )
  np.testing.assert_allclose(
    of_class[3], seen.patches[3].mean(axis=0), atol=1e-5
  )


def test_crop_rows_keep_what_they_say(run):
  rows = crop_budgets.measure(run, ratios=(0.5,), num_scenes=8)
  assert rows["whole"].metrics["tokens"] == 80
  assert rows["whole"].metrics["object"] == 0.25
  assert rows["equal 0.5"].metrics["tokens"] == 40
  assert rows["equal 0.5"].metrics["object"] == 0.25
  assert rows["random 0.5"].metrics["tokens"] == 40
  assert 36 <= rows["global 0.5"].metrics["tokens"] <= 40  # rounded down


def test_prompt_rows(run):
  rows = prompt_reduction.measure(run, keep=(8, 4), num_prompts=3)
  assert len(rows) == 14
  for name, row in rows.items():
    (metric,) = row.metrics
    assert metric == ("related" if "context" in name else "object")
    assert 0 <= row.metrics[metric] <= 1


def test_sub_images_are_the_page():
  page = np.arange(6 * 5, dtype=np.uint8).reshape(6, 5)
  squares = page_reduction.sub_images(page, 4)
  assert squares.shape == (4, 4, 4, 3)
  np.testing.assert_array_equal(squares[0, ..., 0], page[:4, :4])
  np.testing.assert_array_equal(squares[3, :2, :1, 1], page[4:, 4:])
  assert (squares[3, 2:] == 255).all()


def test_ink_is_where_it_is_dark():
  page = np.full((1, 8, 8, 3), 250, np.uint8)
  page[0, 4, 4:6] = 50  # in the last of four patches
  page[0, 0, 0] = 240  # a shadow
  assert page_reduction.ink(page, 4).tolist() == [[0, 0, 0, 1]]


def test_page_rows(run):
  rows = page_reduction.measure(run)
  for page in page_reduction.pages():
    kept = [x for name, x in rows.items() if name.startswith(f"{page}:")]
    assert len(kept) == 5
    shares = [x.metrics["kept"] for x in kept]
    assert max(shares) - min(shares) < 1 / 16  # as many for everyone
    assert all(0 <= x.metrics["ink"] <= 1 + 1e-9 for x in kept)


def test_rows_of_the_other_claims(run):
  rows = reduction_accuracy.claimed(run, keep=(8,), methods=("random", "tome"))
  assert list(rows) == ["none", "random 8", "tome 8"]
  assert rows["random 8"].metrics["share"] < 1


def test_photograph_rows(run):
  rows = reduction.claimed(run, keep=(8,), methods=("random", "mmtok"))
  assert list(rows) == ["random 8", "mmtok 8"]
  covered = [row.metrics["coverage"] for row in rows.values()]
  assert covered[0] < covered[1] <= 1
  assert set(rows["random 8"].metrics) == {"distance", "coverage", "attention"}

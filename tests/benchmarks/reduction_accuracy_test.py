"""Reductions inside a ViT: what is left, what it costs, what it scores."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokjax.benchmarks import reduction_accuracy, reduction_methods
from tokjax.data import cifar10, image_batches
from tokjax.models import vit, vit_weights
from tokjax.ops import plans
from tokjax.reduction import types

CONFIG = vit.VitConfig(
  image_size=16, patch_size=4, width=16, num_layers=4, num_heads=2,
  mlp_width=32, num_outputs=10,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
  return vit.Vit(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def data():
  random = np.random.default_rng(0)
  images = random.integers(0, 255, (6, 16, 16, 3), dtype=np.uint8)
  names = tuple("abcdefghij")
  return image_batches.ImageSet(images, np.arange(6, dtype=np.uint8), names)


@pytest.mark.parametrize("kind", ["selection", "merge", "transform"])
def test_the_class_token_stays_first(kind):
  x = jnp.arange(1.0, 6.0).reshape(1, 5, 1)
  patches = x[:, 1:]  # 2, 3, 4, 5
  if kind == "selection":
    few, want = types.selected(patches, jnp.array([[0, 3]])), [1, 2, 5]
  elif kind == "merge":
    slot, weight = jnp.array([[0, 1, 1, 2]]), jnp.array([[1, 0.5, 0.5, 1]])
    plan = plans.Merge(slot, weight)  # the last one is dropped
    few, want = types.fused(patches, plan, jnp.array([[0, 2]])), [1, 2, 3.5]
  else:
    weight = jnp.array([[[0.5, 0.5, 0, 0], [0, 0, 0, 1]]])
    share = jnp.array([[[1, 1, 0, 0], [0, 0, 1, 1.0]]])
    plan = plans.Transform(weight, share)
    few, want = types.fused(patches, plan, jnp.array([[0, 3]])), [1, 2.5, 5]
  got = reduction_accuracy.beside_class_token(few, x)
  assert got.tokens[0, :, 0].tolist() == want
  assert got.index.tolist() == [[0, *(few.index[0] + 1).tolist()]]
  assert got.size.tolist() == [[1, *few.size[0].tolist()]]


def test_flops_are_those_of_the_compiler(model):
  rows = [17] * 4
  counted = reduction_accuracy.forward_flops(CONFIG, rows, rows)
  images = jnp.ones((1, 16, 16, 3))

  def unrolled(images):  # the compiler counts the body of a scan once
    return (
      model.encode(images, taps=vit.Taps(hidden=tuple(range(4)))).taps[3].hidden
    )

  cost = jax.jit(unrolled).lower(images).compile().cost_analysis()
  assert counted == pytest.approx(cost["flops"], rel=0.15)


@pytest.mark.parametrize("name", reduction_accuracy.NAMES)
def test_keeping_all_changes_little_or_nothing(name, model, data):
  """Pure selections of all patches are the model itself."""
  if name == "correlation":
    pytest.skip("keeps what its content asks for")
  images = jnp.asarray(data.images, jnp.float32) / 127.5 - 1
  whole = model(images)
  build = reduction_accuracy._SPREAD.get(name)
  once = reduction_accuracy._once
  reductions, attention, mlp = (
    build(16, CONFIG, 1) if build else once(name, 16, CONFIG, 1)
  )
  assert attention == mlp == [17] * 4
  got = jax.jit(lambda x: model(x, reductions=reductions(model, x)))(images)
  if name in ("transforming", "transforming x3", "prumerge", "prumerge+"):
    assert np.isfinite(np.asarray(got)).all()  # they mix even then
  else:
    np.testing.assert_allclose(got, whole, rtol=1e-4, atol=1e-5)


def test_rows_and_the_command(model, data, tmp_path, capsys):
  rows = reduction_accuracy.measure(
    model, data, keep=(8, 4), layer=1, methods=("uniform", "tome")
  )
  assert [row["method"] for row in rows] == ["none"] + ["uniform"] * 2 + [
    "tome"
  ] * 2
  shares = [row["share"] for row in rows]
  assert shares[0] == 1 and shares[1] > shares[2] and shares[3] > shares[4]
  # Two blocks of 17 rows and two of 9: by hand.
  want = reduction_accuracy.forward_flops(
    CONFIG, [17, 17, 9, 9], [17, 17, 9, 9]
  )
  assert rows[1]["gflops"] == pytest.approx(want / 1e9)
  # The same mean number of tokens, within rounding to whole merges.
  assert shares[3] == pytest.approx(shares[1], abs=0.15)
  assert all(0 <= row["accuracy"] <= 1 for row in rows)
  folder = tmp_path / "vit"
  config = dataclasses.replace(CONFIG, image_size=32, patch_size=8)
  vit_weights.save(folder, vit.Vit(config, rngs=nnx.Rngs(0)))
  arrays = {
    f"{split}_{kind}": value
    for split in ("train", "test")
    for kind, value in (
      ("x", np.zeros((4, 32, 32, 3), np.uint8)), ("y", np.zeros(4, np.uint8))
    )
  }  # fmt: skip
  np.savez(tmp_path / "cifar10.npz", **arrays)
  out = tmp_path / "rows.jsonl"
  with pytest.raises(ValueError, match="image_size=16, image_height=32"):
    reduction_accuracy.measure(
      model, cifar10.load(tmp_path)[0], keep=(4,), layer=1
    )
  with pytest.raises(ValueError, match="num_keep must lie in 1..16, got 99"):
    reduction_accuracy.main(
      [
        str(folder),
        str(tmp_path / "cifar10.npz"),
        "--keep",
        "99",
        "--methods",
        "uniform",
      ]
    )
  reduction_accuracy.main(
    [
      *(str(folder), str(tmp_path / "cifar10.npz"), "--keep", "4"),
      *("--methods", "tome", "--images", "2", "--out", str(out)),
    ]
  )
  lines = [json.loads(line) for line in out.read_text().splitlines()]
  assert [line["method"] for line in lines] == ["none", "tome"]
  assert "tome" in capsys.readouterr().out


def test_attention_of_the_class_token():
  logits = jnp.log(jnp.array([1.0, 1, 2]))[None, None, :, None]
  attention = reduction_methods.Attention(jnp.ones_like(logits), logits)
  np.testing.assert_allclose(
    reduction_methods.class_attention(attention), [[0.25, 0.5]], rtol=1e-6
  )

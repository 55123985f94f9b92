"""LPIPS against the published code, whose results are stored."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.eval import lpips
from tokjax.models import weights

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
BACKBONES = ("vgg16", "alexnet")
distances = jax.jit(lpips.lpips)


@pytest.fixture(scope="module")
def golden():
  with np.load(GOLDEN / "lpips.npz") as file:
    return dict(file)


def tensors(golden, backbone):
  start = f"{backbone}/"
  found = {k.removeprefix(start): x for k, x in golden.items() if start in k}
  del found["distance"]
  return found


def test_stored_images_are_those_of_the_script(golden):
  spec = importlib.util.spec_from_file_location("m", GOLDEN / "make_lpips.py")
  maker = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(maker)
  for name, x in zip(
    ("images", "reconstructions"), maker.example(), strict=True
  ):
    np.testing.assert_array_equal(golden[name], x)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_equals_the_published_code(golden, backbone, tmp_path):
  found = tensors(golden, backbone)
  heads = {k: x for k, x in found.items() if k.startswith("lin")}
  rest = {k: x for k, x in found.items() if k not in heads}
  rest["classifier.0.weight"] = np.zeros((2, 2), np.float32)  # not used
  weights.write_tensors(tmp_path / "heads.safetensors", heads)
  weights.write_tensors(tmp_path / "backbone.safetensors", rest)
  paths = tmp_path / "backbone.safetensors", tmp_path / "heads.safetensors"
  read = lpips.read_weights(*paths, backbone=backbone)
  got = distances(read, golden["images"], golden["reconstructions"])
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, golden[f"{backbone}/distance"], rtol=1e-5)


def test_equal_images_and_gradients(golden):
  found = lpips.from_tensors(tensors(golden, "alexnet"), backbone="alexnet")
  images = golden["images"]
  assert (np.asarray(distances(found, images, images)) == 0).all()

  def total(found, images, others):
    return lpips.lpips(found, images, others).sum()

  of_weights, of_image = jax.jit(jax.grad(total, (0, 2)))(
    found, images, golden["reconstructions"]
  )
  for gradient in (*jax.tree.leaves(of_weights), of_image):
    assert np.isfinite(gradient).all()
  for gradient in (of_weights.kernels[0], of_weights.heads[0], of_image):
    assert np.abs(gradient).max() > 0
  # Where no channel answers, the features have no length to divide by.
  dead = found.biases[:-1] + (jnp.full_like(found.biases[-1], -1e3),)
  silent = lpips.LpipsWeights(found.kernels, dead, found.heads, "alexnet")
  gradient = jax.jit(jax.grad(total, 2))(
    silent, images, golden["reconstructions"]
  )
  assert np.isfinite(gradient).all()


@pytest.mark.unchecked
def test_what_does_not_fit_is_listed(golden):
  found = tensors(golden, "vgg16")
  del found["features.28.bias"]
  found["features.2.weight"] = found["features.2.weight"][:, :2]
  found["lin0.model.1.weight"] = -found["lin0.model.1.weight"]
  found["lin5.model.1.weight"] = found["lin4.model.1.weight"]
  with pytest.raises(ValueError) as error:
    lpips.from_tensors(found)
  text = str(error.value)
  assert "not LPIPS with vgg16" in text
  assert "missing tensor features.28.bias" in text
  assert "features.2.weight must be ['any', 4, 3, 3], got [4, 2, 3, 3]" in text
  assert "lin0.model.1.weight must not be negative" in text
  assert "unknown tensor lin5.model.1.weight" in text


@pytest.mark.unchecked
def test_errors(golden, tmp_path):
  found = lpips.from_tensors(tensors(golden, "alexnet"), backbone="alexnet")
  with pytest.raises(ValueError, match="image_side must lie in 31"):
    distances(found, *[np.zeros((1, 32, 30, 3), np.float32)] * 2)
  with pytest.raises(ValueError, match="image_channels must lie in 3..3"):
    distances(found, *[np.zeros((1, 32, 32, 1), np.float32)] * 2)
  with pytest.raises(ValueError, match="backbone must be one of 'vgg16'"):
    lpips.from_tensors({}, backbone="squeeze")
  with pytest.raises(FileNotFoundError, match="no weights of LPIPS at"):
    lpips.read_weights(tmp_path / "a.safetensors")

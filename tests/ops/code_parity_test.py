"""Quantisers beside vector-quantize-pytorch, from stored arrays and live."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import run
from tokjax.ops import (
  binary_codes,
  code_entropy,
  estimators,
  scalar_codes,
  similarity,
)

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def maker():
  path = GOLDEN / "make_codes.py"
  spec = importlib.util.spec_from_file_location("make_codes", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope="module")
def golden():
  with np.load(GOLDEN / "codes.npz") as arrays:
    return dict(arrays)


def test_stored_arrays_are_what_is_computed_now(maker, golden):
  pytest.importorskip("torch")
  pytest.importorskip("vector_quantize_pytorch")
  arrays = maker.inputs()
  now = {**arrays, **maker.outputs(arrays)}
  assert now.keys() == golden.keys()
  for name, value in now.items():
    np.testing.assert_allclose(golden[name], value, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("variant", ["shifted", "symmetric"])
def test_fsq(maker, golden, variant):
  def total(z):
    coded = scalar_codes.fsq_quantize(z, maker.LEVELS, variant=variant)
    return jnp.sum(coded.codes), coded

  gradient, coded = run(jax.grad(total, has_aux=True), golden["z"])
  want = golden[f"{variant}_codes"]
  np.testing.assert_allclose(coded.codes, want, atol=1e-6)
  np.testing.assert_array_equal(coded.index, golden[f"{variant}_index"])
  want = golden[f"{variant}_gradient"]
  np.testing.assert_allclose(gradient, want, atol=1e-6)


def test_residual_fsq(maker, golden):
  coded = run(
    scalar_codes.residual_fsq_quantize,
    golden["z"],
    maker.LEVELS,
    num_stages=maker.NUM_STAGES,
  )
  np.testing.assert_allclose(coded.codes, golden["residual_codes"], atol=1e-6)
  np.testing.assert_array_equal(coded.index, golden["residual_index"])


@pytest.mark.parametrize("name", ["lfq", "bsq"])
def test_signs_and_their_losses(maker, golden, name):
  group_size = maker.NUM_BITS  # one group: the exact entropy of the codebook

  def everything(x):
    if name == "lfq":
      coded = binary_codes.lfq_quantize(x)
      scale = 1.0
    else:
      coded = binary_codes.bsq_quantize(x)
      x, scale = similarity.safe_normalize(x), 1 / np.sqrt(maker.NUM_BITS)
    terms = code_entropy.bit_entropy_penalty(
      4 * scale * maker.INVERSE_TEMPERATURE * x, group_size=group_size
    )
    commitment = jnp.mean(jnp.square(x - jax.lax.stop_gradient(coded.codes)))
    return coded, jnp.stack([terms.per_sample, terms.codebook, commitment])

  coded, losses = run(everything, golden["x"])
  np.testing.assert_allclose(coded.codes, golden[f"{name}_codes"], atol=1e-6)
  np.testing.assert_array_equal(coded.index, golden[f"{name}_index"])
  # It takes log(max(p, 1e-5)) for log(p), off by up to 1e-5 / e per code.
  np.testing.assert_allclose(losses, golden[f"{name}_losses"], atol=1e-4)


def test_rotation_trick(golden):
  def both(x, q, g):
    value, pull = jax.vjp(lambda x: estimators.rotate_to(x, q), x)
    return value, pull(g)[0]

  names = "x", "q", "cotangent"
  value, gradient = run(both, *(golden[name] for name in names))
  # Its forward value is q up to rounding, ours is q.
  np.testing.assert_allclose(value, golden["rotated"], atol=2e-6)
  want = golden["rotated_gradient"]
  np.testing.assert_allclose(gradient, want, rtol=1e-5, atol=2e-6)

"""The Hopper kernel of greedy selection, in the Mosaic GPU interpreter.

The tests marked `gpu` run the same cases on the device.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels import greedy_oracle
from tokjax.kernels.greedy_select import block_sizes, pallas_gpu, reference
from tokjax.kernels.greedy_select.shapes import SHAPES

OBJECTIVES = ("max_min", "max_sum", "mmr")


def check(objective, batch, num_tokens, num_keep, dtype, interpret=False):
  table, mask, bonus, first = greedy_oracle.cases(
    0, batch, num_tokens, objective, grid=True
  )
  opening = np.where(np.arange(num_tokens) == first[:, None], 1.0, bonus / 2)
  opening = np.where(mask, opening, -np.inf)
  if objective != "mmr":
    bonus = np.zeros_like(bonus)
  arrays = (
    jnp.asarray(table, dtype),
    jnp.asarray(opening, jnp.float32),
    jnp.asarray(bonus, jnp.float32),
  )
  settings = dict(num_keep=num_keep, objective=objective, weight=0.5)
  index, gain = pallas_gpu.select(*arrays, interpret=interpret, **settings)
  want_index, want_gain = reference.select(*arrays, **settings)
  found = np.isfinite(want_gain)
  assert index.dtype == jnp.int32 and gain.dtype == jnp.float32
  np.testing.assert_array_equal(gain, want_gain)
  np.testing.assert_array_equal(
    np.where(found, index, 0), np.where(found, want_index, 0)
  )


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_equals_the_reference(objective, interpreter):
  check(objective, 5, 40, 7, jnp.float32, interpreter)


def test_several_chunks(interpreter, monkeypatch):
  monkeypatch.setattr(block_sizes, "_GPU_CHUNK", 256)
  check("max_min", 4, 600, 7, jnp.float32, interpreter)


def test_bfloat16(interpreter):
  check("mmr", 4, 256, 5, jnp.bfloat16, interpreter)


def test_unsupported_names_the_reason():
  def reason(tokens=8, dtype="float32", objective="max_min"):
    table = jax.ShapeDtypeStruct((2, tokens, tokens), dtype)
    return pallas_gpu.unsupported(table, objective, 4)

  for shape in SHAPES.values():
    assert reason(shape.num_tokens, shape.dtype) is None
  assert "whole table" in reason(objective="coverage")
  assert "whole factor" in reason(objective="dpp")
  assert "float16" in reason(dtype="float16")
  assert "more than 24576" in reason(tokens=30_000)
  assert "empty" in reason(tokens=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens", [40, 576, 2880])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_device_equals_the_reference(objective, num_tokens, dtype):
  check(objective, 5, num_tokens, 9, dtype)

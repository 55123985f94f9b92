"""The Hopper kernel of the gated MLP in the Mosaic GPU interpreter.

The tests marked `gpu` run the same cases on the device.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from tests.kernels.gated_mlp_test import case, loop
from tokjax.kernels import hopper
from tokjax.kernels.gated_mlp import api, pallas_gpu, reference
from tokjax.kernels.gated_mlp.shapes import SHAPES

# Tokens, units, share of active gates, width, blocks.
CASES = {
  # Four parts, each of which fills its slots again.
  "one token": (1, 40, 0.6, 256, 2),
  "two tokens": (2, 11, 0.9, 1024, 1),
  # Padded to four, of which two warpgroups have two each.
  "three tokens": (3, 5, 0.2, 128, 3),
  # All warpgroups share each unit.
  "eight tokens": (8, 14, 0.2, 384, 1),
  "none active": (1, 20, 0.0, 256, 2),
}


def arrays(name, dtype):
  """No token needs the last unit."""
  num_tokens, num_units, share, dim, _ = CASES[name]
  x, gate, *weights = case(1, (num_tokens,), dim, num_units, share)
  gate[:, -1] = 0
  return [jnp.asarray(y, dtype) for y in (x, gate, *weights)]


def check(name, dtype, interpret=False):
  given = arrays(name, dtype)
  want = jax.jit(reference.gated_rows_forward)(*given)
  exact = loop(
    *(np.asarray(y, np.float64) for y in given), range(CASES[name][1])
  )
  x, gate, *weights = given
  active = np.any(np.asarray(gate) != 0, axis=0)
  index = np.full(len(active), len(active) - 1, np.int32)
  count = np.sum(active, dtype=np.int32)
  index[:count] = np.flatnonzero(active)
  # Rows that no token needs are not read.
  poisoned = [jnp.where(active[:, None], w, jnp.nan) for w in weights]
  run = functools.partial(
    pallas_gpu.gated_rows_forward,
    num_blocks=CASES[name][-1],
    interpret=interpret,
  )
  got = jax.jit(run)(x, gate, *poisoned, index, count)
  assert got.dtype == want.dtype == dtype
  got, want = (np.asarray(y, np.float64) for y in (got, want))
  scale = np.abs(exact).max()
  # bfloat16: a last bit of the result, where sums are taken in another order.
  near, true = (1e-6, 1e-6) if dtype == jnp.float32 else (2**-8, 0.02)
  if not interpret and dtype == jnp.float32:
    near = 0.01  # XLA on GPU rounds the operands of its products
  np.testing.assert_allclose(got, want, rtol=0, atol=near * scale)
  np.testing.assert_allclose(got, exact, rtol=0, atol=true * scale)
  assert np.any(got) == (CASES[name][2] > 0)


@pytest.fixture
def few_slots(monkeypatch):
  """Rings so short that they are filled several times."""
  monkeypatch.setattr(pallas_gpu, "_MAX_SLOTS", 8)


@pytest.mark.parametrize(
  "name, dtype",
  [
    (name, jnp.bfloat16 if i % 2 else jnp.float32)
    for i, name in enumerate(CASES)
  ],
)
def test_is_the_reference_and_the_loop(name, dtype, interpreter, few_slots):
  check(name, dtype, interpreter)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_case_in_both_types(name, dtype, interpreter, few_slots):
  check(name, dtype, interpreter)


def test_the_public_function_with_capacity_and_gradient(
  interpreter, monkeypatch
):
  settings = dict(num_blocks=1, interpret=interpreter)
  kernel = functools.partial(pallas_gpu.gated_rows_forward, **settings)
  monkeypatch.setattr(pallas_gpu, "gated_rows_forward", kernel)
  given = case(3, (2, 1), 128, 20, 0.6)

  def total(*given, implementation):
    found = api.gated_rows(*given, capacity=5, implementation=implementation)
    return jnp.sum(jnp.sin(found.output / 64)), found

  got, want = (
    jax.jit(
      jax.value_and_grad(
        functools.partial(total, implementation=name), range(4), has_aux=True
      )
    )(*given)
    for name in ("pallas_gpu", "reference")
  )
  assert int(got[0][1].overflow) > 0
  for ours, theirs in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_hopper_gets_the_kernel_where_the_mesh_names_it(monkeypatch):
  """Elsewhere on CUDA all rows are multiplied."""

  def program(num_tokens):
    given = [
      jax.ShapeDtypeStruct(y.shape, jnp.bfloat16)
      for y in case(4, (num_tokens,), 128, 40)
    ]
    jax.clear_caches()
    traced = jax.jit(api.gated_rows).trace(*given)
    return traced.lower(lowering_platforms=("cuda",)).as_text()

  assert "mosaic_gpu" not in program(8)
  monkeypatch.setattr(hopper, "on_hopper", lambda: True)
  assert "mosaic_gpu" in program(8)
  assert "mosaic_gpu" not in program(9)


def bytes_held(program):
  size = 0
  for held in program.scratch().values():
    if isinstance(held, plgpu.Barrier):
      size += 8 * np.prod(held.num_barriers)
    elif held is not None:
      array = held.inner_aval
      size += -(-array.size * array.dtype.itemsize // 1024) * 1024
  return size


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
def test_what_is_taken_fits(dtype):
  """Two slots for each part at least, in what a multiprocessor has."""
  taken = 0
  for num_tokens in (1, 2, 4, 8):
    for dim in range(128, 8192 + 1, 128):
      x = jax.ShapeDtypeStruct((num_tokens, dim), dtype)
      weight = jax.ShapeDtypeStruct((1000, dim), dtype)
      if pallas_gpu.unsupported(x, weight) is None:
        program = pallas_gpu._Program(num_tokens, dim, x.dtype)
        assert program.slots >= 2 * program.parts
        assert program.slots % program.parts == 0
        assert program.groups * program.parts <= 4
        assert bytes_held(program) <= 227 << 10
        taken += 1
  assert taken > 150


@pytest.mark.parametrize("name", SHAPES)
def test_takes_the_real_shapes(name):
  shape = SHAPES[name]
  for num_tokens in (1, 8):
    for dtype in (jnp.float32, jnp.bfloat16):
      weight = jax.ShapeDtypeStruct((shape.num_units, shape.dim), dtype)
      x = jax.ShapeDtypeStruct((num_tokens, shape.dim), dtype)
      assert pallas_gpu.unsupported(x, weight) is None


@pytest.mark.unchecked
@pytest.mark.parametrize(
  "tokens, units, dim, dtype, message",
  [
    (9, 8, 128, jnp.float32, "9 tokens are not 1 to 8"),
    (1, 8, 100, jnp.float32, "width 100 is not a multiple of 128"),
    (1, 8, 16_384, jnp.bfloat16, "width 16384 is not a multiple of 128 up to"),
    (5, 8, 8192, jnp.bfloat16, "5 bfloat16 tokens are too many of width 8192"),
    (3, 8, 8192, jnp.float32, "3 float32 tokens are too many of width 8192"),
    (1, 8, 128, jnp.float16, "dtype float16 is neither"),
  ],
)
def test_what_it_cannot_take_is_said(tokens, units, dim, dtype, message):
  x, gate, weight = (
    jax.ShapeDtypeStruct(shape, dtype)
    for shape in ((tokens, dim), (tokens, units), (units, dim))
  )
  call = functools.partial(api.gated_rows, implementation="pallas_gpu")
  with pytest.raises(NotImplementedError, match=f"pallas_gpu: {message}"):
    jax.eval_shape(call, x, gate, weight, weight)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_device_is_the_reference_and_the_loop(name, dtype):
  check(name, dtype)

"""The TPU kernel of the gated MLP, in interpret mode on CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from tests.kernels.gated_mlp_test import case, loop
from tokjax.kernels.gated_mlp import api, pallas_tpu, reference
from tokjax.kernels.gated_mlp.shapes import SHAPES

forward = jax.jit(
  functools.partial(pallas_tpu.gated_rows_forward, interpret=True),
  static_argnames="rows",
)

# Tokens, units, share of active gates, rows of a chunk.
CASES = {
  "chunks with an end": (3, 70, 0.2, 16),
  "one chunk": (1, 50, 0.5, None),
  "all active": (8, 64, 1.0, 16),
  "none active": (2, 40, 0.0, 16),
  "fewer units than rows": (1, 6, 0.6, None),
}


def arrays(name, dtype, dim=256):
  num_tokens, num_units, share, rows = CASES[name]
  given = case(1, (num_tokens,), dim, num_units, share)
  return [jnp.asarray(y, dtype) for y in given], rows


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_is_the_reference_and_the_loop(name, dtype):
  given, rows = arrays(name, dtype)
  got = forward(*given, rows=rows)
  want = jax.jit(reference.gated_rows_forward)(*given)
  assert got.dtype == want.dtype == dtype
  got, want = (np.asarray(y, np.float64) for y in (got, want))
  exact = loop(
    *(np.asarray(y, np.float64) for y in given), range(CASES[name][1])
  )
  scale = np.abs(exact).max()
  # bfloat16: a last bit of the result, where sums are taken in another order.
  near, true = (1e-6, 1e-6) if dtype == jnp.float32 else (2**-8, 0.02)
  np.testing.assert_allclose(got, want, rtol=0, atol=near * scale)
  np.testing.assert_allclose(got, exact, rtol=0, atol=true * scale)
  if CASES[name][2] == 0:
    assert not np.any(got)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
def test_groups_that_no_token_needs_are_not_read(dtype):
  given, rows = arrays("chunks with an end", dtype)
  want = forward(*given, rows=rows)
  x, gate, *weights = (np.array(y) for y in given)
  group = 1 if dtype == jnp.float32 else 2
  needed = np.any(gate != 0, axis=0).reshape(-1, group).any(axis=1)
  idle = ~np.repeat(needed, group)
  assert 3 < idle.sum() < 60
  for weight in weights:
    weight[idle] = np.nan
  got = forward(*map(jnp.asarray, (x, gate, *weights)), rows=rows)
  np.testing.assert_array_equal(got, want)


def test_a_pair_is_read_for_one_unit():
  """Single rows of bfloat16 cannot be fetched: the neighbour shows."""
  given, rows = arrays("chunks with an end", jnp.bfloat16)
  x, gate, w_up, w_down = (np.array(y) for y in given)
  active = np.any(gate != 0, axis=0)
  beside = ~active & active.reshape(-1, 2).any(axis=1).repeat(2)
  assert beside.any()
  want = forward(*given, rows=rows)
  w_up[beside] = np.nan  # selected away, as its gate is zero
  got = forward(*map(jnp.asarray, (x, gate, w_up, w_down)), rows=rows)
  np.testing.assert_array_equal(got, want)
  w_down[beside] = np.nan
  got = forward(*map(jnp.asarray, (x, gate, w_up, w_down)), rows=rows)
  assert np.all(np.isnan(np.asarray(got, np.float32)))


def test_rows_are_waited_for_and_others_do_not_show():
  """Copies happen when they are waited for, memory starts as NaN."""
  given, rows = arrays("chunks with an end", jnp.bfloat16)
  simulated = pltpu.InterpretParams(
    dma_execution_mode="on_wait", uninitialized_memory="nan"
  )
  got = jax.jit(
    functools.partial(
      pallas_tpu.gated_rows_forward, rows=rows, interpret=simulated
    )
  )(*given)
  np.testing.assert_array_equal(got, forward(*given, rows=rows))


@pytest.mark.parametrize("axes", [(0, 0, None, None), 0], ids=str)
def test_vmap_equals_one_by_one(axes):
  given, rows = arrays("one chunk", jnp.bfloat16)
  other = case(5, (1,), 256, 50, 0.1)
  mapped = [
    jnp.stack([y, jnp.asarray(z, y.dtype)]) if i < 2 or axes == 0 else y
    for i, (y, z) in enumerate(zip(given, other, strict=True))
  ]
  got = jax.jit(jax.vmap(forward, axes))(*mapped)
  for i in range(2):
    one = [y[i] if j < 2 or axes == 0 else y for j, y in enumerate(mapped)]
    want = forward(*one, rows=rows)
    np.testing.assert_array_equal(got[i], want)


@pytest.fixture
def interpreted(monkeypatch):
  """The public function's kernel in interpret mode."""
  monkeypatch.setattr(pallas_tpu, "gated_rows_forward", forward)
  jax.clear_caches()
  yield
  jax.clear_caches()


def test_the_public_function_with_capacity_and_gradient(interpreted):
  given = case(3, (2, 2), 128, 40, 0.4)

  def total(*given, implementation):
    found = api.gated_rows(*given, capacity=11, implementation=implementation)
    return jnp.sum(jnp.sin(found.output)), found

  got, want = (
    jax.jit(
      jax.value_and_grad(
        functools.partial(total, implementation=name), range(4), has_aux=True
      )
    )(*given)
    for name in ("pallas_tpu", "reference")
  )
  assert int(got[0][1].overflow) > 0
  for ours, theirs in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3)


def test_tokens_of_each_device():
  """12 tokens are too many for the kernel, 3 of each device are not."""
  mesh = jax.make_mesh(
    (4,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,)
  )
  given = [
    jax.ShapeDtypeStruct(
      y.shape,
      y.dtype,
      sharding=jax.NamedSharding(mesh, jax.P("data" if i < 2 else None)),
    )
    for i, y in enumerate(case(4, (4, 3), 128, 40))
  ]
  call = functools.partial(api.gated_rows, implementation="pallas_tpu")
  with jax.set_mesh(mesh):
    traced = jax.jit(call).trace(*given)
    program = traced.lower(lowering_platforms=("tpu",)).as_text()
  assert "tpu_custom_call" in program
  assert traced.out_info.output.shape == (4, 3, 128)


@pytest.mark.parametrize("name", SHAPES)
def test_takes_the_real_shapes(name):
  shape = SHAPES[name]
  for dtype in (jnp.float32, jnp.bfloat16):
    weight = jax.ShapeDtypeStruct((shape.num_units, shape.dim), dtype)
    x = jax.ShapeDtypeStruct((1, shape.dim), dtype)
    assert pallas_tpu.unsupported(x, weight) is None


@pytest.mark.unchecked
@pytest.mark.parametrize(
  "tokens, units, dim, dtype, message",
  [
    (9, 8, 128, jnp.float32, "9 tokens are not 1 to 8"),
    (1, 7, 128, jnp.bfloat16, "num_units 7 is odd"),
    (1, 8, 100, jnp.float32, "width 100 is not a multiple of 128"),
    (1, 8, 128, jnp.float16, "dtype float16 is neither"),
    (1, 1 << 17, 128, jnp.float32, "num_units 131072 are not 1 to 65536"),
  ],
)
def test_what_it_cannot_take_is_said(tokens, units, dim, dtype, message):
  x, gate, weight = (
    jax.ShapeDtypeStruct(shape, dtype)
    for shape in ((tokens, dim), (tokens, units), (units, dim))
  )
  call = functools.partial(api.gated_rows, implementation="pallas_tpu")
  with pytest.raises(NotImplementedError, match=f"pallas_tpu: {message}"):
    jax.eval_shape(call, x, gate, weight, weight)

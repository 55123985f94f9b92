"""The gated MLP over active rows against a float64 loop, and what it reads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import test_util

from tests.compiled import run
from tokjax.kernels.gated_mlp import api, reference, xla
from tokjax.kernels.gated_mlp.shapes import SHAPES

BOTH = ("reference", "xla")


def case(seed=0, batch=(3,), dim=8, num_units=16, share=0.4):
  """Tokens, a gate with zeros, and the two weights."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(*batch, dim)).astype(np.float32)
  gate = rng.normal(size=(*batch, num_units)).astype(np.float32)
  gate *= rng.random(gate.shape) < share
  w_up, w_down = rng.normal(size=(2, num_units, dim)).astype(np.float32)
  return x, gate, w_up, w_down


def loop(x, gate, w_up, w_down, units):
  """Unit by unit in float64, over those named."""
  x, gate, w_up, w_down = (
    y.astype(np.float64) for y in (x, gate, w_up, w_down)
  )
  out = np.zeros_like(x)
  for token in np.ndindex(x.shape[:-1]):
    for f in units:
      if gate[token][f] != 0:
        out[token] += gate[token][f] * (x[token] @ w_up[f]) * w_down[f]
  return out


@pytest.mark.parametrize("batch", [(), (1,), (2, 3)], ids=str)
@pytest.mark.parametrize("implementation", BOTH)
def test_equals_a_loop_over_units(implementation, batch):
  given = case(1, batch, share=0.15)
  got = run(api.gated_rows, *given, implementation=implementation)
  tokens = given[1].reshape(-1, 16)
  np.testing.assert_allclose(
    got.output, loop(*given, range(16)), rtol=1e-5, atol=1e-5
  )
  assert int(got.active) == np.any(tokens != 0, axis=0).sum() < 16
  assert int(got.overflow) == 0


@pytest.mark.parametrize("block_size", [1, 4, 7, 16])
def test_blocks_of_any_size(block_size):
  x, gate, w_up, w_down = case(2, share=0.2)
  index = np.flatnonzero(np.any(gate != 0, axis=0)).astype(np.int32)
  assert 4 < len(index) <= 12
  padded = np.append(index, np.full(16 - len(index), 15, np.int32))
  got = run(
    xla.gated_rows_forward, x, gate, w_up, w_down, padded,
    jnp.asarray(len(index), jnp.int32), block_size=block_size,
  )  # fmt: skip
  want = loop(x, gate, w_up, w_down, index)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_rows_that_no_token_needs_are_not_read():
  x, gate, w_up, w_down = case(3, num_units=70)
  gate[:, 69] = 0  # what rows past the end would fall back on
  idle = ~np.any(gate != 0, axis=0)
  assert idle.sum() > 5
  w_up[idle] = w_down[idle] = np.nan
  got = run(api.gated_rows, x, gate, w_up, w_down, implementation="xla")
  want = loop(x, gate, w_up, w_down, np.flatnonzero(~idle))
  np.testing.assert_allclose(got.output, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("capacity", [1, 5])
def test_overflow_drops_the_smallest_gates_and_is_counted(
  capacity, implementation
):
  given = case(4)
  strength = np.abs(given[1]).max(axis=0)
  active = np.count_nonzero(strength)
  assert active > capacity
  units = np.argsort(-strength)[:capacity]
  got = run(
    api.gated_rows, *given, capacity=capacity, implementation=implementation
  )
  assert (int(got.active), int(got.overflow)) == (active, active - capacity)
  np.testing.assert_allclose(
    got.output, loop(*given, units), rtol=1e-5, atol=1e-5
  )


def test_enough_capacity_changes_nothing():
  given = case(5, (1,))
  want = run(api.gated_rows, *given, implementation="xla")
  active = int(want.active)
  got = run(api.gated_rows, *given, capacity=active, implementation="xla")
  np.testing.assert_allclose(got.output, want.output, rtol=1e-6, atol=1e-6)
  assert int(got.overflow) == 0


@pytest.mark.parametrize("implementation", BOTH)
def test_a_gate_of_zeros_gives_zeros_and_no_gradient(implementation):
  x, gate, w_up, w_down = case(6)

  def total(*given):
    found = api.gated_rows(*given, implementation=implementation)
    return jnp.sum(found.output + 1), found

  gradients, found = jax.jit(jax.grad(total, range(4), has_aux=True))(
    x, 0 * gate, w_up, w_down
  )
  assert not np.any(found.output) and int(found.active) == 0
  for gradient in gradients:
    assert not np.any(gradient)


@pytest.mark.parametrize("capacity", [None, 5])
@pytest.mark.parametrize("implementation", BOTH)
def test_gradients_reach_what_is_kept_alone(implementation, capacity):
  given = case(7)
  strength = np.abs(given[1]).max(axis=0)
  units = np.argsort(-strength)[: capacity or np.count_nonzero(strength)]
  kept = np.zeros(16, bool)
  kept[units] = True

  def total(*given):
    found = api.gated_rows(
      *given, capacity=capacity, implementation=implementation
    )
    return jnp.sum(jnp.sin(found.output))

  def dense(x, gate, w_up, w_down):
    gate = jnp.where(kept[None], gate, 0)
    hidden = gate * jnp.matmul(x, w_up.T)
    return jnp.sum(jnp.sin(jnp.matmul(hidden, w_down)))

  got = jax.jit(jax.grad(total, range(4)))(*given)
  want = list(jax.jit(jax.grad(dense, range(4)))(*given))
  assert np.any((given[1] == 0) & (np.abs(want[1]) > 0))
  want[1] = np.where(given[1] != 0, want[1], 0)  # dropped: exactly none
  assert not np.any(np.asarray(got[1])[(given[1] == 0) | ~kept[None]])
  for ours, theirs in zip(got, want, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_gradient_equals_finite_differences():
  given = case(8, dim=3, num_units=5, share=0.7)
  kept = given[1] != 0

  @jax.jit
  def output(x, gate, w_up, w_down):
    gate = jnp.where(kept, gate, 0)  # also after a step of the differences
    return api.gated_rows(x, gate, w_up, w_down, implementation="xla").output

  test_util.check_grads(output, given, 1, modes=["rev"], atol=0.02, rtol=0.02)


def test_bfloat16_rounds_where_the_reference_rounds():
  low = [jnp.asarray(y, jnp.bfloat16) for y in case(9, dim=16)]
  got = run(api.gated_rows, *low, implementation="xla").output
  want = run(reference.gated_rows_forward, *low)
  assert got.dtype == want.dtype == jnp.bfloat16
  exact = loop(*(np.asarray(y, np.float32) for y in low), range(16))
  scale = np.abs(exact).max()
  np.testing.assert_allclose(
    got.astype(np.float32), want.astype(np.float32), atol=2**-8 * scale
  )
  np.testing.assert_allclose(got.astype(np.float32), exact, atol=0.02 * scale)


def test_few_tokens_take_the_rows_many_the_dense_product():
  shape = SHAPES["llama_7b"]

  def program(num_tokens, platform="cpu"):
    weight = jax.ShapeDtypeStruct((shape.num_units, shape.dim), jnp.float32)
    x, gate = (
      jax.ShapeDtypeStruct((num_tokens, size), jnp.float32)
      for size in (shape.dim, shape.num_units)
    )
    traced = jax.jit(api.gated_rows).trace(x, gate, weight, weight)
    return traced.lower(lowering_platforms=(platform,)).as_text()

  assert "while" in program(8) and "while" not in program(9)
  assert "while" not in program(8, "cuda")
  assert "gated_rows" in program(8, "tpu")
  assert "tpu_custom_call" not in program(9, "tpu")


def test_no_copy_of_a_weight_is_held():
  shape = SHAPES["mistral_7b"]
  weight = jax.ShapeDtypeStruct((shape.num_units, shape.dim), jnp.float32)
  x = jax.ShapeDtypeStruct((1, shape.dim), jnp.float32)
  gate = jax.ShapeDtypeStruct((1, shape.num_units), jnp.float32)
  call = functools.partial(api.gated_rows, capacity=shape.num_units // 2)
  held = jax.jit(call).lower(x, gate, weight, weight).compile()
  held = held.memory_analysis().temp_size_in_bytes
  # Two blocks, one of them turned, and vectors; one weight has 235 MB.
  assert held < 8 << 20
  assert 4 * shape.num_weights > 200e6


@pytest.mark.unchecked
@pytest.mark.parametrize(
  "change, message",
  [
    (dict(gate=(2, 5)), "gate_units=5, w_up_units=6, w_down_units=6"),
    (dict(gate=(3, 6)), r"gate must be of the tokens \(2,\), got \(3,\)"),
    (dict(gate=(6,)), "gate must have 2 axes"),
    (dict(x=(2, 3)), "x_dim=3, w_up_dim=4, w_down_dim=4"),
    (dict(w_down=(4, 6)), "x_dim=4, w_up_dim=4, w_down_dim=6"),
    (dict(w_up=(6, 4, 1)), "w_up must have 2 axes"),
    (dict(capacity=0), "capacity must lie in 1..6, got 0"),
    (dict(capacity=7), "capacity must lie in 1..6, got 7"),
    (dict(implementation="rows"), "implementation must be one of None"),
  ],
)
def test_errors_name_the_argument(change, message):
  given = dict(x=(2, 4), gate=(2, 6), w_up=(6, 4), w_down=(6, 4)) | change
  given = {
    name: jax.ShapeDtypeStruct(value, jnp.float32)
    if isinstance(value, tuple)
    else value
    for name, value in given.items()
  }
  arrays = [given.pop(name) for name in ("x", "gate", "w_up", "w_down")]
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(functools.partial(api.gated_rows, **given), *arrays)


@pytest.mark.unchecked
def test_dtypes_must_agree():
  x, *rest = map(jnp.asarray, case())
  with pytest.raises(ValueError, match=r"one dtype, got \['bfloat16', 'flo"):
    api.gated_rows(x.astype(jnp.bfloat16), *rest)


def test_a_sharded_weight_is_named():
  given = case(10)
  mesh = jax.make_mesh(
    (2,), ("model",), axis_types=(jax.sharding.AxisType.Explicit,)
  )
  with jax.set_mesh(mesh):
    x, gate, w_up, w_down = jax.device_put(given, jax.P())
    w_up = jax.device_put(w_up, jax.P("model"))
    with pytest.raises(ValueError, match="w_up must be whole, got .*model"):
      jax.eval_shape(api.gated_rows, x, gate, w_up, w_down)


def test_devices_with_units_of_their_own_add_up():
  given = case(11, (2,))
  mesh = jax.make_mesh(
    (4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,)
  )

  def local(x, gate, w_up, w_down):
    found = api.gated_rows(x, gate, w_up, w_down)
    return jax.lax.psum((found.output, found.active), "model")

  units = jax.P("model")
  sharded = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(jax.P(), jax.P(None, "model"), units, units),
    out_specs=jax.P(),
  )
  output, active = jax.jit(sharded)(*given)
  np.testing.assert_allclose(
    output, loop(*given, range(16)), rtol=1e-5, atol=1e-5
  )
  assert int(active) == np.any(given[1] != 0, axis=0).sum()

  def total(*given):
    return jnp.sum(jnp.sin(sharded(*given)[0]))

  def alone(*given):
    return jnp.sum(jnp.sin(api.gated_rows(*given).output))

  got = jax.jit(jax.grad(total, range(4)))(*given)
  want = jax.jit(jax.grad(alone, range(4)))(*given)
  for ours, theirs in zip(got, want, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)

"""Queries that travel against attention over the whole sequence."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from tests.parallel import dense_attention
from tests.parallel.dense_attention import ring_mesh
from tokjax.parallel.token_ring import token_ring

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


@functools.cache
def oracle(causal, key_heads=1, segments=True):
  inputs = dense_attention.example(key_heads=key_heads, segments=segments)
  return inputs, dense_attention.dense(inputs, causal=causal)


def assert_close(got, want, tolerance=1e-5):
  for g, w in zip(got, want, strict=True):
    np.testing.assert_allclose(g, w, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
  ("size", "kind", "causal", "key_heads"),
  [
    (1, AUTO, True, 2),
    (2, EXPLICIT, True, 1),
    (3, AUTO, True, 2),
    (4, EXPLICIT, False, 1),
    (8, AUTO, True, 1),
  ],
)
def test_equals_attention_over_the_whole(size, kind, causal, key_heads):
  inputs, want = oracle(causal, key_heads)
  got = dense_attention.on_devices(
    token_ring, inputs, ring_mesh(kind, seq=size), causal=causal
  )
  assert_close(got, want)


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=str)
def test_beside_other_axes_of_a_mesh(kind):
  """Examples and heads are cut too; shared keys are whole on each device."""
  inputs, want = oracle(True, segments=False)
  got = dense_attention.on_devices(
    token_ring,
    inputs,
    ring_mesh(kind, data=2, tensor=2, seq=2),
    batch="data",
    heads="tensor",
    causal=True,
    query_chunk=5,
  )
  assert_close(got, want)


def test_padding_is_not_read_whatever_it_holds():
  inputs, want = oracle(True)
  poisoned = dense_attention.example(poison=True)
  got = dense_attention.on_devices(
    token_ring, poisoned, ring_mesh(seq=3), causal=True
  )
  assert_close(got, want)
  for x in got:
    np.testing.assert_array_equal(x[0, :, -5:], 0)


@pytest.mark.parametrize("returns", [None, jnp.float32], ids=str)
def test_bfloat16_is_as_good_as_attention_in_bfloat16(returns):
  inputs = dense_attention.example(segments=False)
  rounded = [np.asarray(x, jnp.bfloat16) for x in inputs[:4]]
  low = dense_attention.Inputs(*rounded, None)
  want = dense_attention.dense(low, causal=True)
  got = dense_attention.on_devices(
    token_ring, low, ring_mesh(seq=2), causal=True, returns=returns
  )
  allowed = dense_attention.dense_as_given(low)
  for g, r, w in zip(got, allowed, want, strict=True):
    assert g.dtype == jnp.bfloat16
    error, limit = (np.abs(np.asarray(x, float) - w).max() for x in (g, r))
    assert error <= 2 * limit


def test_turns_and_returns_of_a_pass():
  """P - 1 = 3 of each and nothing more, to the right homes."""
  rows, scalars = 2 * 2 * 12 * 4 * 4, 2 * 2 * 12 * 4  # bytes
  forward, backward = map(
    collections.Counter, dense_attention.sent(token_ring, ring_mesh(seq=4))
  )
  homes = (1, 2, 3)
  want = collections.Counter((step, rows) for step in homes)  # results
  want.update((step, scalars) for step in homes)  # lse
  want.update({(3, rows): 3})  # queries, to the device before
  assert forward == want
  want = collections.Counter((step, rows) for step in homes)  # gradients
  # Queries and cotangents, lse and delta.
  want.update({(3, rows): 2 * 3, (3, scalars): 2 * 3})
  assert backward == want


def test_every_device_computes_two_full_blocks_a_step():
  inputs = dense_attention.example(segments=False)
  run = dense_attention.program(
    token_ring, ring_mesh(seq=4), with_ids=False, causal=True
  )
  jaxpr = jax.make_jaxpr(run.both)(*run.shard(inputs)).jaxpr
  equations = list(_equations(jaxpr))
  assert not {"cond", "while", "scan"} & {e.primitive.name for e in equations}
  products = sum(
    _flops(e) for e in equations if e.primitive.name == "dot_general"
  )
  width, value_width, chunk = 4, 6, 6
  # 2 products forward, 5 backward, for 2 examples of 2 heads.
  forward, backward = width + value_width, 3 * width + 2 * value_width
  block = 2 * 2 * 2 * chunk**2 * (forward + backward)
  delta = 2 * 2 * 2 * (2 * chunk) * value_width
  num_blocks = 3 + 2 * 3  # two triangles and a full one at home
  assert products == num_blocks * block + delta


def _equations(jaxpr):
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      inner = getattr(value, "jaxpr", value)  # open or closed
      if hasattr(inner, "eqns"):
        yield from _equations(inner)


def _flops(equation):
  (contracted, _), _ = equation.params["dimension_numbers"]
  left = equation.invars[0].aval.shape
  out = equation.outvars[0].aval.size
  return 2 * out * int(np.prod([left[axis] for axis in contracted]))


@pytest.mark.unchecked
def test_errors_name_the_argument():
  def trace(heads, rows, **settings):
    ring = functools.partial(
      token_ring, axis_name="seq", causal=True, **settings
    )
    queries = jnp.zeros((1, 1, heads, rows, 4))
    keys = jnp.zeros((1, 1, 2, rows, 4))
    jax.eval_shape(jax.vmap(ring, axis_name="seq"), queries, keys, keys)

  with pytest.raises(ValueError, match="rows_of_queries must be a multiple"):
    trace(2, 5)
  with pytest.raises(ValueError, match="heads_of_queries must be a multiple"):
    trace(3, 4)
  with pytest.raises(ValueError, match="query_chunk must lie in 1..inf"):
    trace(2, 4, query_chunk=0)

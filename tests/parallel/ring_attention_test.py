"""Keys in a ring against attention over the whole sequence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from tests.parallel import dense_attention
from tests.parallel.dense_attention import ring_mesh
from tokjax.parallel import ring_attention as module
from tokjax.parallel.ring_attention import ring_attention

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


@functools.cache
def oracle(causal, segments=True):
  inputs = dense_attention.example(segments=segments)
  return inputs, dense_attention.dense(inputs, causal=causal)


def assert_close(got, want, tolerance=1e-5):
  for g, w in zip(got, want, strict=True):
    np.testing.assert_allclose(g, w, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
  ("size", "kind", "causal", "layout", "rotate"),
  [
    (1, AUTO, True, "zigzag", "kv"),
    (2, EXPLICIT, True, "contiguous", "both"),
    (3, AUTO, True, "zigzag", "kv"),
    (4, EXPLICIT, True, "zigzag", "both"),
    (4, AUTO, False, "contiguous", "kv"),
    (8, AUTO, True, "zigzag", "kv"),
  ],
)
def test_equals_attention_over_the_whole(size, kind, causal, layout, rotate):
  inputs, want = oracle(causal)
  got = dense_attention.on_devices(
    ring_attention,
    inputs,
    ring_mesh(kind, seq=size),
    in_zigzag=layout == "zigzag",
    causal=causal,
    layout=layout,
    rotate=rotate,
  )
  assert_close(got, want)


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=str)
def test_beside_other_axes_of_a_mesh(kind):
  """Examples and heads are cut too; shared keys are whole on each device."""
  inputs, want = oracle(True, segments=False)
  got = dense_attention.on_devices(
    ring_attention,
    inputs,
    ring_mesh(kind, data=2, tensor=2, seq=2),
    batch="data",
    heads="tensor",
    causal=True,
  )
  assert_close(got, want)


def test_a_long_ring_is_a_loop(monkeypatch):
  monkeypatch.setattr(module, "_LONGEST_UNROLLED", 3)
  inputs, want = oracle(True)
  run = dense_attention.program(
    ring_attention,
    ring_mesh(seq=4),
    with_ids=True,
    causal=True,
    layout="contiguous",
    rotate="both",
    query_chunk=5,
  )
  placed = run.shard(inputs)
  assert "stablehlo.while" in run.both.lower(*placed).as_text()
  assert_close(run.both(*placed), want)


def test_padding_is_not_read_whatever_it_holds():
  inputs, want = oracle(True)
  poisoned = dense_attention.example(poison=True)
  got = dense_attention.on_devices(
    ring_attention, poisoned, ring_mesh(seq=3), causal=True
  )
  assert_close(got, want)
  for x in got:
    np.testing.assert_array_equal(x[0, :, -5:], 0)


def test_bfloat16_is_as_good_as_attention_in_bfloat16():
  inputs = dense_attention.example(segments=False)
  rounded = [np.asarray(x, jnp.bfloat16) for x in inputs[:4]]
  low = dense_attention.Inputs(*rounded, None)
  want = dense_attention.dense(low, causal=True)
  got = dense_attention.on_devices(
    ring_attention, low, ring_mesh(seq=2), causal=True
  )
  allowed = dense_attention.dense_as_given(low)
  for g, r, w in zip(got, allowed, want, strict=True):
    assert g.dtype == jnp.bfloat16
    error, limit = (np.abs(np.asarray(x, float) - w).max() for x in (g, r))
    assert error <= 2 * limit


@pytest.mark.parametrize(("rotate", "hops"), [("kv", [1]), ("both", [1, 3])])
def test_sends_keys_and_values_to_neighbours_only(rotate, hops):
  forward, backward = dense_attention.sent(
    ring_attention, ring_mesh(seq=4), rotate=rotate
  )
  part = 2 * 12 * 4 * 4 // len(hops)
  # 3 hops of keys and values; backward 4 of their gradients as well.
  assert sorted(forward) == [(hop, part) for hop in hops for _ in range(6)]
  assert sorted(backward) == [(hop, part) for hop in hops for _ in range(14)]


@pytest.mark.unchecked
@pytest.mark.parametrize(
  ("settings", "shape", "match"),
  [
    (dict(layout="stripe"), (2, 4), "layout"),
    (dict(rotate="q"), (2, 4), "rotate"),
    (dict(query_chunk=0), (2, 4), "query_chunk must lie in 1..inf, got 0"),
    ({}, (2, 5), "rows_of_queries must be a multiple of 2, got 5"),
    (dict(rotate="both"), (2, 6), "rows_of_queries must be a multiple of 4"),
    ({}, (3, 4), "heads_of_queries must be a multiple of 2, got 3"),
  ],
)
def test_errors_name_the_argument(settings, shape, match):
  heads, rows = shape
  queries = jnp.zeros((1, 1, heads, rows, 4))
  keys = jnp.zeros((1, 1, 2, rows, 4))
  ring = functools.partial(
    ring_attention, axis_name="seq", causal=True, **settings
  )
  with pytest.raises(ValueError, match=match):
    jax.eval_shape(jax.vmap(ring, axis_name="seq"), queries, keys, keys)

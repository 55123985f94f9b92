"""Bi-level routing attention against loops over tokens in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import compiled, run
from tests.sparse.routing_oracle import oracle
from tokjax.ops import attention
from tokjax.sparse import biformer as source

biformer = compiled(source)
SIDES, SIDE = (5, 7), 4  # regions of 2 x 2, the last row of them is empty


def arrays(seed, batch=2, sides=SIDES, heads=2, dim=3):
  random = np.random.default_rng(seed)
  shape = (batch, *sides, heads, dim)
  return [random.normal(size=shape).astype(np.float32) for _ in range(3)]


def some(seed, batch=2, sides=SIDES):
  return np.random.default_rng(seed).random((batch, *sides)) < 0.6


def poisoned(mask, *maps):
  """What the mask hides is NaN."""
  return [np.where(mask[..., None, None], x, np.nan) for x in maps]


@pytest.mark.parametrize(
  ("top_k", "masked", "settings"),
  [
    (1, False, {}),
    (3, True, {}),
    (3, True, {"block_size": 3, "block_queries": 3}),
    (9, True, {"scale": 0.7, "block_size": 16}),
    (4, False, {"num_regions": 6}),  # more than rows
    (3, False, {"soft_routing": True}),
  ],
)
def test_equals_the_oracle(top_k, masked, settings):
  q, k, v = arrays(0)
  mask = some(1) if masked else None
  settings = {"num_regions": SIDE, "top_k": top_k, **settings}
  given = poisoned(mask, q, k, v) if masked else (q, k, v)
  got = biformer.bi_level_routing_attention(*given, mask, **settings)
  want = oracle(
    q,
    k,
    v,
    mask,
    num_regions=settings["num_regions"],
    top_k=top_k,
    scale=settings.get("scale"),
    soft=settings.get("soft_routing", False),
  )
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_windows_read_themselves():
  q, k, v = arrays(2)
  mask = some(3)
  got = biformer.window_attention(
    *poisoned(mask, q, k, v), mask, num_regions=SIDE
  )
  want = oracle(q, k, v, mask, num_regions=SIDE)
  np.testing.assert_allclose(got, want, atol=1e-5)


def quadrants():
  x = np.kron(np.array([[1.0, 0.0], [-1.0, 2.0]]), np.ones((2, 2)))
  return x.astype(np.float32).reshape(1, 4, 4, 1, 1)


@pytest.mark.parametrize(
  ("top_k", "index", "want"),
  [
    (1, [[3], [0], [2], [3]], [2, 1, -1, 2]),
    (2, [[3, 0], [0, 1], [2, 1], [3, 0]], [1.7311, 0.5, -0.7311, 1.8808]),
    (4, None, [1.4927, 0.5, -0.4927, 1.8448]),
  ],
)
def test_worked_example(top_k, index, want):
  x = quadrants()
  got = biformer.bi_level_routing_attention(
    x, x, x, num_regions=2, top_k=top_k
  )[0, :, :, 0, 0]
  want = np.kron(np.reshape(want, (2, 2)), np.ones((2, 2)))
  np.testing.assert_allclose(got, want, atol=1e-4)
  if index is not None:
    regions = biformer.split_regions(x, num_regions=2)
    routes = biformer.region_route(regions, regions, top_k=top_k)
    assert routes.index[0].tolist() == index


def test_all_regions_is_full_attention():
  q, k, v = arrays(4)
  got = biformer.bi_level_routing_attention(
    q, k, v, num_regions=3, top_k=9, scale=3**-0.5
  )
  heads = (x.reshape(2, 35, 2, 3).swapaxes(1, 2) for x in (q, k, v))
  want = run(attention.attend, *heads).swapaxes(1, 2).reshape(q.shape)
  np.testing.assert_allclose(got, want, atol=1e-6)


@jax.jit
def gradients(q, k, v, mask, cotangent):
  """Of attention with routes inside, of the same with fixed ones, in blocks."""
  regions = [source.split_regions(x, num_regions=SIDE) for x in (q, k)]
  valid = source.split_regions(mask, num_regions=SIDE)
  routes = source.region_route(*regions, valid, top_k=3)

  def fixed(q, k, v):
    parts = [source.split_regions(x, num_regions=SIDE) for x in (q, k, v)]
    mixed = source.routed_attention(
      *parts, routes.index, valid, weights=routes.weights
    )
    return source.join_regions(mixed, size=SIDES, num_regions=SIDE)

  whole = functools.partial(
    source.bi_level_routing_attention,
    mask=mask,
    num_regions=SIDE,
    top_k=3,
    soft_routing=True,
    block_size=16,
  )
  blocks = functools.partial(whole, block_size=3, block_queries=3)
  return [jax.vjp(f, q, k, v)[1](cotangent) for f in (whole, fixed, blocks)]


def test_no_gradient_passes_through_routes():
  q, k, v = arrays(5)
  mask, cotangent = some(6), arrays(7)[0]
  given = poisoned(mask, q, k, v)
  whole, fixed, blocks = gradients(*given, mask, cotangent)
  for one, two, three in zip(whole, fixed, blocks, strict=True):
    assert np.abs(one).max() > 0.01
    assert not np.asarray(one)[~mask].any()  # and no NaN
    np.testing.assert_allclose(one, two, atol=1e-6)
    np.testing.assert_allclose(one, three, atol=1e-6)


def test_routes_have_no_gradient_of_their_own():
  x = biformer.split_regions(arrays(8)[0], num_regions=SIDE)

  def total(q, k):
    weights = source.region_route(q, k, top_k=3).weights
    return jnp.sum(jnp.sin(weights))

  for gradient in run(jax.grad(total, (0, 1)), x, x + 1):
    assert not np.asarray(gradient).any()


def test_images_do_not_meet():
  q, k, v = arrays(9)
  settings = {"num_regions": SIDE, "top_k": 3}
  got = biformer.bi_level_routing_attention(q, k, v, **settings)
  again = biformer.bi_level_routing_attention(
    q[::-1].copy(), k[::-1].copy(), v[::-1].copy(), **settings
  )
  np.testing.assert_array_equal(again[::-1], got)


def test_regions_without_tokens_are_taken_last():
  x = arrays(10)[0]
  mask = np.zeros((2, *SIDES), bool)
  mask[0, :2, :2] = mask[0, 4, 6] = True  # regions 0 and 11; none of image 1
  regions = biformer.split_regions(x, num_regions=SIDE)
  valid = biformer.split_regions(mask, num_regions=SIDE)
  routes = biformer.region_route(regions, regions, valid, top_k=3)
  assert set(routes.index[0, 0, :2].tolist()) == {0, 11}
  assert routes.weights[0, 0, 2] == 0
  np.testing.assert_allclose(np.sum(routes.weights[0], axis=-1), 1, rtol=1e-6)
  assert not np.asarray(routes.weights[1]).any()
  got = biformer.bi_level_routing_attention(
    *poisoned(mask, x, x, x), mask, num_regions=SIDE, top_k=3
  )
  assert not np.asarray(got)[~mask].any()
  assert np.isfinite(got).all()


def test_regions_are_cut_row_by_row():
  x = np.arange(30).reshape(1, 5, 6).astype(np.float32)
  parts = biformer.split_regions(x, num_regions=3)
  assert parts[0, 1].tolist() == [2, 3, 8, 9]
  assert parts[0, 8].tolist() == [28, 29, 0, 0]
  again = biformer.join_regions(parts, size=(5, 6), num_regions=3)
  np.testing.assert_array_equal(again, x)


def test_memory_does_not_grow_with_the_regions_read():
  """Of a map of 600 x 500, with its gradient; it is compiled, not run."""
  x = jax.ShapeDtypeStruct((1, 600, 500, 2, 32), jnp.float32)

  def loss(q, k, v, *, top_k):
    mixed = source.bi_level_routing_attention(
      q, k, v, num_regions=7, top_k=top_k, block_size=1, block_queries=64
    )
    return jnp.sum(mixed)

  def held(top_k):
    gradient = jax.jit(
      jax.grad(functools.partial(loss, top_k=top_k), (0, 1, 2))
    )
    program = gradient.lower(x, x, x).compile()
    return program.memory_analysis().temp_size_in_bytes

  copy = 2 * x.size * 4  # bytes of K and V
  assert held(16) < held(1) + copy
  assert held(16) < 8 * copy


@pytest.mark.unchecked
def test_errors_name_the_argument():
  q, k, v = arrays(11)
  attend = biformer.bi_level_routing_attention
  with pytest.raises(ValueError, match=r"q must have 5 axes, got shape"):
    attend(q[0], k, v, num_regions=2, top_k=1)
  with pytest.raises(ValueError, match=r"k must be .* as q is, got"):
    attend(q, k[:, 1:], v, num_regions=2, top_k=1)
  with pytest.raises(ValueError, match=r"mask must be \(2, 5, 7\)"):
    attend(q, k, v, some(0)[:, 1:], num_regions=2, top_k=1)
  with pytest.raises(ValueError, match=r"top_k must lie in 1..4, got 5"):
    attend(q, k, v, num_regions=2, top_k=5)
  with pytest.raises(ValueError, match=r"num_regions must lie in 1..inf"):
    attend(q, k, v, num_regions=0, top_k=1)
  with pytest.raises(ValueError, match="block_size must lie in"):
    attend(q, k, v, num_regions=2, top_k=1, block_size=0)
  with pytest.raises(ValueError, match="block_queries must lie in"):
    attend(q, k, v, num_regions=2, top_k=1, block_queries=0)
  parts = biformer.split_regions(q, num_regions=2)
  index = np.zeros((2, 3, 1), np.int32)
  with pytest.raises(ValueError, match="index_regions=3, regions=4"):
    biformer.routed_attention(parts, parts, parts, index)
  with pytest.raises(ValueError, match="tokens_of_a_region=12"):
    biformer.join_regions(parts, size=(5, 9), num_regions=2)

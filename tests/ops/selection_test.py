import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import AxisType

from tokjax.ops.selection import (
  TopK,
  gather_top_k,
  merge_top_k,
  sharded_top_k,
  streaming_top_k,
  top_k,
)


def sorted_top_k(scores, k, mask=None):
  """Sorts everything: larger first, then lower index."""
  scores = np.asarray(scores, np.float32)
  if mask is not None:
    scores = np.where(mask, scores, -np.inf)
  index = np.argsort(-scores, axis=-1, kind="stable")[..., :k]
  values = np.take_along_axis(scores, index, axis=-1)
  return values, np.where(values == -np.inf, -1, index)


def assert_found(got, want):
  np.testing.assert_array_equal(got.values, want[0])
  np.testing.assert_array_equal(got.index, want[1])


def whole_numbers(seed, *shape):
  """Small integers as floats: exact products, and many ties."""
  random = np.random.default_rng(seed)
  return jnp.asarray(random.integers(-2, 3, shape).astype(np.float32))


def product(queries, corpus):
  return np.asarray(queries) @ np.asarray(corpus).T


def test_streaming_by_hand():
  corpus = jnp.array([[1.0, 0], [0, 2], [3, 0], [0, 2]])
  found = streaming_top_k(corpus[1:2], corpus, 3, block_size=3)
  np.testing.assert_array_equal(found.values, [[4, 4, 0]])
  np.testing.assert_array_equal(found.index, [[1, 3, 0]])


@pytest.mark.parametrize("block_size", [1, 4, 7, 23, 100])
@pytest.mark.parametrize("k", [1, 5, 23])
def test_streaming_equals_sorting(block_size, k):
  queries, corpus = whole_numbers(0, 3, 4), whole_numbers(1, 23, 4)
  got = streaming_top_k(queries, corpus, k, block_size=block_size)
  assert_found(got, sorted_top_k(product(queries, corpus), k))


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**32 - 1), share=st.floats(0, 1))
def test_streaming_with_a_mask_equals_sorting(seed, share):
  queries, corpus = whole_numbers(seed, 2, 3), whole_numbers(seed + 1, 17, 3)
  mask = np.random.default_rng(seed).random(17) < share
  scores = product(queries, corpus)
  corpus = jnp.where(mask[:, None], corpus, jnp.nan)
  got = streaming_top_k(
    queries, corpus, 6, block_size=5, mask=jnp.asarray(mask)
  )
  assert_found(got, sorted_top_k(scores, 6, mask[None, :]))


def test_merge_of_parts_is_the_whole():
  scores = whole_numbers(2, 3, 20)
  a, b = (
    top_k(jnp.asarray(scores[:, :8]), 5),
    top_k(jnp.asarray(scores[:, 8:]), 5),
  )
  b = TopK(b.values, b.index + 8)
  assert_found(merge_top_k(a, b, 5), sorted_top_k(scores, 5))


def test_nan_shows_unless_masked():
  scores = jnp.array([1.0, jnp.nan, 2.0])
  np.testing.assert_array_equal(top_k(scores, 2).index, [1, 2])
  mask = jnp.array([True, False, True])
  np.testing.assert_array_equal(top_k(scores, 3, mask).index, [2, 0, -1])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("k", [2, 6])
def test_sharded_equals_sorting(kind, k):
  scores = whole_numbers(3, 3, 16)  # four per device, fewer than 6
  scores = scores.at[:, 4:].set(
    jnp.where(scores[:, 4:] > 0, scores[:, 4:], -jnp.inf)
  )
  mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
  with jax.set_mesh(mesh):
    shards = jax.device_put(scores, jax.P(None, "data"))
    got = jax.jit(
      jax.shard_map(
        lambda scores: sharded_top_k(scores, k, axis_name="data"),
        in_specs=jax.P(None, "data"),
        out_specs=jax.P(),
      )
    )(shards)
  assert_found(jax.device_get(got), sorted_top_k(scores, k))


def test_streaming_on_shards_equals_sorting():
  queries, corpus = whole_numbers(4, 3, 4), whole_numbers(5, 24, 4)
  mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

  def search(queries, corpus):
    found = streaming_top_k(queries, corpus, 5, block_size=4)
    return gather_top_k(found, 5, shard_size=6, axis_name="data")

  got = jax.shard_map(
    search,
    mesh=mesh,
    in_specs=(jax.P(), jax.P("data")),
    out_specs=jax.P(),
  )(queries, corpus)
  assert_found(got, sorted_top_k(product(queries, corpus), 5))


@pytest.mark.unchecked
def test_errors_name_the_argument():
  queries, corpus = whole_numbers(6, 3, 4), whole_numbers(7, 23, 4)
  with pytest.raises(ValueError, match=r"k must lie in 1\.\.23, got 24"):
    streaming_top_k(queries, corpus, 24)
  with pytest.raises(ValueError, match="corpus=23, mask=22"):
    streaming_top_k(queries, corpus, 3, mask=np.ones(22, bool))
  with pytest.raises(ValueError, match="queries_dim=3, corpus_dim=4"):
    streaming_top_k(queries[:, :3], corpus, 3)
  with pytest.raises(ValueError, match=r"k must lie in 1\.\.4, got 5"):
    merge_top_k(top_k(queries[0], 2), top_k(queries[1], 2), 5)

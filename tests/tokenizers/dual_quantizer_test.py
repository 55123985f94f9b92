"""Two codebooks with one index: numbers, scales, and who gets a gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.compiled import run
from tokjax.kernels.nearest_code import nearest_code
from tokjax.ops import resample
from tokjax.tokenizers.codebook import CodebookConfig
from tokjax.tokenizers.dual_quantizer import (
  DualConfig,
  DualQuantizer,
  DualState,
  joint_nearest,
)

K, DIMS = 7, (4, 2)
SEMANTIC = CodebookConfig(K, DIMS[0], metric="cosine")
PIXEL = CodebookConfig(K, DIMS[1], metric="cosine")
TINY = DualConfig(SEMANTIC, PIXEL, sides=(1, 2, 3, 4), match_weights=(1.0, 0.7))


@functools.cache
def build(config=TINY):
  quantizer = jax.jit(lambda: DualQuantizer(config, rngs=nnx.Rngs(0)))()
  return quantizer, jax.jit(quantizer.init_state)(jax.random.key(1))


def learning(name, **settings):
  """The tiny config with codebooks that learn otherwise."""
  semantic, pixel = (
    dataclasses.replace(book, learning=name, **settings)
    for book in (SEMANTIC, PIXEL)
  )
  return dataclasses.replace(TINY, semantic=semantic, pixel=pixel)


def maps(seed=0, batch=2):
  random = np.random.default_rng(seed)
  return tuple(
    random.normal(size=(batch, 4, 4, dim)).astype(np.float32) for dim in DIMS
  )


def vectors(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.partial(jax.jit, static_argnames="train")
def call(quantizer, x, state, keep=None, key=None, train=False):
  return quantizer(*x, state, keep=keep, key=key, train=train)


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_worked_example():
  parts = np.float32([[1, 0]]), np.float32([[0, 1]])
  tables = (
    np.float32([[1, 0], [0.6, 0.8], [0.8, 0.6]]),
    np.float32([[1, 0], [0, 1], [0.8, 0.6]]),
  )
  for weight, distances, want in (
    (1.0, [2.0, 0.8, 1.2], 1),
    (0.2, [0.4, 0.8, 0.56], 0),
    (0.0, [0.0, 0.8, 0.4], 0),
  ):
    semantic, pixel = (
      ((part - table) ** 2).sum(-1)
      for part, table in zip(parts, tables, strict=True)
    )
    np.testing.assert_allclose(semantic + weight * pixel, distances, atol=1e-6)
    got = run(joint_nearest, parts, tables, (1.0, weight))
    assert got.tolist() == [want]


def test_joint_nearest_is_the_sum_of_two_tables():
  parts = vectors(0, 3, 5, 4), vectors(1, 3, 5, 2)
  tables = vectors(2, K, 4), vectors(3, K, 2)
  mask = np.random.default_rng(4).random((3, 5)) < 0.7
  far = sum(
    weight * ((unit(np.float64(x))[..., None, :] - unit(table)) ** 2).sum(-1)
    for x, table, weight in zip(parts, tables, (1, 0.7), strict=True)
  )
  want = np.where(mask, far.argmin(-1), -1)
  got = run(joint_nearest, parts, tables, (1.0, 0.7), mask)
  np.testing.assert_array_equal(got, want)
  # Each part is normalised by itself: its length has no say.
  longer = parts[0], 10 * parts[1]
  got = run(joint_nearest, longer, tables, (1.0, 0.7), mask)
  np.testing.assert_array_equal(got, want)


def test_limits_are_searches_of_one_table():
  x, y = vectors(0, 20, 4), vectors(1, 20, 4)
  one, two = vectors(2, K, 4), vectors(3, K, 4)
  plain = run(nearest_code, x, one, metric="cosine")
  same = run(joint_nearest, (x, x), (one, one), (1.0, 1.0))
  np.testing.assert_array_equal(same, plain)
  alone = run(joint_nearest, (x, y), (one, two), (1.0, 0.0))
  np.testing.assert_array_equal(alone, plain)


def scales(quantizer, state, x, sides):
  """Units, indices and what each scale adds, by a loop in float64."""
  tables = [np.float64(table) for table in quantizer.tables(state)]
  left = np.concatenate(x, axis=-1).astype(np.float64)
  found = []
  for side in sides:
    down = np.float64(resample.area_matrix(4, side))
    small = np.einsum("ph,qw,bhwc->bpqc", down, down, left)
    parts = unit(small[..., :4]), unit(small[..., 4:])
    far = sum(
      weight * ((part[..., None, :] - table) ** 2).sum(-1)
      for part, table, weight in zip(parts, tables, (1, 0.7), strict=True)
    )
    index = far.argmin(-1)
    q = np.concatenate([table[index] for table in tables], axis=-1)
    up = np.float64(resample.cubic_matrix(side, 4))
    added = np.einsum("ph,qw,bhwc->bpqc", up, up, q)
    found.append((np.concatenate(parts, -1), index, q, added))
    left = left - added
  return found


def test_equals_a_loop():
  (quantizer, state), x = build(), maps()
  found, after = call(quantizer, x, state)
  want = scales(quantizer, state, x, TINY.sides)
  index = np.concatenate([w[1].reshape(2, -1) for w in want], axis=1)
  np.testing.assert_array_equal(found.indices, index)
  assert index.shape == (2, TINY.num_tokens)
  np.testing.assert_allclose(found.codes, sum(w[3] for w in want), atol=1e-5)
  # Means of each scale, then over scales.
  error = np.mean([((u - q) ** 2).mean() for u, _, q, _ in want])
  assert found.losses.keys() == {"commitment", "codebook"}
  assert float(found.losses["commitment"]) == pytest.approx(
    0.25 * error, rel=1e-5
  )
  assert float(found.losses["codebook"]) == pytest.approx(error, rel=1e-5)
  share = np.mean(np.bincount(index.ravel(), minlength=K) > 0)
  assert float(found.stats["usage"]) == pytest.approx(share)
  jax.tree.map(np.testing.assert_array_equal, after, state)


def test_without_a_scale_it_is_the_shorter_list():
  (quantizer, state), x = build(), maps()
  keep = np.array([True, True, False, True])
  found, after = call(quantizer, x, state, keep, train=True)
  short = dataclasses.replace(TINY, sides=(1, 2, 4))
  fewer, _ = build(short)
  want, _ = call(fewer, x, state, np.ones(3, bool), train=True)
  gap = slice(1 + 4, 1 + 4 + 9)
  assert np.all(found.indices[:, gap] == -1)
  np.testing.assert_array_equal(
    np.delete(found.indices, gap, axis=1), want.indices
  )
  np.testing.assert_allclose(found.codes, want.codes, atol=1e-6)
  for name in want.losses:
    assert float(found.losses[name]) == pytest.approx(
      float(want.losses[name]), rel=1e-5
    )
  used = np.bincount(np.asarray(want.indices).ravel(), minlength=K)
  counts = 0.99 + 0.01 * used
  np.testing.assert_allclose(after.semantic.counts, counts, rtol=1e-5)
  np.testing.assert_allclose(after.pixel.counts, counts, rtol=1e-5)


def test_a_step_drops_one_scale_but_never_the_first():
  config = dataclasses.replace(TINY, scale_drop=0.4)
  (quantizer, state), x = build(config), maps()
  keys = jax.random.split(jax.random.key(3), 400)

  @jax.jit
  def drawn(keys):
    one = lambda key: quantizer(*x, state, train=True, key=key)[0].indices  # noqa: E731
    return jax.lax.map(one, keys)

  first = np.cumsum([0, 1, 4, 9])  # a token of each scale
  dropped = np.asarray(drawn(keys))[:, 0, first] < 0
  assert dropped.sum(1).max() == 1 and not dropped[:, 0].any()
  assert dropped.any(1).mean() == pytest.approx(0.4, abs=0.08)
  share = dropped[:, 1:].mean(0)
  np.testing.assert_allclose(share, 0.4 / 3, atol=0.06)


def test_each_scale_passes_its_gradient_and_codes_learn_from_their_loss():
  (quantizer, state), x = build(), maps()
  g = vectors(9, 2, 4, 4, sum(DIMS))
  every = np.ones(4, bool)

  @jax.jit
  def gradients(quantizer, x):
    def value(name, quantizer, x):
      found, _ = quantizer(*x, state, keep=every, train=True)
      return jnp.sum(g * found.codes) if name == "codes" else found.losses[name]

    return {
      name: jax.grad(functools.partial(value, name), (0, 1))(quantizer, x)
      for name in ("codes", "commitment", "codebook")
    }

  got = gradients(quantizer, x)
  added = [w[3] for w in scales(quantizer, state, x, TINY.sides)]

  @jax.jit
  def by_hand(x):
    """Sum over scales of up(unit(down(x - what came before)))."""
    total, before = 0.0, np.zeros_like(added[0])
    for side, more in zip(TINY.sides, added, strict=True):
      down = resample.area_matrix(4, side)
      y = jnp.concatenate(x, axis=-1) - np.float32(before)
      y = jnp.einsum("ph,qw,bhwc->bpqc", down, down, y)
      y = jnp.concatenate([
        p / jnp.linalg.norm(p, axis=-1, keepdims=True)
        for p in (y[..., :4], y[..., 4:])
      ], axis=-1)  # fmt: skip
      up = resample.cubic_matrix(side, 4)
      total = total + jnp.einsum("ph,qw,bhwc->bpqc", up, up, y)
      before = before + more
    return jnp.sum(g * total)

  want = jax.jit(jax.grad(by_hand))(x)
  for one, two in zip(got["codes"][1], want, strict=True):
    np.testing.assert_allclose(one, two, atol=1e-4)
  largest = lambda tree: max(np.abs(x).max() for x in jax.tree.leaves(tree))  # noqa: E731
  assert largest(got["codes"][0]) == 0
  assert largest(got["commitment"][0]) == 0
  assert largest(got["commitment"][1]) > 0
  assert largest(got["codebook"][1]) == 0
  indices = call(quantizer, x, state)[0].indices
  used = np.isin(np.arange(K), indices)
  for book in (got["codebook"][0].semantic, got["codebook"][0].pixel):
    moved = np.abs(np.asarray(book.codes)).sum(-1) > 0
    np.testing.assert_array_equal(moved, used)


def test_codes_come_back_from_indices_and_partial_sums_feed_the_next_scale():
  (quantizer, state), x = build(), maps()
  found, _ = call(quantizer, x, state)
  again = run(quantizer.lookup, found.indices, state)
  np.testing.assert_allclose(again, found.codes, atol=1e-5)
  got = run(quantizer.next_inputs, found.indices, state)
  assert got.shape == (2, 4 + 9 + 16, sum(DIMS))
  added = [w[3] for w in scales(quantizer, state, x, TINY.sides)]
  want = []
  for number, side in enumerate(TINY.sides[1:], 1):
    down = resample.area_matrix(4, side)
    coarse = sum(added[:number])
    small = np.einsum("ph,qw,bhwc->bpqc", down, down, coarse)
    want.append(small.reshape(2, side * side, -1))
  np.testing.assert_allclose(got, np.concatenate(want, axis=1), atol=1e-5)
  # A scale is predicted from those before it: its own indices have no say.
  later = found.indices.at[:, 5:].set(0)
  other = run(quantizer.next_inputs, later, state)
  np.testing.assert_array_equal(other[:, : 4 + 9], got[:, : 4 + 9])


def test_dead_codes_of_both_books_come_back_as_one_pair():
  config = learning("ema", reset="batch", reset_threshold=100.0)
  quantizer, state = build(config)
  x, key = maps(), jax.random.key(4)
  found, after = call(quantizer, x, state, np.ones(4, bool), key, train=True)
  assert found.losses.keys() == {"commitment"}
  units = np.concatenate(
    [w[0].reshape(-1, 6) for w in scales(quantizer, state, x, TINY.sides)]
  )
  pairs = np.concatenate([after.semantic.codes, after.pixel.codes], axis=-1)
  far = ((pairs[:, None] - units[None]) ** 2).sum(-1).min(1)
  np.testing.assert_allclose(far, 0, atol=1e-9)


def test_over_eight_devices_equals_one():
  quantizer, state = build(learning("ema"))
  x, every = maps(0, 8), np.ones(4, bool)
  want = call(quantizer, x, state, every, train=True)
  mesh = jax.make_mesh((8,), ("data",))

  def local(x, state):
    found, state = quantizer(
      *x, state, keep=every, train=True, axis_name="data"
    )
    return found[:2], (found.losses, found.stats, state)

  with jax.set_mesh(mesh):
    shards = jax.device_put(x, jax.P("data"))
    got = jax.jit(
      jax.shard_map(
        local,
        in_specs=(jax.P("data"), jax.P()),
        out_specs=(jax.P("data"), jax.P()),
      )
    )(shards, state)
  want = want[0][:2], (want[0].losses, want[0].stats, want[1])
  same = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  jax.tree.map(same, jax.device_get(got), jax.device_get(want))


@pytest.mark.unchecked
@pytest.mark.parametrize("settings, message", [
  ({"sides": ()}, "sides must be positive and never fall"),
  ({"sides": (2, 1)}, "sides must be positive and never fall"),
  ({"scale_drop": 1.5}, "scale_drop must lie in"),
  ({"match_weights": (-1.0, 1.0)}, "match_weight must lie in"),
  ({"pixel": CodebookConfig(K, 2)}, "pixel_metric must be one of 'cosine'"),
  ({"pixel": CodebookConfig(3, 2, metric="cosine")}, "pixel_codes=3"),
  ({"pixel": dataclasses.replace(PIXEL, learning="ema")},
   "pixel_learning must be one of 'gradient'"),
])  # fmt: skip
def test_settings_that_cannot_be(settings, message):
  with pytest.raises(ValueError, match=message):
    DualQuantizer(dataclasses.replace(TINY, **settings), rngs=nnx.Rngs(0))


@pytest.mark.unchecked
def test_errors():
  (quantizer, state), x = build(), maps()
  with pytest.raises(ValueError, match="key must be given to train"):
    call(quantizer, x, state, train=True)
  with pytest.raises(ValueError, match="tokens=4, num_tokens=30"):
    quantizer.lookup(np.zeros((2, 4), np.int32), state)
  with pytest.raises(ValueError, match="parts=1, tables=2, weights=2"):
    joint_nearest(x[:1], x, (1.0, 1.0))
  assert isinstance(state, DualState)

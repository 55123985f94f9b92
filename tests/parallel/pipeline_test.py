"""Stages on devices of their own against layers one after the other."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parallel.moe_layers import folded_mesh
from tokjax.parallel import pipeline

NUM_LAYERS, NUM_MICRO, ROWS, WIDTH = 4, 4, 2, 6
ONE = dict(tp=1)
TWO = dict(pp=2, dp=2, tp=2)
FOUR = dict(pp=4, dp=2)
EACH = dict(pp=4)  # more stages than a number of micro-batches may have


def arrays(num_micro=NUM_MICRO):
  """Layers, micro-batches, what is held for them, and a cotangent."""
  rng = np.random.default_rng(0)

  def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)

  return (
    normal(NUM_LAYERS, WIDTH, WIDTH) / 2,
    normal(num_micro, ROWS, WIDTH),
    normal(num_micro, ROWS),
    normal(num_micro, ROWS, WIDTH),
  )


def stage(layers, x, held, folded):
  """Rows are divided by their norm, whose gradient at zero is not finite.

  The norms are summed by a `shard_map` of its own, as experts have it.
  """

  def norms(x):
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=-1))
    return norm, jax.lax.psum(jnp.sum(norm), folded.dp)

  norms = jax.shard_map(
    norms,
    mesh=folded.mesh,
    in_specs=jax.P(folded.dp),
    out_specs=(jax.P(folded.dp), jax.P()),
  )

  def layer(x, w):
    norm, total = norms(x)
    x = jnp.tanh((x / norm[:, None]) @ w + held[:, None])
    return x, (total, jnp.int32(x.shape[0]))

  return jax.lax.scan(layer, x, layers)


def program(sizes):
  """Value and gradients of something that all results have a part in."""
  folded = folded_mesh(sizes, {})

  def value(layers, x, held, d_y):
    y, (total, rows) = pipeline.pipeline(stage, layers, x, held, folded=folded)
    weights = jnp.cos(jnp.arange(total.size)).reshape(total.shape)
    return jnp.sum(y * d_y) + jnp.sum(total * weights), (y, total, rows)

  return jax.jit(jax.value_and_grad(value, (0, 1, 2), has_aux=True))


@functools.cache
def found(names, num_micro=NUM_MICRO):
  got = program(dict(names))(*arrays(num_micro))
  return jax.device_get(jax.block_until_ready(got))


def one_after_the_other(num_micro):
  """The same in NumPy, float64."""
  layers, x, held, _ = (a.astype(float) for a in arrays(num_micro))
  totals = np.zeros((num_micro, NUM_LAYERS))
  for i in range(NUM_LAYERS):
    norm = np.sqrt(np.square(x).sum(-1))
    totals[:, i] = norm.sum(-1)
    x = np.tanh(x / norm[..., None] @ layers[i] + held[..., None])
  return x, totals


@pytest.mark.parametrize(
  ("sizes", "num_micro"),
  [(ONE, 4), (TWO, 4), (FOUR, 4), (EACH, 2)],
  ids=["one", "two", "four", "few micro-batches"],
)
def test_equals_layers_one_after_the_other(sizes, num_micro):
  (_, (y, total, rows)), gradients = found(tuple(sizes.items()), num_micro)
  want_y, want_total = one_after_the_other(num_micro)
  np.testing.assert_allclose(y, want_y, atol=1e-5)
  np.testing.assert_allclose(total, want_total, rtol=1e-5)
  # Bubbles count for nothing.
  np.testing.assert_array_equal(rows, np.full((num_micro, NUM_LAYERS), ROWS))
  _, want = found(tuple(ONE.items()), num_micro)
  for got, expected in zip(gradients, want, strict=True):
    np.testing.assert_allclose(got, expected, atol=1e-5)


def pairs_of(line):
  """Senders and receivers of a collective permute in a compiled program."""
  pairs = line.split("source_target_pairs=")[1]
  return {(int(a), int(b)) for a, b in re.findall(r"{(\d+),(\d+)}", pairs)}


def test_one_hand_over_a_tick_in_each_pass():
  layers, x, held, d_y = arrays()
  folded = folded_mesh(FOUR, {})
  cut = jax.sharding.NamedSharding(folded.mesh, jax.P(folded.pp))
  layers = jax.device_put(layers, cut)
  compiled = program(FOUR).lower(layers, x, held, d_y).compile()
  lines = [
    line
    for line in compiled.as_text().splitlines()
    if " collective-permute(" in line or " collective-permute-start(" in line
  ]
  assert len(lines) == 2
  forward, back = lines if "transpose" in lines[1] else lines[::-1]
  # Device 2 p + d is stage p of copy d.
  pairs = {(i, i + 2) for i in range(6)}
  assert pairs_of(forward) == pairs
  assert pairs_of(back) == {(there, here) for here, there in pairs}
  for line in lines:
    assert "while/body" in line  # one of each tick
  assert compiled.output_shardings[1][0].spec == jax.P("pp")  # as layers are


def test_schedule_of_four_micro_batches_and_three_stages():
  assert pipeline.schedule(3, 4) == (
    (0, -1, -1),
    (1, 0, -1),
    (2, 1, 0),
    (3, 2, 1),
    (-1, 3, 2),
    (-1, -1, 3),
  )


@pytest.mark.parametrize(
  ("num_stages", "num_micro"), [(1, 1), (1, 5), (2, 4), (4, 2), (5, 7)]
)
def test_every_micro_batch_is_at_every_stage_once(num_stages, num_micro):
  plan = np.array(pipeline.schedule(num_stages, num_micro))
  ticks = collections.defaultdict(list)
  for tick, stage_index in zip(*np.nonzero(plan >= 0), strict=True):
    ticks[plan[tick, stage_index]].append((tick, stage_index))
  for micro in range(num_micro):  # one stage later at each next tick
    assert ticks[micro] == [(micro + i, i) for i in range(num_stages)]
  assert pipeline.bubble_fraction(num_stages, num_micro) == pytest.approx(
    np.mean(plan < 0)
  )


def test_cutting_a_batch_moves_nothing():
  folded = folded_mesh(dict(dp=4), {})
  rows = jax.sharding.NamedSharding(folded.mesh, jax.P(folded.dp))
  x = jax.device_put(np.arange(16.0).reshape(8, 2), rows)
  cut = jax.jit(lambda x: pipeline.cut_batch(x, 2))
  micro = jax.block_until_ready(cut(x))
  np.testing.assert_array_equal(micro[1], np.asarray(x)[1::2])
  back = jax.jit(pipeline.join_batch)
  np.testing.assert_array_equal(back(micro), x)
  for text in (
    cut.lower(x).compile().as_text(),
    back.lower(micro).compile().as_text(),
  ):
    assert "all-" not in text
    assert "collective-" not in text


def test_errors_name_the_argument():
  layers, x, held, _ = arrays()
  with pytest.raises(ValueError, match="layers must be a multiple of 4, got 3"):
    pipeline.pipeline(stage, layers[:3], x, held, folded=folded_mesh(EACH, {}))
  with pytest.raises(ValueError, match="must agree, got micro=4, held=3"):
    pipeline.pipeline(stage, layers, x, held[:3], folded=folded_mesh(EACH, {}))
  with pytest.raises(ValueError, match="batch must be a multiple of 3, got 8"):
    pipeline.cut_batch(jnp.ones((8, 2)), 3)
  with pytest.raises(ValueError, match="num_micro must lie in 1..inf, got 0"):
    pipeline.cut_batch(jnp.ones((8, 2)), 0)
  with pytest.raises(ValueError, match="num_micro must lie in 1..inf, got 0"):
    pipeline.schedule(2, 0)
  with pytest.raises(ValueError, match="num_stages must lie in 1..inf, got 0"):
    pipeline.bubble_fraction(0, 2)

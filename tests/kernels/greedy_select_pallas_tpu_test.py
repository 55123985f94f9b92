"""The TPU kernel of greedy selection, in interpret mode on CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels import greedy_oracle
from tokjax.kernels.greedy_select import (
  OBJECTIVES,
  block_sizes,
  pallas_tpu,
  reference,
)
from tokjax.kernels.greedy_select.shapes import SHAPES

_STATIC = ("num_keep", "objective", "weight", "interpret")
select = jax.jit(pallas_tpu.select, static_argnames=_STATIC)


def operands(seed, batch, num_tokens, objective, dtype=jnp.float32, rows=None):
  """Table, opening and bonus on a grid: sums are exact in any order."""
  table, mask, bonus, first = greedy_oracle.cases(
    seed, batch, num_tokens, objective, grid=True, num_rows=rows
  )
  opening = np.where(np.arange(num_tokens) == first[:, None], 1.0, bonus / 2)
  opening = np.where(mask, opening, -np.inf)
  if objective == "dpp":
    bonus = np.where(mask, 1.0, np.nan)  # the diagonal
  elif objective in ("max_min", "max_sum"):
    bonus = np.zeros_like(bonus)
  arrays = (np.float32(opening), np.float32(bonus))
  return jnp.asarray(table, dtype), *map(jnp.asarray, arrays)


def check(arrays, objective, num_keep, streamed=False):
  settings = dict(num_keep=num_keep, objective=objective, weight=0.5)
  index, gain = select(*arrays, interpret=True, **settings)
  want_index, want_gain = reference.select(*arrays, **settings)
  assert index.dtype == jnp.int32 and gain.dtype == jnp.float32
  found = np.isfinite(want_gain)
  np.testing.assert_array_equal(np.isfinite(gain), found)
  if objective == "dpp":  # other roundings: equal while candidates differ
    got, want = np.asarray(gain)[found], np.asarray(want_gain)[found]
    np.testing.assert_allclose(got, want, atol=1e-4)
    return
  np.testing.assert_array_equal(
    np.where(found, index, 0), np.where(found, want_index, 0)
  )
  np.testing.assert_array_equal(gain, want_gain)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_table_on_chip(objective, dtype):
  check(operands(0, 24, 21, objective, dtype), objective, 9)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
@pytest.mark.parametrize("objective", ["max_min", "max_sum", "mmr", "dpp"])
def test_table_in_hbm(objective, dtype, monkeypatch):
  monkeypatch.setattr(block_sizes, "_VMEM_TABLE_BYTES", 0)
  check(operands(1, 24, 22, objective, dtype), objective, 9)


def test_dpp_picks_what_the_plain_loop_picks():
  table, mask, _, _ = greedy_oracle.cases(3, 40, 12, "dpp", grid=False)
  diagonal = np.where(mask, 1.0, np.nan)
  opening = jnp.asarray(np.where(mask, 1.0, -np.inf), jnp.float32)
  index, gain = select(
    jnp.asarray(table, jnp.float32),
    opening,
    jnp.asarray(diagonal, jnp.float32),
    num_keep=10,
    objective="dpp",
    weight=1.0,
    interpret=True,
  )
  kept = np.asarray(gain) > -np.inf
  np.testing.assert_array_equal(
    kept.sum(axis=1), np.minimum(mask.sum(axis=1), 10)
  )
  index = np.where(kept, index, 11)
  gain = np.where(kept, gain, 0)
  for b in range(40):
    greedy_oracle.certify(
      (index[b], gain[b], kept[b]),
      table[b], mask[b], "dpp", None, None, 0.5, 10,
    )  # fmt: skip


@pytest.mark.parametrize("num_rows", [3, 50])
def test_coverage_of_other_targets(num_rows):
  check(operands(2, 24, 21, "coverage", rows=num_rows), "coverage", 9)


def test_several_lane_tiles_and_all_picks():
  check(operands(4, 4, 300, "max_min"), "max_min", 300)


def test_one_pick():
  check(operands(5, 8, 20, "max_sum"), "max_sum", 1)


def test_vmap_equals_one_by_one():
  two = [operands(seed, 8, 20, "max_min") for seed in (6, 7)]
  stacked = [jnp.stack(pair) for pair in zip(*two, strict=True)]
  settings = dict(num_keep=5, objective="max_min", weight=1.0, interpret=True)
  got = jax.vmap(functools.partial(pallas_tpu.select, **settings))(*stacked)
  for i, arrays in enumerate(two):
    want = select(*arrays, **settings)
    np.testing.assert_array_equal(got[0][i], want[0])


def test_inside_shard_map():
  mesh = jax.make_mesh((8,), ("data",))
  arrays = operands(8, 8, 20, "mmr")
  settings = dict(num_keep=5, objective="mmr", weight=0.5)
  spec = jax.P("data")
  mapped = jax.shard_map(
    functools.partial(pallas_tpu.select, interpret=True, **settings),
    mesh=mesh,
    in_specs=spec,
    out_specs=spec,
    check_vma=False,  # the interpreter's own loops lose track
  )
  placed = jax.device_put(arrays, jax.NamedSharding(mesh, spec))
  got = jax.jit(mapped)(*placed)
  want = reference.select(*arrays, **settings)
  found = np.isfinite(want[1])
  np.testing.assert_array_equal(
    np.where(found, got[0], 0), np.where(found, want[0], 0)
  )


def test_unsupported_names_the_reason():
  def reason(shape, dtype="float32", objective="max_min", num_keep=8):
    table = jax.ShapeDtypeStruct(shape, dtype)
    return pallas_tpu.unsupported(table, objective, num_keep)

  for shape in SHAPES.values():
    square = (shape.batch, shape.num_tokens, shape.num_tokens)
    assert reason(square, shape.dtype) is None
  assert "float16" in reason((1, 8, 8), "float16")
  assert "empty" in reason((0, 8, 8))
  assert "more than 65536" in reason((1, 70_000, 70_000))
  assert "vector memory" in reason((1, 2944, 2880), objective="coverage")
  assert reason((1, 640, 576), objective="coverage") is None
  assert "factor" in reason((1, 16384, 16384), objective="dpp", num_keep=1024)

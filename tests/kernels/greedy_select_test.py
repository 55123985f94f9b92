"""Greedy selection against a plain loop, and what is proved about it."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels import greedy_oracle
from tokjax.kernels.greedy_select import (
  OBJECTIVES,
  Picks,
  block_sizes,
  greedy_select,
  greedy_select_features,
  similarity_table,
)
from tokjax.kernels.greedy_select import reference as reference_lib
from tokjax.kernels.greedy_select.shapes import SHAPES

PLAIN = ("reference", "xla")


@functools.cache
def compiled(**settings):
  return jax.jit(functools.partial(greedy_select, **settings))


def run(table, mask, bonus, first, *, objective, **settings):
  """The kernel on NumPy cases, with the arguments the objective takes."""
  takes = objective in ("coverage", "mmr", "dpp")
  return compiled(objective=objective, **settings)(
    table if isinstance(table, jax.Array) else jnp.asarray(table, jnp.float32),
    jnp.asarray(mask),
    bonus=jnp.asarray(bonus, jnp.float32) if takes else None,
    first=None if first is None else jnp.asarray(first),
  )


def check_all(got, table, mask, bonus, first, objective, num_keep):
  takes = objective in ("coverage", "mmr", "dpp")
  got = jax.device_get(got)
  for b in range(len(mask)):
    greedy_oracle.certify(
      [x[b] for x in got],
      table[b],
      mask[b],
      objective,
      bonus[b] if takes else None,
      None if first is None else int(first[b]),
      0.5,
      num_keep,
    )


@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize("num_keep", [1, 5, 9])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_equals_a_plain_loop(objective, num_keep, implementation):
  for seed, grid in enumerate((True, False)):
    table, mask, bonus, _ = greedy_oracle.cases(
      seed, 60, 9, objective, grid=grid
    )
    settings = dict(objective=objective, num_keep=num_keep)
    got = run(
      table, mask, bonus, None, implementation=implementation, **settings
    )
    assert got.index.dtype == jnp.int32 and got.gain.dtype == jnp.float32
    check_all(got, table, mask, bonus, None, objective, num_keep)
    if grid and objective != "dpp":  # exact sums: ties as the loop has them
      got = jax.device_get(got)
      takes = objective in ("coverage", "mmr")
      for b in range(len(mask)):
        want, gains, _ = greedy_oracle.select(
          table[b],
          mask[b],
          objective,
          bonus[b] if takes else None,
          None,
          0.5,
          num_keep,
        )
        kept = np.asarray(got.mask[b])
        np.testing.assert_array_equal(got.index[b][kept], want)
        np.testing.assert_array_equal(got.gain[b][kept], np.float32(gains))


@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_first_pick_may_be_given(objective, implementation):
  case = greedy_oracle.cases(7, 60, 9, objective, grid=True)
  got = run(
    *case, implementation=implementation, objective=objective, num_keep=5
  )
  check_all(got, *case, objective, 5)
  _, mask, _, first = case
  for b in range(len(mask)):
    if mask[b].any():
      want = first[b] if mask[b, first[b]] else np.flatnonzero(mask[b])[0]
      assert int(got.index[b, 0]) == want


@pytest.mark.parametrize("implementation", PLAIN)
def test_coverage_of_other_targets_than_tokens(implementation):
  for num_rows in (3, 20):
    case = greedy_oracle.cases(
      3, 60, 9, "coverage", grid=True, num_rows=num_rows
    )
    got = run(
      *case, implementation=implementation, objective="coverage", num_keep=5
    )
    check_all(got, *case, "coverage", 5)


ANGLES = np.deg2rad([0, 10, 20, 90, 100, 180])
CIRCLE = np.cos(ANGLES[:, None] - ANGLES[None, :])


def picked(table, implementation="xla", **settings):
  got = greedy_select(
    jnp.asarray(table, jnp.float32)[None],
    implementation=implementation,
    **settings,
  )
  return got.index[0].tolist(), np.asarray(got.gain[0])


@pytest.mark.parametrize("implementation", PLAIN)
def test_worked_examples_on_a_circle(implementation):
  chosen = functools.partial(picked, CIRCLE, implementation)
  index, gain = chosen(num_keep=4)
  assert index == [5, 0, 3, 2]
  np.testing.assert_allclose(1 + gain, [0.8264, 2, 1, 0.0603], atol=5e-5)
  one = jnp.array([1])
  index, _ = chosen(num_keep=4, objective="max_sum", first=one)
  assert index == [1, 5, 0, 4]
  index, _ = chosen(num_keep=3, first=one)
  assert index == [1, 5, 3]


@pytest.mark.parametrize("implementation", PLAIN)
def test_worked_example_of_coverage_with_a_bonus(implementation):
  angles = np.deg2rad([0, 10, 90, 170])
  covered = (1 + np.cos(angles[:, None] - angles[None, :])) / 2
  aligned = 0.7 * (1 + np.cos(angles - np.deg2rad(60))) / 2
  index, gain = picked(
    covered,
    implementation,
    num_keep=2,
    objective="coverage",
    bonus=jnp.asarray(aligned, jnp.float32)[None],
  )
  assert index == [2, 1]
  np.testing.assert_allclose(gain, [3.327, 1.481], atol=5e-4)
  index, _ = picked(covered, implementation, num_keep=2, objective="coverage")
  assert index == [2, 0]


def test_mmr_at_its_ends():
  bonus = jnp.array([[0.1, 0.9, 0.3, 0.9, 0.2, 0.5]])
  order = dict(num_keep=6, objective="mmr", bonus=bonus)
  assert picked(CIRCLE, trade_off=1.0, **order)[0] == [1, 3, 5, 2, 4, 0]
  # Importance out of the game: the first token, then farthest first.
  one = jnp.array([0])
  far = picked(CIRCLE, num_keep=6, first=one)[0]
  assert picked(CIRCLE, trade_off=0.0, **order)[0] == far


def test_max_min_is_at_least_half_of_the_best():
  rng = np.random.default_rng(0)
  for num_keep in (2, 3, 4):
    points = rng.normal(size=(60, 9, 3))
    far = np.linalg.norm(points[:, :, None] - points[:, None], axis=-1)
    got = greedy_select(jnp.asarray(-far, jnp.float32), num_keep=num_keep)
    subsets = np.array(list(itertools.combinations(range(9), num_keep)))
    a, b = np.triu_indices(num_keep, 1)
    best = far[:, subsets[:, a], subsets[:, b]].min(axis=-1).max(axis=-1)
    chosen = np.asarray(got.index)
    row = np.arange(60)[:, None]
    ours = far[row, chosen[:, a], chosen[:, b]].min(axis=-1)
    assert (ours >= best / 2 - 1e-6).all()


def test_coverage_is_at_least_1_minus_1_over_e_of_the_best():
  rng = np.random.default_rng(1)
  table = rng.random((60, 7, 9)) ** 3
  for num_keep in (2, 3, 4):
    got = greedy_select(
      jnp.asarray(table, jnp.float32), num_keep=num_keep, objective="coverage"
    )
    subsets = np.array(list(itertools.combinations(range(9), num_keep)))
    of_all = table[:, :, subsets].max(axis=-1).sum(axis=1)  # [B, subsets]
    ours = np.take_along_axis(table, np.asarray(got.index)[:, None], axis=2)
    value = ours.max(axis=-1).sum(axis=1)
    assert (value >= (1 - 1 / np.e) * of_all.max(axis=1)).all()
    np.testing.assert_allclose(got.gain.sum(axis=1), value, rtol=1e-5)


@pytest.mark.parametrize("objective", ["max_min", "coverage", "dpp"])
def test_gains_never_rise(objective):
  table, mask, bonus, _ = greedy_oracle.cases(5, 60, 9, objective, grid=False)
  got = run(
    table, mask, bonus, None, implementation="xla", objective=objective,
    num_keep=9,
  )  # fmt: skip
  gain, kept = np.asarray(got.gain), np.asarray(got.mask)
  # The isolation of the first pick of max_min is no distance to a picked one.
  start = 1 if objective == "max_min" else 0
  fall = gain[:, start:-1] - gain[:, start + 1 :]
  assert (np.where(kept[:, start + 1 :], fall, 0) >= -1e-5).all()


def test_dpp_gains_multiply_to_the_determinant():
  table, mask, bonus, _ = greedy_oracle.cases(6, 60, 9, "dpp", grid=False)
  got = run(
    table, mask, bonus, None, implementation="xla", objective="dpp", num_keep=4
  )
  for b in range(60):
    if mask[b].sum() >= 4:
      chosen = np.asarray(got.index[b])
      kernel = bonus[b][:, None] * table[b] * bonus[b]
      want = np.linalg.det(kernel[np.ix_(chosen, chosen)])
      product = np.prod(np.asarray(got.gain[b], np.float64))
      np.testing.assert_allclose(product, want, rtol=1e-3, atol=1e-7)


def test_dpp_dependent_tokens_come_last_by_index():
  x = np.random.default_rng(2).normal(size=(8, 3))
  x /= np.linalg.norm(x, axis=1, keepdims=True)
  for implementation in PLAIN:
    index, gain = picked(x @ x.T, implementation, num_keep=8, objective="dpp")
    assert (gain[:3] > 1e-3).all() and not gain[3:].any()
    assert index[3:] == sorted(index[3:])


@pytest.mark.parametrize("implementation", PLAIN)
def test_bfloat16_table_is_its_float32_copy(implementation):
  for objective in OBJECTIVES:
    table, *rest = greedy_oracle.cases(9, 40, 9, objective, grid=False)
    low = jnp.asarray(table, jnp.bfloat16)
    got, want = (
      run(
        jnp_table,
        *rest,
        implementation=implementation,
        objective=objective,
        num_keep=6,
      )
      for jnp_table in (low, low.astype(jnp.float32))
    )
    np.testing.assert_array_equal(got.index, want.index)
    np.testing.assert_array_equal(got.gain, want.gain)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_permuting_tokens_permutes_picks(objective):
  rng = np.random.default_rng(0)
  x, order = rng.normal(size=(20, 9, 6)), rng.permutation(9)
  table = x @ x.swapaxes(1, 2) / 6
  turned = table[:, :, order]
  if objective == "coverage":
    table, turned = np.exp(table), np.exp(turned)
  else:
    turned = turned[:, order]
  bonus, mask = rng.random((20, 9)), np.ones((20, 9), bool)
  # Nothing has been added up when max_sum starts, and two tokens nearest to
  # each other are equally isolated: let both start alike.
  first = [None, None]
  if objective in ("max_min", "max_sum"):
    where = int(np.flatnonzero(order == 2)[0])
    first = [np.full(20, 2, np.int32), np.full(20, where, np.int32)]
  settings = dict(implementation="xla", objective=objective, num_keep=4)
  want = run(table, mask, bonus, first[0], **settings).index
  got = run(turned, mask, bonus[:, order], first[1], **settings).index
  np.testing.assert_array_equal(order[np.asarray(got)], want)


def test_batch_equals_one_by_one():
  table, mask, bonus, _ = greedy_oracle.cases(12, 6, 9, "dpp", grid=False)
  settings = dict(implementation="xla", objective="dpp", num_keep=5)
  together = run(table, mask, bonus, None, **settings)
  for b in range(6):
    alone = run(*(x[b : b + 1] for x in (table, mask, bonus)), None, **settings)
    np.testing.assert_array_equal(alone.index[0], together.index[b])


def test_no_gradient_passes():
  def total(table):
    return jnp.sum(greedy_select(table, num_keep=3).gain)

  gradient = jax.grad(total)(jnp.asarray(CIRCLE, jnp.float32)[None])
  assert not np.any(gradient)


@pytest.mark.parametrize("similarity", ["inner", "l1", "squared_l2"])
@pytest.mark.parametrize("objective", ["max_min", "max_sum", "mmr"])
def test_features_pick_what_their_table_picks(objective, similarity):
  rng = np.random.default_rng(4)
  # Small integers: products, sums and distances are exact, ties are common.
  x = rng.integers(-2, 3, (60, 11, 3)).astype(np.float32)
  mask = rng.random((60, 11)) < 0.8
  mask[0] = False
  poisoned = jnp.asarray(np.where(mask[:, :, None], x, np.nan))
  mask = jnp.asarray(mask)
  table = jax.vmap(lambda x, m: similarity_table(x, m, similarity=similarity))(
    poisoned, mask
  )
  bonus = jnp.asarray(rng.integers(0, 8, (60, 11)) / 8.0, jnp.float32)
  settings = dict(num_keep=6, objective=objective)
  if objective == "mmr":
    settings["bonus"] = bonus
  want = greedy_select(table, mask, **settings)
  for block_size in (4, 256):
    got = greedy_select_features(
      poisoned, mask, similarity=similarity, block_size=block_size, **settings
    )
    for ours, theirs in zip(got, want, strict=True):
      np.testing.assert_array_equal(ours, theirs)
  first = jnp.asarray(rng.integers(0, 11, 60), jnp.int32)
  want = greedy_select(table, mask, first=first, **settings)
  got = greedy_select_features(
    poisoned, mask, similarity=similarity, first=first, **settings
  )
  np.testing.assert_array_equal(got.index, want.index)


def test_similarity_table_is_a_pair_of_loops():
  x = np.random.default_rng(5).normal(size=(7, 4)).astype(np.float32)
  mask = np.arange(7) != 3
  clean = np.where(mask[:, None], x, 0)
  want = {
    "inner": lambda a, b: a @ b,
    "l1": lambda a, b: -np.abs(a - b).sum(),
    "squared_l2": lambda a, b: -np.square(a - b).sum(),
  }
  for kind, of in want.items():
    poisoned = jnp.asarray(np.where(mask[:, None], x, np.nan))
    got = similarity_table(poisoned, jnp.asarray(mask), similarity=kind)
    pairs = [[of(a, b) for b in clean] for a in clean]
    np.testing.assert_allclose(got, pairs, atol=1e-5)


def _largest(jaxpr):
  """Values in the largest array that a program makes."""
  sizes = [0]
  for eqn in jaxpr.eqns:
    sizes += [v.aval.size for v in eqn.outvars if hasattr(v.aval, "size")]
    for value in jax.tree.leaves(
      list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
    ):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        sizes.append(_largest(inner))
  return max(sizes)


def test_features_never_hold_the_table():
  x = jax.ShapeDtypeStruct((1, 6000, 4), jnp.float32)
  program = jax.make_jaxpr(
    lambda x: greedy_select_features(x, num_keep=5, block_size=16)
  )(x)
  assert _largest(program.jaxpr) <= 16 * 6000


@pytest.mark.unchecked
def test_errors_name_the_argument():
  def attempt(table=(2, 4, 4), mask=(2, 4), **settings):
    arrays = [
      jax.ShapeDtypeStruct(table, jnp.float32),
      jax.ShapeDtypeStruct(mask, jnp.bool_),
    ]
    settings = dict(num_keep=2) | settings
    jax.eval_shape(functools.partial(greedy_select, **settings), *arrays)

  attempt()
  bonus = jnp.ones((2, 4))
  for message, wrong in {
    "table_rows=3, table_columns=4": dict(table=(2, 3, 4)),
    "table must have 3 axes": dict(table=(4, 4)),
    "num_keep must lie in 1..4, got 5": dict(num_keep=5),
    "objective must be one of": dict(objective="min_max"),
    r"mask must have shape \(2, 4\), got \(2, 3\)": dict(mask=(2, 3)),
    "bonus has no meaning for objective 'max_sum'": dict(
      objective="max_sum", bonus=bonus
    ),
    "needs bonus": dict(objective="mmr"),
    "trade_off has no meaning": dict(trade_off=0.5),
    "trade_off must lie in 0..1, got 2": dict(
      objective="mmr", bonus=bonus, trade_off=2
    ),
    r"first must have shape \(2,\), got \(3,\)": dict(
      first=jnp.zeros(3, jnp.int32)
    ),
    "implementation must be one of": dict(implementation="triton"),
  }.items():
    with pytest.raises(ValueError, match=message):
      attempt(**wrong)
  with pytest.raises(NotImplementedError, match="pallas_gpu: coverage reads"):
    attempt(objective="coverage", implementation="pallas_gpu")
  x = jnp.ones((2, 4, 3))
  with pytest.raises(ValueError, match="objective must be one of"):
    greedy_select_features(x, num_keep=2, objective="coverage")
  with pytest.raises(ValueError, match="similarity must be one of"):
    greedy_select_features(x, num_keep=2, similarity="cosine")


def test_raw_results_are_those_of_the_reference():
  table, mask, bonus, _ = greedy_oracle.cases(13, 30, 9, "mmr", grid=True)
  opening = jnp.where(jnp.asarray(mask), jnp.asarray(bonus), -jnp.inf)
  index, gain = reference_lib.select(
    jnp.asarray(table), opening, jnp.asarray(bonus), num_keep=3,
    objective="mmr", weight=0.5,
  )  # fmt: skip
  assert not np.isnan(np.asarray(gain)).any()
  assert (np.isneginf(gain).sum(axis=1) == np.maximum(
    0, 3 - mask.sum(axis=1))).all()  # fmt: skip
  assert Picks(index, gain, gain > -jnp.inf).mask.shape == (30, 3)


def test_sizes_on_chip():
  assert block_sizes.tpu_group(2) == 16
  for name, shape in SHAPES.items():
    chunk = block_sizes.gpu_chunk(shape.num_tokens)
    assert chunk % 256 == 0 and chunk <= 4096, name
    assert -(-shape.num_tokens // chunk) * chunk - shape.num_tokens < 256
  fits = [n for n in range(8, 4000, 8) if block_sizes.table_fits_vmem(n, n, 4)]
  assert max(fits) ** 2 * 4 <= 14 << 20 < (max(fits) + 256) ** 2 * 4

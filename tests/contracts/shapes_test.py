"""Contracts of distances between shapes and of winding numbers."""

import jax
import jax.numpy as jnp

from tests.contracts import harness
from tests.contracts.harness import Case
from tokjax.eval import shapes
from tokjax.ops import winding


@jax.jit
def surfaces(seed):
  keys = jax.random.split(jax.random.key(seed), 4)
  points = jax.random.normal(keys[0], (8, 6, 3))
  targets = jax.random.normal(keys[1], (8, 5, 3))
  # The first of each counts, so that none is empty.
  masks = (
    jax.random.bernoulli(key, 0.7, (8, number)).at[:, 0].set(True)
    for key, number in zip(keys[2:], (6, 5), strict=True)
  )
  return points, targets, *masks


def halves(seed):
  """Coordinates that bfloat16 holds: what is within does not hang on it."""
  points, targets, *masks = surfaces(seed)
  return *(jnp.round(4 * x) / 4 for x in (points, targets)), *masks


@jax.jit
def corners(seed):
  keys = jax.random.split(jax.random.key(seed))
  points = jax.random.normal(keys[0], (8, 3))
  return points, jax.random.normal(keys[1], (5, 3, 3))


def row(name, function, inputs=surfaces, differentiable=(), batched=4):
  return Case(
    name,
    function,
    inputs,
    batched=tuple(range(batched)),
    differentiable=differentiable,
  )


CASES = [
  row(
    "f-score",
    lambda *x: shapes.f_score(*x, threshold=0.9, block_size=2),
    halves,
  ),
  row("chamfer", shapes.chamfer, differentiable=(0, 1)),
  row(
    "nearest-distances",
    lambda x, y, _, mask: shapes.nearest_distances(x, y, mask, block_size=3),
    differentiable=(0, 1),
  ),
  row(
    "volume-iou",
    lambda x, y: shapes.volume_iou(x[..., 0] > 0, y[..., 0] > 0),
    lambda seed: (surfaces(seed)[0], halves(seed)[0][:, ::-1]),
    batched=2,
  ),
  row(
    "winding-numbers",
    lambda x, y: winding.winding_numbers(x, y, block_size=2),
    corners,
    batched=1,
  ),
]


@harness.all_checks(CASES)
def test_contract(check, case):
  check(case)

"""Rows of experts and capacities against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import compiled
from tokjax.ops import moe_dispatch as plain

module = compiled(plain)
WORKED = np.array([[0, 1], [0, 1], [3, 2], [0, 2]])


def example(num_tokens=10, num_experts=6, k=3):
  """Choices among the first five experts, one in seven of nobody."""
  rng = np.random.default_rng(0)
  index = np.stack([rng.permutation(5)[:k] for _ in range(num_tokens)])
  index[rng.random(index.shape) < 1 / 7] = -1
  weights = rng.choice([0.1, 0.2, 0.3], index.shape).astype(np.float32)
  return index, weights, num_experts


def kept_by_loops(index, weights, capacity, policy):
  kept = np.zeros(index.shape, bool)
  for expert in range(index.max() + 1):
    here = [tuple(at) for at in np.argwhere(index == expert)]
    if policy == "probs":
      here = sorted(here, key=lambda at: -weights[at])  # stable
    for at in here[:capacity]:
      kept[at] = True
  return kept


@pytest.mark.parametrize(
  ("tokens", "factor", "want"),
  [
    (4096, 1.0, 1024),
    (4096, 1.25, 1280),
    (7, 1.0, 2),
    (4, 99.0, 4),
    (4, 0.0, 0),
  ],
)
def test_capacity(tokens, factor, want):
  got = plain.expert_capacity(
    tokens, num_chosen=2, num_experts=8, factor=factor
  )
  assert got == want


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_the_worked_example_drops_the_last_of_expert_0(policy):
  weights = np.tile([0.643914, 0.236883], (4, 1)).astype(np.float32)
  kept = module.keep_within_capacity(
    WORKED, weights, capacity=2, num_experts=4, policy=policy
  )
  np.testing.assert_array_equal(kept, [[1, 1], [1, 1], [1, 1], [0, 1]])


@pytest.mark.parametrize("policy", ["probs", "position"])
@pytest.mark.parametrize("capacity", [0, 2, 10])
def test_who_is_kept(policy, capacity):
  index, weights, num_experts = example()
  kept = module.keep_within_capacity(
    index, weights, capacity=capacity, num_experts=num_experts, policy=policy
  )
  want = kept_by_loops(index, weights, capacity, policy)
  np.testing.assert_array_equal(kept, want)
  if capacity == 10:
    np.testing.assert_array_equal(kept, index >= 0)


@pytest.mark.parametrize(
  ("num_buffers", "buffer_rows"), [(1, None), (6, 3), (6, None), (3, 5), (1, 9)]
)
def test_rows_of_buffers(num_buffers, buffer_rows):
  index, _, num_experts = example()
  plan = module.plan_rows(
    index,
    num_experts=num_experts,
    num_buffers=num_buffers,
    buffer_rows=buffer_rows,
  )
  share = num_experts // num_buffers
  rows = buffer_rows or (10 if share == 1 else 30)
  flat = index.reshape(-1)
  want, row, sizes = [], np.full(30, -1), np.zeros(num_experts, int)
  for buffer in range(num_buffers):
    here = [
      n
      for expert in range(buffer * share, (buffer + 1) * share)
      for n in np.flatnonzero(flat == expert)
    ][:rows]
    row[here] = buffer * rows + np.arange(len(here))
    np.add.at(sizes, flat[here], 1)
    want += here + [-1] * (rows - len(here))
  np.testing.assert_array_equal(plan.assignment, want)
  np.testing.assert_array_equal(plan.row.reshape(-1), row)
  np.testing.assert_array_equal(plan.group_sizes, sizes)
  assert int(plan.overflow) == (flat >= 0).sum() - sizes.sum()
  if buffer_rows is None:
    assert int(plan.overflow) == 0


def test_gather_and_combine_are_inverse():
  """Weights that sum to one give every token back, whatever k is."""
  index = [np.random.default_rng(t).permutation(4) for t in range(6)]
  index = jnp.asarray(np.stack(index))
  x = np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32)
  weights = jnp.full((6, 4), 0.25)  # k = E

  def back(x):
    plan = plain.plan_rows(index, num_experts=4)
    return plain.combine_rows(plain.gather_rows(x, plan), weights, plan)

  got, pull = jax.jit(lambda x: jax.vjp(back, x))(x)
  np.testing.assert_allclose(got, x, rtol=1e-6)
  np.testing.assert_allclose(pull(got)[0], x, rtol=1e-6)


def test_what_goes_nowhere_has_no_influence():
  index = jnp.array([[0, 1], [-1, -1], [1, 0]])
  x = np.array([[1.0], [np.nan], [2.0]], np.float32)
  weights = np.array([[0.5, 0.5], [0, 0], [0.25, 0.75]], np.float32)

  def total(x, weights):
    plan = plain.plan_rows(index, num_experts=2, num_buffers=2, buffer_rows=1)
    y = plain.gather_rows(x, plan)
    y = jnp.where((plan.assignment >= 0)[:, None], y, jnp.nan)
    out = plain.combine_rows(y, weights, plan)
    return jnp.sum(out), out

  (_, out), gradients = jax.jit(
    jax.value_and_grad(total, (0, 1), has_aux=True)
  )(x, weights)
  np.testing.assert_allclose(out[:, 0], [1, 0, 0])  # no room for the third
  np.testing.assert_allclose(gradients[0][:, 0], [1, 0, 0])
  np.testing.assert_allclose(gradients[1], [[1, 1], [0, 0], [0, 0]])


@pytest.mark.unchecked
def test_errors_name_the_argument():
  index, weights = jnp.zeros((4, 2), int), jnp.zeros((4, 2))
  with pytest.raises(ValueError, match="policy must be one of 'probs'"):
    plain.keep_within_capacity(
      index, weights, capacity=1, num_experts=2, policy="last"
    )
  with pytest.raises(ValueError, match="weights_tokens=3"):
    plain.keep_within_capacity(index, weights[:3], capacity=1, num_experts=2)
  with pytest.raises(ValueError, match="num_experts must be a multiple of 2"):
    plain.plan_rows(index, num_experts=5, num_buffers=2)
  with pytest.raises(ValueError, match="factor must lie in 0..inf, got -1"):
    plain.expert_capacity(4, num_chosen=1, num_experts=2, factor=-1)

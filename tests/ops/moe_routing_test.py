"""Routers against loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import compiled
from tokjax.ops import moe_routing as plain

module = compiled(plain)

# Worked by hand; two tokens of four agree.
LOGITS = np.array(
  [[2, 1, 0, -1], [2, 1, 0, -1], [0, 0, 1, 2], [2, 0, 1, -1]], np.float32
)


def softmax(z):
  e = np.exp(z - z.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def best(values, k):
  """Positions of the k largest, of equal ones the first."""
  return sorted(range(len(values)), key=lambda e: (-values[e], e))[:k]


def oracle(logits, mask, bias, k, score, groups=1, kept_groups=1, scale=1.0):
  """(index, weights) token by token."""
  num_experts = logits.shape[1]
  index = np.full((len(logits), k), -1)
  weights = np.zeros((len(logits), k))
  for t, z in enumerate(np.asarray(logits, np.float64)):
    if not mask[t]:
      continue
    if score == "sigmoid":
      values = 1 / (1 + np.exp(-z))
    elif score == "sqrt_softplus":
      values = np.sqrt(np.log1p(np.exp(z)))
    else:
      values = softmax(z)
    wanted = values + bias
    size = num_experts // groups
    parts = wanted.reshape(groups, size)
    value = np.sort(parts, axis=1)[:, ::-1][:, : k // kept_groups].sum(1)
    for g in set(range(groups)) - set(best(value, kept_groups)):
      wanted[g * size : (g + 1) * size] = -np.inf
    chosen = best(wanted, k)
    w = values[chosen]
    if score == "softmax" or (k > 1 and score != "pre_softmax"):
      w = w / w.sum()
    index[t], weights[t] = chosen, scale * w
  return index, weights


def example(num_tokens=12, num_experts=8):
  rng = np.random.default_rng(0)
  logits = 2 * rng.normal(size=(num_tokens, num_experts)).astype(np.float32)
  bias = 0.3 * rng.normal(size=num_experts).astype(np.float32)
  return logits, rng.random(num_tokens) < 0.8, bias


def test_the_worked_example():
  found = module.route(LOGITS, num_chosen=2)
  np.testing.assert_array_equal(found.index, [[0, 1], [0, 1], [3, 2], [0, 2]])
  np.testing.assert_array_equal(found.counts, [3, 2, 2, 1])
  np.testing.assert_allclose(
    found.weights, np.tile([0.731059, 0.268941], (4, 1)), atol=1e-6
  )
  pre = module.route(LOGITS, num_chosen=2, score="pre_softmax")
  np.testing.assert_allclose(pre.weights[0], [0.643914, 0.236883], atol=1e-6)


@pytest.mark.parametrize(
  ("score", "k", "settings"),
  [
    ("softmax", 2, {}),
    ("softmax", 8, dict(scale=2.5)),  # all experts
    ("pre_softmax", 4, dict(groups=4, kept_groups=2)),
    ("sigmoid", 1, {}),
    ("sigmoid", 4, dict(groups=4, kept_groups=2, scale=2.5)),
    ("sqrt_softplus", 3, {}),
  ],
)
def test_choices_and_weights(score, k, settings):
  logits, mask, bias = example()
  biased = score in ("sigmoid", "sqrt_softplus")
  want = oracle(
    logits, mask, bias if biased else 0 * bias, k, score, **settings
  )
  names = dict(groups="num_groups", kept_groups="num_kept_groups")
  found = module.route(
    np.where(mask[:, None], logits, np.nan),
    mask,
    bias if biased else None,
    num_chosen=k,
    score=score,
    **{names.get(name, name): value for name, value in settings.items()},
  )
  np.testing.assert_array_equal(found.index, want[0])
  np.testing.assert_allclose(found.weights, want[1], rtol=1e-5, atol=1e-6)
  counts = np.bincount(want[0][mask].reshape(-1), minlength=8)
  np.testing.assert_array_equal(found.counts, counts)
  np.testing.assert_allclose(found.probabilities.sum(-1), 1, rtol=1e-6)


def test_a_bias_chooses_and_does_not_weigh():
  logits = np.array([[0.0, 1.0, 2.0]], np.float32)
  bias = np.array([5.0, 0.0, 0.0], np.float32)
  found = module.route(logits, None, bias, num_chosen=1, score="sigmoid")
  assert int(found.index[0, 0]) == 0
  assert float(found.weights[0, 0]) == 0.5


def test_sinkhorn_shares_evenly():
  logits, mask, _ = example(16, 4)
  logits[:, 0] += 30  # all would go to the first, and exp overflows in half
  plan = module.sinkhorn(np.where(mask[:, None], logits, np.inf), mask)
  np.testing.assert_allclose(plan.sum(0), 1 / 4, rtol=2e-3)
  np.testing.assert_allclose(plan.sum(1), mask / mask.sum(), rtol=1e-5)
  want = np.exp(logits.astype(np.float64)) * mask[:, None]
  columns = np.ones(4)
  for _ in range(2000):
    rows = 1 / mask.sum() / np.maximum((want * columns).sum(1), 1e-300)
    rows *= mask
    columns = 1 / 4 / (want * rows[:, None]).sum(0)
  want = want * columns * rows[:, None]
  np.testing.assert_allclose(plan, want, atol=1e-4)
  found = module.route(logits, mask, num_chosen=1, score="sinkhorn")
  clear = np.sort(want, 1)[:, -1] - np.sort(want, 1)[:, -2] > 1e-3
  clear &= mask
  assert clear.sum() > 8
  np.testing.assert_array_equal(found.index[clear, 0], want.argmax(1)[clear])
  z = np.take_along_axis(logits, np.maximum(found.index, 0), 1)
  np.testing.assert_allclose(
    found.weights, mask[:, None] / (1 + np.exp(-z)), rtol=1e-5
  )


def test_nothing_counts():
  logits, mask, _ = example()
  found = module.route(logits, ~mask & mask, num_chosen=2)
  assert int(found.counts.sum()) == 0
  assert (np.asarray(found.index) == -1).all()
  plan = module.sinkhorn(logits, ~mask & mask)
  np.testing.assert_array_equal(plan, np.zeros_like(logits))


def test_where_gradients_flow():
  logits, mask, bias = example()

  def weights(logits, bias, mask):
    found = plain.route(logits, mask, bias, num_chosen=2, score="sigmoid")
    return jnp.sum(found.weights[:, 0] ** 2)

  poisoned = np.where(mask[:, None], logits, np.nan)
  gradient = jax.jit(jax.grad(weights, (0, 1)))
  d_logits, d_bias = gradient(poisoned, bias, mask)
  np.testing.assert_array_equal(d_bias, 0)
  index, _ = oracle(logits, mask, bias, 2, "sigmoid")
  chosen = (np.arange(8) == index[..., None]).any(1)
  np.testing.assert_array_equal(np.asarray(d_logits) != 0, chosen)


@pytest.mark.unchecked
@pytest.mark.parametrize(
  ("settings", "match"),
  [
    (dict(num_chosen=9), "num_chosen must lie in 1..8, got 9"),
    (dict(num_chosen=2, score="tanh"), "score must be one of 'softmax'"),
    (dict(num_chosen=2, num_groups=3), "num_experts must be a multiple of 3"),
    (
      dict(num_chosen=3, num_groups=4, num_kept_groups=2),
      "num_chosen must be a multiple of 2, got 3",
    ),
    (
      dict(num_chosen=4, num_groups=4, num_kept_groups=1),
      "num_chosen must lie in 1..2, got 4",
    ),
    (dict(num_chosen=2, bias=np.zeros(8)), "'softmax' takes no bias"),
    (
      dict(num_chosen=2, mask=np.ones(3, bool)),
      r"mask must be of the tokens \(4,\), got \(3,\)",
    ),
  ],
)
def test_errors_name_the_argument(settings, match):
  with pytest.raises(ValueError, match=match):
    plain.route(jnp.zeros((4, 8)), **settings)

"""ToDRE: both objectives of stage 1, and the decision of stage 2."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.reduction import todre as todre_lib
from tokjax.reduction.todre import (
  CrossModalRatio,
  cls_pivot,
  cross_modal_ratio,
  should_drop,
  todre,
)

run = jax.jit(
  todre,
  static_argnames=("num_keep", "objective", "positions", "implementation"),
)


def loop(x, pivot, mask, num_keep, objective):
  """Kept tokens, and the smallest lead of a choice over another token."""
  x = np.asarray(x, np.float64)
  unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
  cosine = unit @ unit.T
  valid = np.flatnonzero(mask).tolist()
  kept, lead = [], np.inf
  while len(kept) < min(num_keep, len(valid)):
    if not kept:
      kept.append(pivot if mask[pivot] else valid[0])
      continue
    free = [j for j in valid if j not in kept]
    if objective == "max_sum":
      score = {j: round(sum(cosine[c, j] for c in kept), 12) for j in free}
    else:
      score = {j: round(max(cosine[c, j] for c in kept), 12) for j in free}
    order = sorted(free, key=lambda j: (score[j], j))
    # Of equal tokens the lower one wins.
    others = [j for j in free if (x[j] != x[order[0]]).any()]
    lead = min([lead, *(score[j] - score[order[0]] for j in others)])
    kept.append(order[0])
  return kept, lead


@pytest.mark.parametrize("objective", ["max_sum", "k_center"])
def test_stage_1_equals_a_loop(objective):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(300, 10, 5)).astype(np.float32)
  x[200:, 6:] = x[200:, :4]
  mask = rng.random((300, 10)) < 0.8
  mask[0] = False
  pivot = rng.integers(0, 10, 300).astype(np.int32)
  poisoned = jnp.asarray(np.where(mask[:, :, None], x, np.nan))
  for num_keep in (1, 4, 10):
    got = jax.device_get(
      run(poisoned, pivot, mask, num_keep=num_keep, objective=objective)
    )
    assert np.isfinite(got.tokens).all()
    sure = 0
    for b in range(300):
      want, lead = loop(x[b], pivot[b], mask[b], num_keep, objective)
      kept = got.mask[b]
      assert kept.sum() == len(want)
      if lead > 1e-5:
        sure += 1
        np.testing.assert_array_equal(got.index[b][kept], np.sort(want))
    assert sure > (290 if num_keep < 10 else 200)


def circle(*degrees):
  angle = np.deg2rad(degrees)
  return jnp.asarray(
    np.stack([np.cos(angle), np.sin(angle)], -1)[None], jnp.float32
  )


def test_worked_example():
  x, pivot = circle(0, 10, 20, 90, 100, 180), jnp.array([1])
  assert run(x, pivot, num_keep=4).index[0].tolist() == [0, 1, 4, 5]
  k_center = functools.partial(run, x, pivot, objective="k_center")
  assert k_center(num_keep=3).index[0].tolist() == [1, 3, 5]
  # Then 0, 2 and 4 are equally far, up to rounding.
  fourth = set(k_center(num_keep=4).index[0].tolist()) - {1, 3, 5}
  assert len(fourth) == 1 and fourth <= {0, 2, 4}


def test_keeping_all_is_the_identity_and_ids_can_be_renumbered():
  x = circle(0, 10, 20, 90)
  got = run(x, jnp.array([2]), num_keep=4)
  np.testing.assert_array_equal(got.tokens, x)
  got = run(x, jnp.array([2]), num_keep=2, positions="renumber")
  assert got.index[0].tolist() == [2, 3]
  assert got.position_ids[0].tolist() == [0, 1]


def test_gradient_flows_through_kept_features_only():
  x, pivot = circle(0, 10, 20, 90), jnp.array([0])
  gradient = jax.grad(lambda x: run(x, pivot, num_keep=2).tokens.sum())(x)
  np.testing.assert_array_equal(gradient[0, :, 0], [1, 0, 0, 1])


def test_pivot_is_the_mean_over_heads():
  rng = np.random.default_rng(1)
  attention = rng.random((200, 3, 7)).astype(np.float32)
  mask = rng.random((200, 7)) < 0.7
  mask[0] = False
  mask[1:3] = True
  got = cls_pivot(jnp.asarray(attention), jnp.asarray(mask))
  for b in range(200):
    score = attention[b].astype(np.float64).mean(axis=0)
    free = np.flatnonzero(mask[b])
    want = max(free, key=lambda j, score=score: score[j]) if len(free) else 0
    assert int(got[b]) == want
  tie = jnp.full((1, 2, 4), 0.25)
  assert int(cls_pivot(tie)[0]) == 0 and got.dtype == jnp.int32


def dense_ratio(q, k, kinds, causal):
  """Means over heads and rows of the attention written out."""
  num_heads, size, width = q.shape
  groups = num_heads // k.shape[0]
  sums = np.zeros((3, 3))
  for h in range(num_heads):
    logits = q[h] @ k[h // groups].T / np.sqrt(width)
    seen = np.broadcast_to(kinds >= 0, (size, size)).copy()
    if causal:
      seen &= np.tril(np.ones((size, size), bool))
    for i in np.flatnonzero(kinds >= 0):
      e = np.where(seen[i], np.exp(logits[i]), 0)
      p = e / e.sum()
      for column in range(3):
        sums[kinds[i], column] += p[kinds == column].sum() / num_heads
  rows = np.maximum([(kinds == kind).sum() for kind in range(3)], 1)
  share = sums / rows[:, None]
  text, vision = todre_lib.TEXT, todre_lib.VISION
  return share[text, vision], share[vision, text]


@pytest.mark.parametrize("causal", [True, False])
def test_ratios_equal_the_dense_attention(causal):
  rng = np.random.default_rng(2)
  q = rng.normal(size=(6, 4, 12, 8)).astype(np.float32)
  k = rng.normal(size=(6, 2, 12, 8)).astype(np.float32)
  kinds = rng.integers(0, 3, (6, 12)).astype(np.int32)
  kinds[1, -3:] = -1
  kinds[2] = np.where(kinds[2] == 2, 0, kinds[2])  # no text
  kinds[:, 0] = np.maximum(kinds[:, 0], 0)
  got = cross_modal_ratio(
    jnp.asarray(q), jnp.asarray(k), jnp.asarray(kinds), causal=causal
  )
  for b in range(6):
    want = dense_ratio(q[b], k[b], kinds[b], causal)
    np.testing.assert_allclose(got.text_to_vision[b], want[0], atol=1e-5)
    np.testing.assert_allclose(got.vision_to_text[b], want[1], atol=1e-5)
  assert float(got.text_to_vision[2]) == 0


def test_causal_image_before_question_never_looks_at_text():
  rng = np.random.default_rng(3)
  q, k = (
    jnp.asarray(rng.normal(size=(2, 2, 9, 4)), jnp.float32) for _ in range(2)
  )
  kinds = jnp.array([[0, 0, 1, 1, 1, 2, 2, 2, -1]] * 2)
  got = cross_modal_ratio(q, k, kinds)
  assert not np.any(got.vision_to_text)
  assert (np.asarray(got.text_to_vision) > 0).all()


def test_decision():
  ratio = CrossModalRatio(
    jnp.array([0.07, 0.07, 0.2, 0.1]), jnp.array([0.0, 0.3, 0.0, 0.0])
  )
  assert should_drop(ratio).tolist() == [True, False, False, False]
  assert not should_drop(ratio, threshold=0.0).any()
  assert should_drop(ratio, threshold=1.1).all()


def test_four_token_example():
  # Two text rows give .04 + .03 and .05 + .02 of their attention to vision.
  log = np.log
  rows = np.array([[0.93, 0.04, 0.03], [0.93, 0.05, 0.02]])
  kinds = jnp.array([[0, 1, 1, 2, 2]])
  # Keys are unit vectors, so that the logits stand in the queries.
  k = jnp.asarray(np.eye(5)[None, None], jnp.float32)
  q = np.full((1, 1, 5, 5), 0.0)
  q[0, 0, 3:, :3] = log(rows)
  q[0, 0, 3:, 3:] = -1e4
  got = cross_modal_ratio(jnp.asarray(q, jnp.float32), k, kinds, scale=1.0)
  np.testing.assert_allclose(got.text_to_vision, [0.07], atol=1e-6)
  np.testing.assert_allclose(got.vision_to_text, [0.0], atol=0)
  assert bool(should_drop(got)[0])


@pytest.mark.unchecked
def test_errors_name_the_argument():
  x, pivot = jnp.ones((2, 6, 3)), jnp.zeros(2, jnp.int32)
  for message, call in {
    "num_keep must lie in 1..6, got 0": lambda: todre(x, pivot, num_keep=0),
    "objective must be one of 'max_sum', 'k_center'": lambda: todre(
      x, pivot, num_keep=2, objective="max_min"
    ),
    "features=2, pivot=3": lambda: todre(
      x, jnp.zeros(3, jnp.int32), num_keep=2
    ),
    "features_tokens=6, mask_tokens=5": lambda: todre(
      x, pivot, jnp.ones((2, 5), bool), num_keep=2
    ),
    "attention=6, mask=5": lambda: cls_pivot(
      jnp.ones((2, 1, 6)), jnp.ones((2, 5), bool)
    ),
    "q=4, k=4, kinds=5": lambda: cross_modal_ratio(
      jnp.ones((2, 1, 4, 2)),
      jnp.ones((2, 1, 4, 2)),
      jnp.zeros((2, 5), jnp.int32),
    ),
  }.items():
    with pytest.raises(ValueError, match=message):
      call()

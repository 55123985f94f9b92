"""CATP: coverage with alignment, then two rankings inside the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.reduction.catp import catp_context, catp_query, catp_stage1

_STATIC = ("num_keep", "positions")
stage1 = jax.jit(catp_stage1, static_argnames=(*_STATIC, "implementation"))
context = jax.jit(catp_context, static_argnames=_STATIC)
query = jax.jit(catp_query, static_argnames=_STATIC)


def unit(x):
  x = np.asarray(x, np.float64)
  return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def circle(*degrees):
  angle = np.deg2rad(degrees)
  return jnp.asarray(
    np.stack([np.cos(angle), np.sin(angle)], -1)[None], jnp.float32
  )


def loop(x, text, num_keep, weight):
  """Kept tokens, and the smallest lead of a choice over another token."""
  alike = (1 + unit(x) @ unit(x).T) / 2
  aligned = weight * (1 + unit(x) @ unit(text)) / 2
  best, kept, lead = np.zeros(len(x)), [], np.inf
  while len(kept) < min(num_keep, len(x)):
    gain = np.maximum(alike - best[:, None], 0).sum(axis=0) + aligned
    gain = gain.round(12)  # equal tokens gain the same
    free = [j for j in range(len(x)) if j not in kept]
    order = sorted(free, key=lambda j: (-gain[j], j))
    others = [j for j in free if (x[j] != x[order[0]]).any()]
    lead = min([lead, *(gain[order[0]] - gain[others])])
    kept.append(order[0])
    best = np.maximum(best, alike[order[0]])
  return kept, lead


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_stage_1_equals_a_loop(weight):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(300, 9, 4)).astype(np.float32)
  x[200:, 5:] = x[200:, :4]
  text = rng.normal(size=(300, 4)).astype(np.float32)
  mask = rng.random((300, 9)) < 0.8
  mask[0] = False
  poisoned = jnp.asarray(np.where(mask[:, :, None], x, np.nan))
  for num_keep in (1, 4, 9):
    got = jax.device_get(
      stage1(poisoned, text, mask, num_keep=num_keep, alignment_weight=weight)
    )
    assert np.isfinite(got.tokens).all()
    sure = 0
    for b in range(300):
      valid = np.flatnonzero(mask[b])
      want, lead = loop(x[b][valid], text[b], num_keep, weight)
      kept = got.mask[b]
      assert kept.sum() == len(want)
      if lead > 1e-5:
        sure += 1
        np.testing.assert_array_equal(
          got.index[b][kept], np.sort(valid[np.array(want, int)])
        )
    assert sure > (150 if num_keep < 9 else 80)


def test_stage_1_worked_example():
  x, text = circle(0, 10, 90, 170), circle(60)[:, 0]
  assert stage1(x, text, num_keep=1).index[0].tolist() == [2]
  assert stage1(x, text, num_keep=2).index[0].tolist() == [1, 2]
  alone = stage1(x, text, num_keep=2, alignment_weight=0.0)
  assert alone.index[0].tolist() == [0, 2]
  np.testing.assert_array_equal(stage1(x, text, num_keep=4).tokens, x)
  again = stage1(x, text, num_keep=2, positions="renumber")
  assert again.position_ids[0].tolist() == [0, 1]


@pytest.mark.parametrize("num_keep", [1, 4, 10])
def test_context_equals_a_ranking(num_keep):
  rng = np.random.default_rng(1)
  x = rng.normal(size=(350, 10, 4)).astype(np.float32)
  now, before = rng.random((2, 350, 10)).astype(np.float32) / 4
  mean = rng.normal(size=(350, 4)).astype(np.float32)
  # Axes and eighths, with ties.
  x[200:] = np.eye(4)[rng.integers(0, 4, (150, 10))]
  mean[200:] = np.eye(4)[rng.integers(0, 4, 150)]
  now[200:], before[200:] = rng.integers(0, 3, (2, 150, 10)) / 8
  mask = rng.random((350, 10)) < 0.8
  mask[0] = False
  hide = ~mask
  arrays = (
    np.where(hide[:, :, None], np.nan, x),
    np.where(hide, np.nan, now),
    np.where(hide, np.nan, before),
    mean,
    mask,
  )
  arrays = tuple(map(jnp.asarray, arrays))
  got = jax.device_get(context(*arrays, num_keep=num_keep))
  of_query = jax.device_get(
    query(*(arrays[i] for i in (0, 3, 4)), num_keep=num_keep)
  )
  for b in range(350):
    cosine = unit(x[b]) @ unit(mean[b])
    growth = np.maximum(np.float64(now[b]) - before[b], 0)
    for out, score in ((got, growth + 0.6 * cosine), (of_query, cosine)):
      valid = np.flatnonzero(mask[b])
      want = sorted(valid, key=lambda j, score=score: -score[j])[:num_keep]
      kept = np.asarray(out.mask[b])
      np.testing.assert_array_equal(out.index[b][kept], np.sort(want))


def test_an_irrelevant_example_loses_all_its_tokens():
  # Two examples of four tokens; the query looks like the second one.
  hidden = jnp.concatenate(
    [circle(170, 175, 180, 185), circle(0, 5, 10, 15)], 1
  )
  same = jnp.full((1, 8), 0.1)
  got = context(hidden, same, same, circle(5)[:, 0], num_keep=4)
  assert got.index[0].tolist() == [4, 5, 6, 7]
  # Fresh attention brings one of the first back.
  now = same.at[0, 1].set(2.9)
  got = context(hidden, now, same, circle(5)[:, 0], num_keep=4)
  assert 1 in got.index[0].tolist()
  # Attention that fades counts as attention that stays.
  got = context(hidden, same.at[0, 5].set(0.0), same, circle(5)[:, 0],
                num_keep=4)  # fmt: skip
  assert got.index[0].tolist() == [4, 5, 6, 7]


def test_equal_scores_keep_the_first():
  hidden, same = circle(0, 40, 80, 120), jnp.full((1, 4), 0.25)
  got = context(
    hidden, same, same, circle(0)[:, 0], num_keep=2, relevance_weight=0.0
  )
  assert got.index[0].tolist() == [0, 1]


@pytest.mark.parametrize("stage", ["stage1", "context", "query"])
def test_gradient_flows_through_kept_features_only(stage):
  x = jnp.asarray(np.random.default_rng(2).normal(size=(3, 7, 4)), jnp.float32)
  mean, row = x[:, 0] + 1, jnp.abs(x[:, :, 0])
  calls = {
    "stage1": lambda x: stage1(x, mean, num_keep=3),
    "context": lambda x: context(x, row, row / 2, mean, num_keep=3),
    "query": lambda x: query(x, mean, num_keep=3),
  }
  gradient = jax.grad(lambda x: calls[stage](x).tokens.sum())(x)
  want = np.zeros(x.shape, np.float32)
  for b, kept in enumerate(np.asarray(calls[stage](x).index)):
    want[b, kept] = 1
  np.testing.assert_array_equal(gradient, want)


@pytest.mark.unchecked
def test_errors_name_the_argument():
  x, mean, row = jnp.ones((2, 6, 3)), jnp.ones((2, 3)), jnp.ones((2, 6))
  for message, call in {
    "num_keep must lie in 1..6, got 7": lambda: catp_stage1(
      x, mean, num_keep=7
    ),
    "features=2, text_mean=3": lambda: catp_stage1(
      x, jnp.ones((3, 3)), num_keep=2
    ),
    "features_dim=3, text_dim=4": lambda: catp_stage1(
      x, jnp.ones((2, 4)), num_keep=2
    ),
    "hidden_tokens=6, attention=6, attention_before=5": lambda: catp_context(
      x, row, row[:, :5], mean, num_keep=2
    ),
    "hidden_dim=3, context_dim=4": lambda: catp_query(
      x, jnp.ones((2, 4)), num_keep=2
    ),
    "tokens=6, mask_tokens=5": lambda: catp_query(
      x, mean, jnp.ones((2, 5), bool), num_keep=2
    ),
  }.items():
    with pytest.raises(ValueError, match=message):
      call()

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops import merging_test
from tokjax.reduction import aim

merge = jax.jit(
  aim.aim_merge,
  static_argnames=("num_keep", "order"),
)


def features(seed=0, batch=6, n=16, dim=5):
  x = np.random.default_rng(seed).normal(size=(batch, n, dim))
  return jnp.asarray(x, jnp.float32)


def oracle_round(x, removed):
  """One published call: x in its current order, in float64."""
  unit = x / np.linalg.norm(x, axis=1, keepdims=True)
  cosine = unit[::2] @ unit[1::2].T
  best, partner = cosine.max(axis=1), cosine.argmax(axis=1)
  order = np.argsort(-best, kind="stable")
  rows = [x[::2][a] for a in order[removed:]]
  members = [[b] for b in x[1::2]]
  for a in order[:removed]:
    members[partner[a]].append(x[::2][a])
  return np.stack(rows + [np.mean(m, axis=0) for m in members])


def test_worked_example():
  x = jnp.array([[[1, 0], [0.9, 0.1], [0, 1], [0.6, 0.8]]], jnp.float32)
  one = merge(x, num_keep=3)
  np.testing.assert_allclose(
    one.tokens[0], [[0, 1], [0.95, 0.05], [0.6, 0.8]], atol=1e-6
  )
  assert one.index[0].tolist() == [2, 1, 3]
  two = merge(x, num_keep=2)
  np.testing.assert_allclose(
    two.tokens[0], [[0.95, 0.05], [0.3, 0.9]], atol=1e-6
  )


def test_rounds():
  assert aim.merge_rounds(196, 49) == (98, 49)
  assert aim.merge_rounds(576, 72) == (288, 144, 72)
  assert aim.merge_rounds(196, 74) == (98, 24)
  assert aim.merge_rounds(9, 9) == ()
  assert aim.merge_rounds(9, 1) == (4, 2, 1, 1)


@pytest.mark.parametrize("num_keep", [11, 8, 3, 1])
def test_equals_the_published_rounds(num_keep):
  x = features()
  out = jax.jit(aim.aim_merge, static_argnames="num_keep")(x, num_keep=num_keep)
  for b in range(len(x)):
    want = np.asarray(x[b], np.float64)
    for removed in aim.merge_rounds(16, num_keep):
      want = oracle_round(want, removed)
    np.testing.assert_allclose(out.tokens[b], want, atol=1e-5)
    assert out.size[b].sum() == 16
  assert out.mask.all()
  np.testing.assert_allclose(out.plan.weight.sum(axis=1), num_keep, rtol=1e-5)


@pytest.mark.parametrize("num_keep", [1, 3, 6, merging_test.N])
def test_random_cases_equal_rounds_by_loops(num_keep):
  x, mask, *_ = merging_test.cases(num_keep, count=270)
  out = jax.device_get(
    merge(np.where(mask[..., None], x, np.nan), mask, num_keep=num_keep)
  )
  checked = 0
  for b in range(len(x)):
    index = np.flatnonzero(mask[b]).tolist()
    tokens, left = x[b, index].astype(np.float64), merging_test.N
    try:
      for removed in aim.merge_rounds(left, num_keep):
        outputs, groups = merging_test.oracle_match(
          np.concatenate([tokens, np.zeros((left - len(tokens), 4))]),
          np.arange(left) < len(tokens),
          removed,
          class_token=False,
          distill_token=False,
          every=2,
          order="similarity",
        )
        tokens = np.array([tokens[g].mean(axis=0) for g in groups])
        tokens, left = tokens.reshape(-1, 4), left - removed
        index = [index[n] for n in outputs]
    except merging_test.NearTie:
      continue
    checked += 1
    assert out.index[b][out.mask[b]].tolist() == index
    np.testing.assert_allclose(out.tokens[b][out.mask[b]], tokens, atol=1e-5)
    assert out.size[b].sum() == mask[b].sum()
  assert checked > 135


def test_raster_order_merges_the_same_in_the_first_round():
  x = features()
  plain = merge(x, num_keep=9)
  raster = merge(x, num_keep=9, order="raster")
  assert (jnp.diff(raster.index, axis=1) > 0).all()
  np.testing.assert_array_equal(jnp.sort(plain.index), raster.index)
  np.testing.assert_allclose(
    jnp.sort(plain.tokens, axis=1), jnp.sort(raster.tokens, axis=1), atol=1e-6
  )


def test_few_valid_tokens_stay_and_many_merge_as_if_alone():
  x = features(batch=4)
  mask = np.ones((4, 16), bool)
  mask[0, 5:] = mask[1, ::2] = mask[2, 12:] = False
  poisoned = jnp.where(mask[..., None], x, jnp.nan)
  out = merge(poisoned, mask, num_keep=8)
  for b, valid in ((0, 5), (1, 8)):
    places = np.flatnonzero(mask[b])
    assert out.index[b, :valid].tolist() == places.tolist()
    np.testing.assert_allclose(out.tokens[b, :valid], x[b, places], atol=1e-6)
    assert out.mask[b].sum() == valid
  alone = merge(x[2:3, :12], num_keep=8)
  np.testing.assert_allclose(out.tokens[2], alone.tokens[0], atol=1e-6)
  same = merge(poisoned, mask, num_keep=16)
  assert same.mask.sum() == mask.sum() and np.isfinite(same.tokens).all()


def test_merging_passes_the_gradient_of_the_means():
  x = features(batch=1)
  gradient = jax.grad(lambda x: jnp.sum(merge(x, num_keep=4).tokens))(x)
  out = merge(x, num_keep=4)
  np.testing.assert_allclose(gradient[0, :, 0], out.plan.weight[0], atol=1e-6)


LOGITS = np.array(
  [[0.2, 9, 9, 9], [0.1, 0.3, 9, 9], [0, 0.2, 0.1, 9], [0.3, 0.1, 0.2, 0]]
)


def from_logits(logits):
  """Queries and keys of one head whose products are the logits."""
  q = jnp.asarray(logits, jnp.float32)[None, None]
  return q, jnp.eye(logits.shape[1])[None, None]


def test_pagerank_worked_example():
  q, k = from_logits(LOGITS)
  # The votes of the last row alone are row 3 of the map.
  last = np.exp(LOGITS[3] / 0.1) / np.exp(LOGITS[3] / 0.1).sum()
  want = [0.643914, 0.087144, 0.236883, 0.032059]
  np.testing.assert_allclose(last, want, atol=1e-6)
  one = aim.pagerank_importance(q, k, num_iterations=1, scale=1.0)
  want = [0.463287, 0.408296, 0.120403, 0.008015]
  np.testing.assert_allclose(one[0], want, atol=1e-5)
  five = aim.pagerank_importance(q, k, scale=1.0)
  want = [0.676586, 0.322950, 0.000464, 0.0]
  np.testing.assert_allclose(five[0], want, atol=1e-5)


def dense_pagerank(q, k, mask, temperature, steps, damping, causal, ghosts):
  q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
  k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
  n = q.shape[2]
  out = np.zeros((len(q), n))
  for b in range(len(q)):
    votes = np.ones(n) if ghosts else mask[b].astype(float)
    votes /= votes.sum()
    for h in range(q.shape[1]):
      logits = q[b, h] @ k[b, h].T / np.sqrt(q.shape[-1]) / temperature
      seen = mask[b][None, :] & (np.tri(n, dtype=bool) if causal else True)
      highest = np.where(seen, logits, -np.inf).max(axis=1, keepdims=True)
      weights = np.where(seen, np.exp(np.where(seen, logits - highest, 0)), 0)
      total = weights.sum(axis=1, keepdims=True)
      weights = weights / np.where(total > 0, total, 1)
      d = votes
      for _ in range(steps):
        d = (1 - damping) * (d @ weights) + damping * votes
        d = np.where(mask[b], d, 0)
      out[b] += d**2 / q.shape[1]
  return np.sqrt(out)


@pytest.mark.parametrize(
  "causal, damping, ghosts",
  [(True, 0.0, False), (False, 0.15, False), (True, 0.0, True)],
)
def test_pagerank_equals_the_dense_map(causal, damping, ghosts):
  random = np.random.default_rng(0)
  q = random.normal(size=(335, 4, 12, 6))
  k = random.normal(size=(335, 2, 12, 6))
  mask = random.random((335, 12)) < 0.8
  mask[:, 0] = mask[0] = True
  inputs = [jnp.asarray(a, jnp.float32) for a in (q, k)]
  if not ghosts:
    inputs = [jnp.where(mask[:, None, :, None], a, jnp.nan) for a in inputs]
  got = aim.pagerank_importance(
    *inputs,
    jnp.asarray(mask),
    temperature=0.5,
    damping=damping,
    causal=causal,
    ghost_rows=ghosts,
  )
  want = dense_pagerank(q, k, mask, 0.5, 5, damping, causal, ghosts)
  np.testing.assert_allclose(got, want, atol=2e-5)
  assert not np.any(np.asarray(got)[~mask])


def test_pagerank_of_one_head_is_a_distribution():
  q, k = features(1, n=10)[:, None], features(2, n=10)[:, None]
  got = aim.pagerank_importance(q[:, :, :10], k[:, :, :10])
  np.testing.assert_allclose(got.sum(axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("num_keep", [1, 8, 12])
def test_prune_keeps_text_and_the_most_important(num_keep):
  random = np.random.default_rng(0)
  x = features(batch=340, n=12)
  importance = random.random((340, 12)).astype(np.float32)
  importance[::2] = np.round(importance[::2] * 4)  # ties
  mask = random.random((340, 12)) < 0.8
  mask[1] = False
  text = np.zeros((340, 12), bool)
  text[:, :2] = text[:, -3:] = True
  out = jax.jit(aim.aim_prune, static_argnames="num_keep")(
    x, importance, text, mask, num_keep=num_keep
  )
  for b in range(340):
    must = np.flatnonzero(text[b] & mask[b])
    may = np.flatnonzero(~text[b] & mask[b])
    may = may[np.argsort(-importance[b, may], kind="stable")]
    want = sorted([*must, *may][:num_keep])
    assert out.index[b, : len(want)].tolist() == want
    assert out.mask[b].sum() == len(want)
    assert out.position_ids[b].tolist() == out.index[b].tolist()


@pytest.mark.unchecked
def test_errors():
  x = features()
  with pytest.raises(ValueError, match="num_keep must lie in 1..16, got 17"):
    aim.aim_merge(x, num_keep=17)
  with pytest.raises(ValueError, match="order must be one of 'similarity'"):
    aim.aim_merge(x, num_keep=4, order="ascending")
  with pytest.raises(ValueError, match="features=16, mask=3"):
    aim.aim_merge(x, jnp.ones((6, 3), bool), num_keep=4)
  q = x[:, None]
  with pytest.raises(ValueError, match="queries=16, keys=15, mask=16"):
    aim.pagerank_importance(q, q[:, :, 1:])
  with pytest.raises(ValueError, match="damping must lie in 0..1, got 2"):
    aim.pagerank_importance(q, q, damping=2)
  with pytest.raises(ValueError, match="num_iterations must lie in 1.*, got 0"):
    aim.pagerank_importance(q, q, num_iterations=0)
  text = jnp.zeros((6, 16), bool)
  with pytest.raises(ValueError, match="hidden=16, importance=5, protected"):
    aim.aim_prune(x, jnp.ones((6, 5)), text, num_keep=4)

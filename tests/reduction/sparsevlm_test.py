import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import run
from tests.ops import density_peaks_test
from tokjax.ops import budgets
from tokjax.reduction import sparsevlm, sparsevlm_scores

N = 14


def cases(seed, number=260):
  random = np.random.default_rng(seed)
  x = random.normal(size=(number, N, 4)).astype(np.float32)
  scores = random.integers(0, 9, (number, N)).astype(np.float32)  # with ties
  mask = random.random((number, N)) < random.uniform(0.3, 1.4, (number, 1))
  mask[0], mask[1] = False, True
  return x, scores, mask


def oracle(x, scores, mask, num_keep, ratio, per_center):
  """Kept positions, candidates, peaks (places among them), owners, gap."""
  order = [n for n in range(N) if mask[n]]
  order.sort(key=lambda n: (-scores[n], n))
  kept, dropped = sorted(order[:num_keep]), order[num_keep:]
  candidates = sorted(dropped[: int(ratio * (N - num_keep)) + 1])
  number = min(int(ratio * (N - num_keep)) + 1, N - num_keep)
  number = min(number // per_center + 1, number)
  if not candidates:
    return kept, [], [], {}, np.inf
  return kept, candidates, *_peaks(x[candidates], number)


def _peaks(x, number):
  everything = np.ones(len(x), bool)
  centers, owner, _, gap = density_peaks_test.oracle(
    x, everything, number, number
  )
  return centers, owner, gap


@pytest.mark.parametrize("num_keep", [1, 5, N - 1, N])
def test_equals_the_oracle(num_keep):
  x, scores, mask = cases(num_keep)
  method = jax.jit(
    functools.partial(
      sparsevlm.sparsevlm,
      num_keep=num_keep,
      recycle_ratio=0.7,
      tokens_per_center=2,
    )
  )
  hidden = mask[..., None]
  found = jax.device_get(
    method(np.where(hidden, x, np.nan), np.where(mask, scores, np.nan), mask)
  )
  peaks_checked = 0
  for b in range(len(x)):
    kept, candidates, centers, owner, gap = oracle(
      x[b], scores[b], mask[b], num_keep, 0.7, 2
    )
    live = found.mask[b]
    assert found.index[b, :num_keep][live[:num_keep]].tolist() == kept
    np.testing.assert_array_equal(
      found.tokens[b, : len(kept)], x[b, kept].reshape(-1, 4)
    )
    assert (found.size[b, : len(kept)] == 1).all()
    assert live[num_keep:].sum() == len(centers)
    assert found.size[b].sum() == len(kept) + len(candidates)
    assert not found.tokens[b][~live].any()
    assert (found.index[b][~live] == N - 1).all()
    if gap < 1e-5:
      continue
    for k, center in enumerate(centers):
      members = [candidates[i] for i, c in owner.items() if c == k]
      row = num_keep + k
      peaks_checked += 1
      assert found.index[b, row] == candidates[center]
      assert found.size[b, row] == len(members)
      np.testing.assert_allclose(
        found.tokens[b, row], x[b, members].mean(axis=0), atol=1e-6
      )
  assert peaks_checked > (30 if num_keep < N else -1)


def test_worked_example():
  x = jnp.array([[[0.0], [1.0], [9.0], [2.0], [8.0]]])
  scores = jnp.array([[0.5, 0.2, 0.1, 0.15, 0.05]])
  out = run(
    sparsevlm.sparsevlm,
    x,
    scores,
    num_keep=1,
    recycle_ratio=0.75,
    tokens_per_center=4,
  )
  # Three of four others plus one, in two clusters: {1, 2} and {9, 8}.
  assert out.mask.all() and out.index[0, 0] == 0
  assert out.tokens[0, :, 0].tolist() == [0.0, 1.5, 8.5]
  assert out.size.tolist() == [[1.0, 2.0, 2.0]]
  renumbered = run(
    sparsevlm.sparsevlm, x, scores, num_keep=1, positions="renumber"
  )
  assert renumbered.position_ids.tolist() == [[0, 1]]


def test_without_recycling_and_without_reduction():
  x, scores, mask = cases(3, 4)
  out = run(sparsevlm.sparsevlm, x, scores, num_keep=5, recycle=False)
  assert out.tokens.shape == (4, 5, 4) and out.mask.all()
  for b in range(4):
    best = sorted(sorted(range(N), key=lambda n: (-scores[b, n], n))[:5])
    assert out.index[b].tolist() == best
  every = run(sparsevlm.sparsevlm, x, scores, num_keep=N)
  np.testing.assert_array_equal(every.tokens, x)
  few = run(
    sparsevlm.sparsevlm,
    x[:1],
    scores[:1],
    jnp.arange(N)[None] % 7 == 0,
    num_keep=5,
  )
  assert few.index[few.mask].tolist() == [0, 7]


def test_gradients_reach_kept_tokens_and_members_of_means():
  x, scores, _ = cases(4, 2)

  def total(x, scores):
    out = run(
      sparsevlm.sparsevlm,
      x,
      scores,
      num_keep=4,
      recycle_ratio=0.5,
      tokens_per_center=3,
    )
    return jnp.sum(out.tokens)

  by_x, by_scores = jax.grad(total, (0, 1))(jnp.asarray(x), jnp.asarray(scores))
  assert not np.asarray(by_scores).any()
  by_x = np.asarray(by_x[..., 0])
  assert ((by_x == 1).sum(axis=1) >= 4).all()
  assert ((by_x > 0).sum(axis=1) == 4 + 6).all()
  np.testing.assert_allclose(by_x.sum(axis=1), 4 + 3, rtol=1e-6)


def test_budgets_of_the_variants():
  plus = sparsevlm.VARIANTS["plus"]
  assert plus.budgets[192] == (300, 200, 118) and not plus.recycle
  for average, want in ((192, 192.4375), (128, 128.0), (64, 64.4375)):
    plan = sparsevlm.sparse_vlm_plan(average, variant="plus", delay=0)
    assert budgets.average_tokens(plan, 32) == want
  first = sparsevlm.sparse_vlm_plan(192)
  # 276 dropped, 83 clustered, 9 means; 109 dropped, 33 clustered, 4 means.
  assert first == ((0, 576), (3, 309), (7, 204), (16, 113))
  assert sparsevlm.num_recycled(576, 576) == 0
  assert sparsevlm.num_recycled(5, 4) == 1
  assert set(sparsevlm.VARIANTS["v1.5"].budgets) == {192, 128, 96, 64}
  assert isinstance(plus, sparsevlm.Variant)


def test_raters_equal_a_loop():
  random = np.random.default_rng(5)
  visual = random.normal(size=(80, 6, 3)).astype(np.float32)
  text = random.normal(size=(80, 5, 3)).astype(np.float32)
  seen = random.random((80, 6)) < 0.7
  said = random.random((80, 5)) < 0.7
  seen[:, 0], said[:, 0] = True, True
  said[0] = False
  got = run(
    sparsevlm_scores.select_raters,
    np.where(seen[..., None], visual, np.nan),
    np.where(said[..., None], text, np.nan),
    jnp.asarray(seen),
    jnp.asarray(said),
  )
  several = 0
  for g, v, t, vm, tm in zip(
    np.asarray(got), visual, text, seen, said, strict=True
  ):
    v, t = v[vm].astype(np.float64), t[tm].astype(np.float64)
    power = np.exp(v @ t.T)
    value = np.zeros(5)
    if tm.any():
      value[tm] = (power / power.sum(axis=1, keepdims=True)).mean(axis=0)
    want = tm & (value > value[tm].mean()) if tm.sum() > 1 else tm
    np.testing.assert_array_equal(g, want)
    several += tm.sum() > 1
  assert several > 50


def attention(seed, heads=4, key_heads=2, rows=3, size=9, dim=6):
  random = np.random.default_rng(seed)
  q = random.normal(size=(5, heads, rows, dim)).astype(np.float32)
  k = random.normal(size=(5, key_heads, size, dim)).astype(np.float32)
  raters = random.random((5, rows)) < 0.6
  raters[0], raters[1:, -1] = False, True
  mask = np.ones((5, size), bool)
  mask[2, :2] = False
  return q, k, raters, mask


def dense(q, k, mask):
  """Causal probabilities [H, T, S] of one example, rows at the end."""
  heads, rows, dim = q.shape
  size = k.shape[1]
  p = np.zeros((heads, rows, size))
  for h in range(heads):
    for i in range(rows):
      seen = [j for j in range(size - rows + i + 1) if mask[j]]
      key = k[h // (heads // len(k))].astype(np.float64)
      power = np.exp([q[h, i] @ key[j] / np.sqrt(dim) for j in seen])
      p[h, i, seen] = power / power.sum()
  return p


def test_rater_scores_equal_the_dense_map():
  q, k, raters, mask = attention(6)
  got = run(
    sparsevlm_scores.rater_scores,
    q,
    np.where(mask[:, None, :, None], k, np.nan),
    jnp.asarray(raters),
    jnp.asarray(mask),
    first_visual=1,
    num_visual=4,
  )
  assert not np.asarray(got[0]).any()
  for b in range(1, 5):
    p = dense(q[b], k[b], mask[b])[:, raters[b], 1:5]
    np.testing.assert_allclose(got[b], p.mean(axis=(0, 1)), atol=1e-6)


def rope_of_ones(position, dim, base):
  """A vector of ones, turned as rotary embeddings do it (halves)."""
  half = dim // 2
  out = np.ones(dim)
  for m in range(half):
    angle = position * base ** (-2 * m / dim)
    out[m] = np.cos(angle) - np.sin(angle)
    out[m + half] = np.sin(angle) + np.cos(angle)
  return out


def test_corrected_scores_divide_by_what_ones_would_get():
  q, k, raters, mask = attention(7)
  places = np.array([0, 1, 3, 4, 8, 9, 10, 11, 12])
  got = run(
    sparsevlm_scores.corrected_scores,
    q,
    np.where(mask[:, None, :, None], k, np.nan),
    jnp.asarray(raters),
    jnp.asarray(mask),
    jnp.asarray(np.tile(places, (5, 1))),
    first_visual=1,
    num_visual=4,
    num_heads=2,
    rope_base=100.0,
  )
  ones = np.stack([rope_of_ones(p, 6, 100.0) for p in places])
  assert not np.asarray(got[0]).any()
  for b in range(1, 5):
    p = dense(q[b], k[b], mask[b])[:, raters[b]]
    g = dense(ones[None, -3:], ones[None], mask[b])[0, raters[b]]
    heads = np.argsort(-p[:, :, 1:5].sum(axis=(1, 2)))[:2]
    ratio = p[heads] / np.where(g > 0, g, 1)
    np.testing.assert_allclose(
      got[b], ratio.mean(axis=(0, 1))[1:5], rtol=1e-4, atol=1e-6
    )
  without = run(
    sparsevlm_scores.corrected_scores,
    q,
    k,
    jnp.asarray(raters),
    first_visual=1,
    num_visual=4,
    num_heads=2,
  )
  counted = run(
    sparsevlm_scores.corrected_scores,
    q,
    k,
    jnp.asarray(raters),
    jnp.ones((5, 9), bool),
    jnp.tile(jnp.arange(9), (5, 1)),
    first_visual=1,
    num_visual=4,
    num_heads=2,
  )
  np.testing.assert_allclose(without, counted, rtol=1e-6)


@pytest.mark.unchecked
def test_errors():
  x, scores = jnp.ones((2, 6, 3)), jnp.ones((2, 6))
  with pytest.raises(ValueError, match="num_keep must lie in 1..6, got 0"):
    sparsevlm.sparsevlm(x, scores, num_keep=0)
  with pytest.raises(ValueError, match="features_tokens=6, scores_tokens=5"):
    sparsevlm.sparsevlm(x, scores[:, :5], num_keep=2)
  with pytest.raises(ValueError, match="features_tokens=6, mask_tokens=5"):
    sparsevlm.sparsevlm(x, scores, jnp.ones((2, 5), bool), num_keep=2)
  with pytest.raises(ValueError, match="average must be one of 192, 128, 64"):
    sparsevlm.sparse_vlm_plan(96, variant="plus")
  with pytest.raises(ValueError, match="recycle_ratio must lie in 0..1"):
    sparsevlm.num_recycled(10, 5, recycle_ratio=3)
  with pytest.raises(ValueError, match="visual_dim=3, text_dim=2"):
    sparsevlm_scores.select_raters(x, x[:, :, :2])
  q, k = jnp.ones((1, 2, 3, 4)), jnp.ones((1, 2, 8, 4))
  raters = jnp.ones((1, 3), bool)
  with pytest.raises(ValueError, match="first_visual must lie in 0..2, got 3"):
    sparsevlm_scores.rater_scores(q, k, raters, first_visual=3, num_visual=6)
  with pytest.raises(ValueError, match="num_heads must lie in 1..2, got 14"):
    sparsevlm_scores.corrected_scores(
      q, k, raters, first_visual=0, num_visual=6
    )

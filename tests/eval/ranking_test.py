import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import compiled
from tokjax.eval import agreement, ranking

ranking = compiled(ranking)


def example(seed=0, num_queries=7, num_ranks=9, num_ideal=12):
  draw = np.random.default_rng(seed)
  ideal = -np.sort(-draw.integers(0, 4, (num_queries, num_ideal)), axis=1)
  ideal[0] = 0  # a query without relevant documents
  ranked = np.zeros((num_queries, num_ranks))
  for row in range(num_queries):
    ranked[row] = draw.permutation(ideal[row])[:num_ranks]
  where = draw.random((num_queries, num_ranks)) < 0.8
  return ranked.astype(np.float32), ideal.astype(np.float32), where


def by_hand(name, grades, ideal, k):
  """One query; grades of what is not returned are 0."""
  grades, total = list(grades), sum(g > 0 for g in ideal)
  top = grades[:k]
  if name == "precision":
    return sum(g > 0 for g in top) / k
  if name == "success":
    return float(any(g > 0 for g in top))
  if total == 0:
    return 0.0
  if name == "ndcg":
    gain = sum(g / np.log2(r + 2) for r, g in enumerate(top))
    return gain / sum(g / np.log2(r + 2) for r, g in enumerate(ideal[:k]))
  if name == "recall":
    return sum(g > 0 for g in top) / total
  if name == "capped":
    return sum(g > 0 for g in top) / min(total, k)
  if name == "reciprocal_rank":
    return next((1 / (r + 1) for r, g in enumerate(top) if g > 0), 0.0)
  hits = [sum(g > 0 for g in top[: r + 1]) / (r + 1)
          for r, g in enumerate(top) if g > 0]  # fmt: skip
  return sum(hits) / total


def compute(name, ranked, ideal, where, k):
  relevant = jnp.asarray((ideal > 0).sum(axis=1))
  if name == "ndcg":
    return ranking.ndcg(ranked, ideal, where, k=k)
  if name == "capped":
    return ranking.recall(ranked, relevant, where, k=k, capped=True)
  if name in ("recall", "average_precision"):
    return getattr(ranking, name)(ranked, relevant, where, k=k)
  return getattr(ranking, name)(ranked, where, k=k)


NAMES = ["ndcg", "recall", "capped", "precision", "success",
         "reciprocal_rank", "average_precision"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", [1, 5, 20])
def test_equals_a_loop_and_ignores_what_was_not_returned(name, k):
  ranked, ideal, where = example()
  want = [
    by_hand(name, np.where(w, r, 0), i, k)
    for r, i, w in zip(ranked, ideal, where, strict=True)
  ]
  poisoned = jnp.asarray(np.where(where, ranked, np.nan))
  got = compute(name, poisoned, jnp.asarray(ideal), jnp.asarray(where), k)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


def test_ndcg_with_linear_gain_by_pencil():
  # 2 / log2(4) + 1 / log2(2) = 2.0 over 2 + 1 / log2(3) + 1 / 2 = 3.1309
  ranked, ideal = jnp.array([[1.0, 0.0, 2.0]]), jnp.array([[2.0, 1.0, 1.0]])
  np.testing.assert_allclose(ranking.ndcg(ranked, ideal, k=3), 0.63879, 1e-4)


def test_negative_grades_count_as_zero():
  ideal = jnp.array([[1.0]])
  one = ranking.ndcg(jnp.array([[-2.0, 1.0]]), ideal, k=2)
  np.testing.assert_allclose(one, 1 / np.log2(3), rtol=1e-6)


@pytest.mark.unchecked
def test_errors():
  ranked = jnp.zeros((2, 3))
  with pytest.raises(ValueError, match="k must be at least 1, got 0"):
    ranking.precision(ranked, k=0)
  with pytest.raises(ValueError, match="_ranks=3, where_ranks=4"):
    ranking.success(ranked, jnp.ones((2, 4), bool), k=1)
  with pytest.raises(ValueError, match="_queries=2, ideal_relevance_queries=1"):
    ranking.ndcg(ranked, jnp.zeros((1, 3)), k=1)
  with pytest.raises(ValueError, match="exact must hold at least one"):
    agreement.overlap(jnp.zeros((2, 3), int), jnp.zeros((2, 0), int))


def test_overlap_and_top_one_equal_sets():
  draw = np.random.default_rng(0)
  exact = np.stack([draw.permutation(30)[:8] for _ in range(6)])
  found = np.stack([draw.permutation(30)[:12] for _ in range(6)])
  where = draw.random(found.shape) < 0.7
  want = [
    len(set(f[w]) & set(e)) / 8
    for f, w, e in zip(found, where, exact, strict=True)
  ]
  got = agreement.overlap(*map(jnp.asarray, (found, exact, where)))
  np.testing.assert_allclose(got, want, rtol=1e-6)
  got = agreement.top_one_recall(*map(jnp.asarray, (found, exact, where)))
  want = [e[0] in f[w] for f, w, e in zip(found, where, exact, strict=True)]
  np.testing.assert_array_equal(got, np.float32(want))


def test_spearman_equals_scipy_with_ties():
  from scipy import stats

  draw = np.random.default_rng(1)
  one = draw.integers(0, 6, (5, 20)).astype(np.float32)
  two = one + draw.integers(0, 4, (5, 20)).astype(np.float32)
  want = [
    stats.spearmanr(a, b).statistic for a, b in zip(one, two, strict=True)
  ]
  got = agreement.spearman(jnp.asarray(one), jnp.asarray(two))
  np.testing.assert_allclose(got, want, rtol=1e-5)
  constant = agreement.spearman(jnp.ones((1, 3)), jnp.arange(3.0)[None])
  np.testing.assert_array_equal(constant, [0.0])

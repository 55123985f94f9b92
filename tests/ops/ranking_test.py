import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import compiled, run
from tokjax.ops import ranking

ranking = compiled(ranking)


def cases(seed, number=300, size=9):
  random = np.random.default_rng(seed)
  scores = random.integers(-3, 4, (number, size)).astype(np.float32)
  scores[::7, 2] = -np.inf
  mask = random.random((number, size)) < 0.7
  return scores, mask, random.integers(-1, size + 2, number).astype(np.int32)


def order_of(scores, mask):
  """Valid ones by falling score, then the rest; both by position."""
  valid = [n for n in range(len(scores)) if mask[n]]
  valid.sort(key=lambda n: (-scores[n], n))
  return valid + [n for n in range(len(scores)) if not mask[n]]


def test_ranks_equal_a_sort_in_python():
  scores, mask, _ = cases(0)
  poisoned = np.where(mask, scores, np.nan)
  got = np.asarray(jax.jit(ranking.ranks)(poisoned, mask))
  for g, s, m in zip(got, scores, mask, strict=True):
    np.testing.assert_array_equal(np.argsort(g), order_of(s, m))
  everything = np.asarray(run(ranking.ranks, scores))
  for g, s in zip(everything, scores, strict=True):
    np.testing.assert_array_equal(np.argsort(g), order_of(s, s == s))


def test_keep_best_equals_a_sort_in_python():
  scores, mask, count = cases(1)
  got = jax.jit(ranking.keep_best)(np.where(mask, scores, np.nan), count, mask)
  for g, s, m, c in zip(np.asarray(got), scores, mask, count, strict=True):
    want = set(order_of(s, m)[: min(max(c, 0), m.sum())])
    assert set(np.flatnonzero(g)) == want


def test_no_gradient():
  gradient = jax.grad(
    lambda s: jnp.sum(s * ranking.keep_best(s, jnp.array(2)))
  )(jnp.array([3.0, 1.0, 2.0]))
  np.testing.assert_array_equal(gradient, [1, 0, 1])


@pytest.mark.unchecked
def test_errors():
  with pytest.raises(ValueError, match="scores=4, mask=3"):
    ranking.ranks(jnp.ones(4), jnp.ones(3, bool))

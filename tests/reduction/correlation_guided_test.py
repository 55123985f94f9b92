import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import compiled, run
from tokjax.ops import budgets
from tokjax.reduction import correlation_guided as guided
from tokjax.reduction import correlation_scores as scores

guided = compiled(guided)
scores = compiled(scores)


N = 16


def pages(seed, number=200):
  """Sub-images with groups of nearly equal keys, masks and attention."""
  random = np.random.default_rng(seed)
  group = random.integers(0, 6, (number, N))
  directions = random.normal(size=(number, 6, 5))
  keys = np.take_along_axis(directions, group[..., None], axis=1)
  keys += random.normal(size=keys.shape) * 0.2
  keys *= random.uniform(0.5, 2, (number, N, 1))
  low = random.dirichlet(np.ones(N), number)
  high = random.dirichlet(np.full(N, 0.3), number)
  low[2::3] = np.ceil(low[2::3] * 16) / 16  # ties
  mask = random.random((number, N)) < random.uniform(0.3, 1.3, (number, 1))
  mask[0], mask[1] = False, True
  x = random.normal(size=(number, N, 3))
  floats = [a.astype(np.float32) for a in (x, keys, low, high)]
  return *floats, mask


def unit(keys):
  keys = keys.astype(np.float64)
  return keys / np.linalg.norm(keys, axis=1, keepdims=True)


def density_of(keys, mask, threshold, min_similar):
  valid = np.flatnonzero(mask)
  if not len(valid):
    return 0.0, np.inf
  u = unit(keys)
  redundant, gap = 0, np.inf
  for i in valid:
    alike = 0
    for j in valid:
      if i != j:
        gap = min(gap, abs(u[i] @ u[j] - threshold))
        alike += u[i] @ u[j] > threshold
    redundant += alike >= min_similar
  return 1 - redundant / len(valid), gap


@pytest.mark.parametrize("block_size", [1, 5, 128])
def test_density_equals_a_loop(block_size):
  _, keys, _, _, mask = pages(0)
  got = run(
    scores.information_density,
    np.where(mask[..., None], keys, np.nan),
    jnp.asarray(mask),
    min_similar=2,
    block_size=block_size,
  )
  checked = 0
  for g, k, m in zip(np.asarray(got), keys, mask, strict=True):
    want, gap = density_of(k, m, 0.9, 2)
    if gap > 1e-5:
      checked += 1
      assert abs(g - want) < 1e-6
  assert checked > 190


def test_density_of_simple_crops():
  blank = jnp.ones((12, 4))
  assert float(run(scores.information_density, blank)) == 0
  assert float(run(scores.information_density, jnp.eye(12))) == 1
  half = jnp.concatenate([jnp.tile(jnp.eye(4)[:1], (3, 1)), jnp.eye(4)[1:]])
  assert float(run(scores.information_density, half, min_similar=1)) == 0.5
  stretched = half * jnp.arange(1.0, 7.0)[:, None]
  assert float(run(scores.information_density, stretched, min_similar=1)) == 0.5
  # A token does not resemble itself, and a zero key resembles none.
  assert float(run(scores.information_density, half, min_similar=3)) == 1
  zero = jnp.zeros((5, 3))
  assert float(run(scores.information_density, zero, min_similar=1)) == 1


def test_single_draws_follow_the_probabilities():
  p = np.array([0.5, 0.0, 0.2, 0.05, 0.25], np.float32)
  number = 4000
  drawn = run(
    scores.sample_tokens,
    jnp.tile(p, (number, 1)),
    jnp.ones(number, jnp.int32),
    key=jax.random.key(0),
  )
  count = np.asarray(drawn).sum(axis=0)
  assert count.sum() == number and count[1] == 0
  want = p * number
  chi = ((count - want)[p > 0] ** 2 / want[p > 0]).sum()
  assert chi < 16.3  # three degrees of freedom, one in a thousand


def test_pairs_are_drawn_one_after_the_other():
  p = np.array([0.6, 0.3, 0.1], np.float32)
  number = 4000
  drawn = np.asarray(
    run(
      scores.sample_tokens,
      jnp.tile(7 * p, (number, 1)),  # the sum does not matter
      jnp.full(number, 2),
      key=jax.random.key(1),
    )
  )
  assert (drawn.sum(axis=1) == 2).all()
  missing = number - drawn.sum(axis=0)  # a pair is known by who is not in it
  want = [
    p[i] * p[j] / (1 - p[i]) + p[i] * p[j] / (1 - p[j])
    for i, j in ((1, 2), (0, 2), (0, 1))
  ]
  want = np.multiply(want, number)
  chi = ((missing - want) ** 2 / want).sum()
  assert chi < 13.8  # two degrees of freedom, one in a thousand


def test_sampling_takes_all_or_the_most_probable():
  p = jnp.array([[0.1, 0.0, 0.6, 0.3]])
  mask = jnp.array([[True, True, True, False]])
  for seed in (None, 0):
    keys = [None, None]
    if seed is not None:
      keys = jax.random.split(jax.random.key(seed))
    every = run(scores.sample_tokens, p, jnp.array([4]), mask, keys[0])
    np.testing.assert_array_equal(every, mask)
    none = run(scores.sample_tokens, p, jnp.array([0]), mask, keys[1])
    assert not none.any()
  best = run(scores.sample_tokens, p, jnp.array([2]))
  assert best.tolist() == [[False, False, True, True]]
  cold = run(
    scores.sample_tokens,
    jnp.tile(p, (50, 1)),
    jnp.full(50, 2),
    key=jax.random.key(2),
    temperature=1e-3,
  )
  np.testing.assert_array_equal(cold, jnp.tile(best, (50, 1)))
  one = run(scores.sample_tokens, p[0], jnp.array(2), key=jax.random.key(3))
  assert int(one.sum()) == 2


def oracle(keys, low, high, mask, num_keep):
  """Kept positions and the closest decision, without a key."""
  valid = np.flatnonzero(mask)
  density, gap = density_of(keys, mask, 0.9, 2)
  number = round(density * len(valid))
  local = sorted(valid, key=lambda n: (-low[n], n))[:number]
  outlier = []
  if len(valid):
    first, third = np.percentile(high[valid].astype(np.float64), [25, 75])
    bound = third + 1.5 * (third - first)
    outlier = [n for n in valid if high[n] > bound]
    gap = min(gap, min(abs(high[n] - bound) for n in valid))
  order = sorted(
    set(local) | set(outlier), key=lambda n: (n not in outlier, -low[n], n)
  )
  return sorted(order[:num_keep]), outlier, gap


@pytest.mark.parametrize("num_keep", [1, 4, N])
@pytest.mark.parametrize("aggregation", ["none", "nearest_mean"])
def test_method_equals_the_oracle(num_keep, aggregation):
  x, keys, low, high, mask = pages(num_keep)
  hidden = mask[..., None]
  method = jax.jit(
    functools.partial(
      guided.correlation_guided,
      num_keep=num_keep,
      min_similar=2,
      aggregation=aggregation,
    )
  )
  out = jax.device_get(
    method(
      np.where(hidden, x, np.nan),
      np.where(hidden, keys, np.nan),
      np.where(mask, low, np.nan),
      np.where(mask, high, np.nan),
      mask,
    )
  )
  checked = 0
  for b in range(len(x)):
    kept, _, gap = oracle(keys[b], low[b], high[b], mask[b], num_keep)
    if gap < 1e-5:
      continue
    live = out.mask[b]
    assert out.index[b][live].tolist() == kept
    assert (out.index[b][~live] == N - 1).all()
    checked += 1
    if aggregation == "none" or not kept:
      want = x[b, kept].reshape(-1, 3)
    else:
      cosine = unit(keys[b]) @ unit(keys[b])[kept].T
      if num_keep > 1 and len(kept) > 1:
        best = np.sort(cosine[mask[b]], axis=1)
        if (best[:, -1] - best[:, -2]).min() < 1e-5:
          continue
      home = cosine.argmax(axis=1)
      home[kept] = np.arange(len(kept))
      home[~mask[b]] = -1
      want = [x[b, home == k].mean(axis=0) for k in range(len(kept))]
      sizes = [(home == k).sum() for k in range(len(kept))]
      assert out.size[b][live].tolist() == sizes
    np.testing.assert_allclose(out.tokens[b][live], want, atol=1e-6)
  assert checked > 180


def test_outliers_of_the_worked_example():
  high = jnp.array([[1, 1, 2, 2, 3, 3, 4, 20]]) / 36
  blank = jnp.ones((1, 8, 2))
  found = run(
    guided.correlated_tokens, blank, jnp.ones((1, 8)) / 8, high, min_similar=1
  )
  assert isinstance(found, guided.CorrelatedTokens)
  assert float(found.density[0]) == 0 and not found.local.any()
  assert np.flatnonzero(found.outlier[0]).tolist() == [7]
  # The bound is 5.5 / 36 = .1528, whatever the largest value is.
  for value, want in ((5.4, 0), (5.6, 1)):
    close = high.at[0, 7].set(value / 36)
    found = run(guided.correlated_tokens, blank, high, close, min_similar=1)
    assert int(found.outlier.sum()) == want


def test_a_page_may_have_a_fixed_total():
  _, keys, low, high, _ = pages(5, number=4)
  density = run(scores.information_density, keys, min_similar=2)
  number = budgets.allocate(density, 12, jnp.full(4, N, jnp.int32))
  found = run(
    guided.correlated_tokens,
    keys,
    low,
    high,
    num_draws=number,
    key=jax.random.key(0),
    min_similar=2,
  )
  assert int(found.local.sum()) == 12
  np.testing.assert_array_equal(found.local.sum(axis=1), number)


def test_examples_draw_on_their_own():
  _, _, low, high, _ = pages(6, number=3)
  keys = jnp.tile(jnp.eye(N), (3, 1, 1))
  number = jnp.array([4, 4, 4])
  same = jnp.tile(low[:1], (3, 1))
  found = run(
    guided.correlated_tokens,
    keys,
    same,
    high,
    num_draws=number,
    key=jax.random.key(0),
  )
  assert not (found.local[0] == found.local[1]).all()
  # Another example's attention does not change the draw.
  other = same.at[1].set(low[1])
  again = run(
    guided.correlated_tokens,
    keys,
    other,
    high,
    num_draws=number,
    key=jax.random.key(0),
  )
  np.testing.assert_array_equal(found.local[0], again.local[0])
  np.testing.assert_array_equal(found.local[2], again.local[2])


def test_gradients_reach_kept_tokens_only():
  x, keys, low, high, _ = (jnp.asarray(a) for a in pages(7, number=3))

  def total(x, keys, low, high):
    out = run(
      guided.correlation_guided, x, keys, low, high, num_keep=5, min_similar=2
    )
    return jnp.sum(out.tokens), out

  gradients, out = jax.grad(total, (0, 1, 2, 3), has_aux=True)(
    x, keys, low, high
  )
  for b in range(3):
    want = np.zeros((N, 3))
    want[np.asarray(out.index[b])[np.asarray(out.mask[b])]] = 1
    np.testing.assert_array_equal(gradients[0][b], want)
  assert not any(np.asarray(g).any() for g in gradients[1:])


def test_pool_groups():
  pooled = scores.pool_groups(
    jnp.array([[1.0, 4.0, 2.0, 3.0, 0.0, 9.0]]), group_size=3
  )
  assert pooled.tolist() == [[4.0, 9.0]]


@pytest.mark.unchecked
def test_errors():
  x, low = jnp.ones((2, 6, 3)), jnp.ones((2, 6))
  with pytest.raises(ValueError, match="num_keep must lie in 1..6, got 7"):
    guided.correlation_guided(x, x, low, low, num_keep=7)
  with pytest.raises(ValueError, match="features_tokens=6, keys_tokens=5"):
    guided.correlation_guided(x, x[:, :5], low, low, num_keep=3)
  with pytest.raises(ValueError, match="low_attention=5"):
    guided.correlated_tokens(x, low[:, :5], low)
  with pytest.raises(ValueError, match="aggregation must be one of"):
    guided.correlation_guided(x, x, low, low, num_keep=3, aggregation="sum")
  with pytest.raises(ValueError, match="min_similar must lie in 1..inf"):
    scores.information_density(x, min_similar=0)
  with pytest.raises(ValueError, match="keys_tokens=6, mask_tokens=5"):
    scores.information_density(x, jnp.ones((2, 5), bool))
  with pytest.raises(ValueError, match="scores must be a multiple of 4"):
    scores.pool_groups(low)

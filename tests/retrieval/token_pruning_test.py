import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.retrieval import token_pruning


def example(seed=0, batch=5, num_tokens=9, dim=3):
  rng = np.random.default_rng(seed)
  x = jnp.asarray(rng.normal(size=(batch, num_tokens, dim)), jnp.float32)
  mask = jnp.asarray(rng.random((batch, num_tokens)) < 0.6)
  return x, mask.at[1].set(False).at[2].set(True)


METHODS = {
  "first": (
    lambda x, m: token_pruning.keep_tokens(x, m, num_keep=4),
    lambda t, o: token_pruning.keep_tokens_packed(t, o, num_keep=4),
    lambda valid: valid[:4],
    4,
  ),
  "last": (
    lambda x, m: token_pruning.keep_tokens(x, m, num_keep=4, keep="last"),
    lambda t, o: token_pruning.keep_tokens_packed(
      t, o, num_keep=4, keep="last"
    ),
    lambda valid: valid[-4:],
    4,
  ),
  "first-all": (
    lambda x, m: token_pruning.keep_tokens(x, m, num_keep=50),
    lambda t, o: token_pruning.keep_tokens_packed(t, o, num_keep=50),
    lambda valid: valid,
    9,
  ),
  "last-all": (
    lambda x, m: token_pruning.keep_tokens(x, m, num_keep=50, keep="last"),
    lambda t, o: token_pruning.keep_tokens_packed(
      t, o, num_keep=50, keep="last"
    ),
    lambda valid: valid,
    9,
  ),
  "every-2": (
    lambda x, m: token_pruning.keep_every(x, m, step=2),
    lambda t, o: token_pruning.keep_every_packed(t, o, step=2),
    lambda valid: valid[::2],
    5,
  ),
  "every-1": (
    lambda x, m: token_pruning.keep_every(x, m, step=1),
    lambda t, o: token_pruning.keep_every_packed(t, o, step=1),
    lambda valid: valid,
    9,
  ),
  "every-100": (
    lambda x, m: token_pruning.keep_every(x, m, step=100),
    lambda t, o: token_pruning.keep_every_packed(t, o, step=100),
    lambda valid: valid[:1],
    1,
  ),
}


@pytest.mark.parametrize("name", METHODS)
def test_keeps_the_right_tokens(name):
  padded, packed, choose, size = METHODS[name]
  x, mask = example()
  got = padded(jnp.where(mask[..., None], x, jnp.nan), mask)
  assert got.tokens.shape == (5, size, 3) and got.index.dtype == jnp.int32
  want = [choose(np.flatnonzero(row)) for row in np.asarray(mask)]
  for i, chosen in enumerate(want):
    n = len(chosen)
    np.testing.assert_array_equal(got.mask[i], np.arange(size) < n)
    np.testing.assert_array_equal(got.index[i][:n], chosen)
    np.testing.assert_array_equal(got.tokens[i][:n], np.asarray(x[i])[chosen])
    assert not np.any(got.tokens[i][n:]) and not np.any(got.index[i][n:])

  tokens = np.asarray(x)[np.asarray(mask)]
  offsets = np.concatenate([[0], np.cumsum(np.asarray(mask).sum(axis=1))])
  rows, ends = packed(tokens, offsets)
  np.testing.assert_array_equal(
    ends, np.concatenate([[0], np.cumsum([len(c) for c in want])])
  )
  np.testing.assert_array_equal(
    rows, np.concatenate([np.asarray(x[i])[c] for i, c in enumerate(want)])
  )


def test_gradient_goes_to_the_kept_tokens():
  x, mask = example()

  def total(x):
    return jnp.sum(token_pruning.keep_every(x, mask, step=2).tokens)

  gradient = jax.grad(total)(jnp.where(mask[..., None], x, jnp.nan))
  kept = np.zeros((5, 9))
  for i, row in enumerate(np.asarray(mask)):
    kept[i, np.flatnonzero(row)[::2]] = 1
  np.testing.assert_array_equal(gradient, np.repeat(kept[..., None], 3, 2))


def naive_ward(tokens, num_clusters):
  """Ward's rule by its recurrence over 1 - cos, all pairs at every step."""
  unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
  groups = [[i] for i in range(len(tokens))]
  distance = 1 - unit @ unit.T
  np.fill_diagonal(distance, np.inf)
  while len(groups) > num_clusters:
    a, b = sorted(np.unravel_index(np.argmin(distance), distance.shape))
    na, nb = len(groups[a]), len(groups[b])
    new = np.full(len(groups), np.inf)
    for c, group in enumerate(groups):
      if c not in (a, b):
        nc = len(group)
        new[c] = np.sqrt(
          (
            (na + nc) * distance[a, c] ** 2
            + (nb + nc) * distance[b, c] ** 2
            - nc * distance[a, b] ** 2
          )
          / (na + nb + nc)
        )
    distance[a], distance[:, a] = new, new
    distance = np.delete(np.delete(distance, b, 0), b, 1)
    groups[a] += groups[b]
    del groups[b]
  return np.array([tokens[sorted(g)].mean(axis=0) for g in sorted(groups)])


@pytest.mark.parametrize(("factor", "protected"), [(2, 1), (3.5, 0), (100, 2)])
def test_ward_equals_its_recurrence(factor, protected):
  rng = np.random.default_rng(0)
  lengths = np.array([13, 0, 1, 24, 3])
  offsets = np.concatenate([[0], np.cumsum(lengths)])
  tokens = rng.normal(size=(offsets[-1], 6)).astype(np.float32)
  got, ends = token_pruning.ward_pool_packed(
    tokens, offsets, factor=float(factor), num_protected=protected
  )
  assert got.dtype == np.float32 and ends.dtype == np.int64
  for i, n in enumerate(lengths):
    own = tokens[offsets[i] : offsets[i + 1]]
    rest = own[protected:].astype(np.float64)
    size = max(1, int(len(rest) // factor))
    pooled = naive_ward(rest, size) if len(rest) > size else rest
    want = np.concatenate([own[:protected], pooled])
    np.testing.assert_allclose(
      got[ends[i] : ends[i + 1]], want, rtol=1e-5, atol=1e-6
    )
    assert ends[i + 1] - ends[i] == min(protected, n) + len(pooled)


def test_ward_with_factor_one_and_with_equal_tokens():
  tokens = np.repeat(np.eye(2, dtype=np.float32), 4, axis=0)
  offsets = np.array([0, 8])
  same, _ = token_pruning.ward_pool_packed(tokens, offsets, factor=1.0)
  np.testing.assert_array_equal(same, tokens)
  # Three clusters fit, but two directions are all there is.
  pooled, ends = token_pruning.ward_pool_packed(
    tokens, offsets, factor=2.5, num_protected=0
  )
  assert ends[-1] == len(pooled) <= 3
  np.testing.assert_array_equal(np.unique(pooled, axis=0), np.eye(2)[::-1])
  zeros, _ = token_pruning.ward_pool_packed(
    np.zeros((5, 2), np.float32), np.array([0, 5]), factor=2.0
  )
  assert np.isfinite(zeros).all()


@pytest.mark.unchecked
def test_errors():
  x, mask = example()
  with pytest.raises(ValueError, match="num_keep must lie in 1..inf, got 0"):
    token_pruning.keep_tokens(x, mask, num_keep=0)
  with pytest.raises(ValueError, match="keep must be one of 'first', 'last'"):
    token_pruning.keep_tokens(x, mask, num_keep=2, keep="middle")
  with pytest.raises(ValueError, match="step must lie in 1..inf, got 0"):
    token_pruning.keep_every(x, mask, step=0)
  with pytest.raises(ValueError, match="x_tokens=9, mask_tokens=8"):
    token_pruning.keep_every(x, mask[:, 1:], step=2)
  tokens = np.zeros((4, 2), np.float32)
  for offsets in ([0, 3], [1, 4], [0, 3, 2, 4], []):
    with pytest.raises(ValueError, match="offsets must ascend from 0"):
      token_pruning.document_lengths(tokens, np.array(offsets, int))
  with pytest.raises(ValueError, match="factor must lie in 1..inf"):
    token_pruning.ward_pool_packed(tokens, np.array([0, 4]), factor=0.5)

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from tests.compiled import compiled
from tokjax.kernels import maxsim
from tokjax.retrieval import crisp, token_index

crisp = compiled(crisp, leave=("cluster", "cluster_packed"))
maxsim = compiled(maxsim)

X = np.float32([[[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-0.6, 0.8]]])
Q = np.float32([[[0.8, 0.6], [0.0, 1.0]]])
X_MASK, Q_MASK = np.ones((1, 4), bool), np.ones((1, 2), bool)
C2 = crisp.CrispConfig(query_ratio=1.0, document_clusters=2)


def example(seed=0, batch=4, num_tokens=12, dim=5):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(batch, num_tokens, dim)).astype(np.float32)
  mask = rng.random((batch, num_tokens)) < 0.7
  mask[:, 0] = True
  return x, mask


def cluster(*args, **settings):
  return jax.device_get(crisp.cluster(*args, **settings))


def lloyd(tokens, num_clusters, num_iterations):
  """The definition, one token at a time."""
  tokens = np.asarray(tokens, np.float64)
  n = len(tokens)
  if n <= num_clusters:
    return tokens
  centroids = [
    tokens[(2 * k + 1) * n // (2 * num_clusters)] for k in range(num_clusters)
  ]
  for _ in range(num_iterations + 1):
    groups = [[] for _ in centroids]
    for token in tokens:
      groups[np.argmin([((token - c) ** 2).sum() for c in centroids])].append(
        token
      )
    centroids = [
      np.mean(group, axis=0) if group else c
      for group, c in zip(groups, centroids, strict=True)
    ]
  return np.array([c for c, g in zip(centroids, groups, strict=True) if len(g)])


@pytest.mark.parametrize("num_iterations", [0, 1, 10])
def test_equals_lloyd_on_each_text(num_iterations):
  x, mask = example(2, num_tokens=40)  # the first steps move some token
  found = cluster(x, mask, num_clusters=3, num_iterations=num_iterations)
  for i in range(len(x)):
    want = lloyd(x[i][mask[i]], 3, num_iterations)
    np.testing.assert_allclose(
      found.means[i][found.mask[i]], want, rtol=1e-5, atol=1e-6
    )


def test_worked_example():
  found = cluster(X, X_MASK, num_clusters=2)
  np.testing.assert_allclose(
    found.means[0], [[0.9, 0.3], [-0.3, 0.9]], atol=1e-6
  )
  full = maxsim.maxsim(Q, X, Q_MASK, X_MASK)
  np.testing.assert_allclose(full, [[2.0]], rtol=1e-6)
  got = crisp.score(Q, X, Q_MASK, X_MASK, C2)
  np.testing.assert_allclose(got, [[1.8]], rtol=1e-6)


@pytest.mark.parametrize("budget", [{"num_clusters": 50}, {"ratio": 1.0}])
def test_with_room_for_all_the_tokens_stay(budget):
  x, mask = example()
  found = cluster(x, mask, **budget)
  assert found.means.shape == x.shape
  for i in range(len(x)):
    np.testing.assert_array_equal(found.means[i][found.mask[i]], x[i][mask[i]])
  q, q_mask = example(1, batch=3, num_tokens=6)
  config = crisp.CrispConfig(query_clusters=6, document_ratio=1.0)
  np.testing.assert_allclose(
    crisp.score(q, x, q_mask, mask, config),
    maxsim.maxsim(q, x, q_mask, mask),
    rtol=1e-5,
  )


def test_one_cluster_each_is_the_product_of_means():
  (x, x_mask), (q, q_mask) = example(0), example(1)
  config = crisp.CrispConfig(query_clusters=1, document_clusters=1)
  got = crisp.score(q, x, q_mask, x_mask, config)
  means = [
    np.stack([np.asarray(row[m]).mean(axis=0) for row, m in zip(t, k)])  # noqa: B905
    for t, k in ((q, q_mask), (x, x_mask))
  ]
  np.testing.assert_allclose(got, means[0] @ means[1].T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ("rounding", "want"),
  [
    ("floor", [1, 1, 1, 2, 29]),
    ("round", [1, 1, 1, 3, 29]),
    ("ceil", [1, 1, 2, 3, 29]),
  ],
)
def test_ratio_counts_valid_tokens_only(rounding, want):
  # 0.29 * 100 is 28.999999999999996 in binary; 29 of 100 is what was asked.
  lengths = np.array([1, 2, 4, 9, 100])
  mask = np.arange(100) < lengths[:, None]
  x = np.random.default_rng(0).normal(size=(5, 100, 3)).astype(np.float32)
  found = cluster(x, mask, ratio=0.29, rounding=rounding)
  assert found.means.shape == (5, 29, 3)
  np.testing.assert_array_equal(found.mask.sum(axis=1), want)
  poisoned = np.where(mask[..., None], x, np.nan)
  again = crisp.cluster(poisoned, mask, ratio=0.29, rounding=rounding)
  np.testing.assert_array_equal(again.means, found.means)


def test_ratio_does_not_depend_on_padding():
  x, mask = example(num_tokens=10)
  want = cluster(x, mask, ratio=0.5)
  padding = [(0, 0), (0, 7)]
  got = cluster(
    np.pad(x, [*padding, (0, 0)], constant_values=np.nan),
    np.pad(mask, padding),
    ratio=0.5,
  )
  assert want.means.shape == (4, 5, 5) and got.means.shape == (4, 9, 5)
  # The means are sums over another number of (zero) terms.
  np.testing.assert_allclose(got.means[:, :5], want.means, rtol=1e-5)
  np.testing.assert_array_equal(got.mask[:, :5], want.mask)
  assert not np.any(got.mask[:, 5:])


def test_ratio_that_fills_the_slots_still_clusters():
  # ceil(0.9 * 5) slots for 5 tokens, but only 4 clusters. They start from all
  # tokens but 8, which joins 10; then 10 is nearer to 10.5.
  x = np.float32([0.0, 10.0, 8.0, 10.5, 20.0])[None, :, None]
  found = cluster(x, np.ones((1, 5), bool), ratio=0.9)
  assert found.means.shape == (1, 5, 1)
  np.testing.assert_allclose(found.means[0, :4, 0], [0.0, 8.0, 10.25, 20.0])
  np.testing.assert_array_equal(found.mask[0], [True] * 4 + [False])


def test_gradient_of_a_mean_is_shared_by_its_members():
  mask = np.array([[True, True, True, False]])

  def means(x):
    return crisp.cluster(x[None], mask, num_clusters=2).means[0]

  x = X[0].copy()
  x[3] = np.nan
  found = cluster(x[None], mask, num_clusters=2)
  jacobian = np.asarray(jax.jit(jax.jacobian(means))(x))  # [K, D, N, D]
  for k in range(2):
    for n in range(4):
      member = int(found.assignment[0, n]) == k
      want = np.eye(2) * member / int(found.counts[0, k])
      np.testing.assert_allclose(jacobian[k, :, n], want, atol=1e-6)


def test_gradient_of_the_score():
  def total(q, x):
    return crisp.score(q, x, Q_MASK, X_MASK, C2)[0, 0]

  check_grads(jax.jit(total), (Q, X), order=1, modes=["rev"], eps=1e-3)
  # Each query token meets one mean, of two tokens: losers of the plain MaxSim
  # learn as well.
  gradient = jax.jit(jax.grad(total, 1))(Q, X)[0]
  want = [[0.4, 0.3], [0.4, 0.3], [0.0, 0.5], [0.0, 0.5]]
  np.testing.assert_allclose(gradient, want, atol=1e-6)


def test_order_does_not_matter_to_well_separated_groups():
  rng = np.random.default_rng(0)
  centers = 10 * np.eye(4, 6)
  tokens = np.concatenate(
    [c + rng.normal(size=(5, 6)) / 10 for c in centers]
  ).astype(np.float32)
  q, q_mask = example(3, dim=6)
  config = crisp.CrispConfig(query_clusters=2, document_clusters=4)
  mask = np.ones((1, 20), bool)
  order = rng.permutation(5)  # within each group: the starts stay in theirs
  shuffled = tokens.reshape(4, 5, 6)[:, order].reshape(20, 6)
  want, got = (
    crisp.score(q, t[None], q_mask, mask, config) for t in (tokens, shuffled)
  )
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_identical_groups_are_exact():
  rng = np.random.default_rng(0)
  distinct = rng.normal(size=(3, 5)).astype(np.float32)
  x = np.repeat(distinct, 4, axis=0)[None]
  found = cluster(x, np.ones((1, 12), bool), num_clusters=3)
  np.testing.assert_allclose(found.means[0], distinct, rtol=1e-6)
  np.testing.assert_array_equal(found.counts[0], [4, 4, 4])


def test_empty_clusters_do_not_win_over_negative_products():
  x = -np.ones((1, 6, 2), "f")  # six equal tokens: one cluster takes them all
  q = np.ones((1, 1, 2), "f")
  config = crisp.CrispConfig(query_clusters=1, document_clusters=3)
  found = cluster(x, np.ones((1, 6), bool), num_clusters=3)
  np.testing.assert_array_equal(found.mask[0], [True, False, False])
  got = crisp.score(q, x, np.ones((1, 1), bool), np.ones((1, 6), bool), config)
  np.testing.assert_allclose(got, [[-2.0]])


def test_text_without_tokens():
  x, mask = example()
  mask[1] = False
  found = cluster(x, mask, ratio=0.5)
  assert not np.any(found.mask[1]) and not np.any(found.means[1])
  scores = np.asarray(
    crisp.score(x, x, mask, mask, crisp.CrispConfig(**crisp.PRESETS["C50"]))
  )
  assert not np.any(scores[1, :1]) and scores[0, 1] == maxsim.EMPTY_SCORE


def test_renormalized_means_have_unit_length():
  x, mask = example()
  raw = cluster(x, mask, num_clusters=3)
  unit = crisp.cluster(x, mask, num_clusters=3, renormalize=True)
  length = np.linalg.norm(raw.means, axis=-1, keepdims=True)
  want = np.asarray(raw.means) / np.where(length > 0, length, 1)
  np.testing.assert_allclose(unit.means, want, rtol=1e-5, atol=1e-6)


def test_random_start_is_a_fixed_point_and_depends_on_the_key():
  x, mask = example(batch=2, num_tokens=40, dim=3)
  one, two = (
    cluster(
      x, mask, num_clusters=4, num_iterations=40, key=jax.random.key(seed)
    )
    for seed in (0, 1)
  )
  assert not np.array_equal(one.assignment, two.assignment)
  for i in range(2):
    tokens, means = x[i][mask[i]], one.means[i]
    distance = np.square(tokens[:, None] - means).sum(axis=-1)
    np.testing.assert_array_equal(
      distance.argmin(axis=1), one.assignment[i][mask[i]]
    )
  config = crisp.CrispConfig(query_clusters=4, document_clusters=4)
  scores = [
    crisp.score(x, x, mask, mask, config, key=key)
    for key in (None, jax.random.key(0), jax.random.key(0))
  ]
  assert not np.array_equal(scores[0], scores[1])
  np.testing.assert_array_equal(scores[1], scores[2])


@pytest.mark.parametrize(
  ("name", "sizes"),
  [("C4x8", (4, 8)), ("C8x32", (8, 32)), ("C25", (8, 16)), ("C50", (16, 32))],
)
def test_presets(name, sizes):
  config = crisp.CrispConfig(**crisp.PRESETS[name])
  q, d = jnp.ones((2, 32, 3)), jnp.ones((2, 64, 3))
  got = (
    jax.eval_shape(
      lambda x: crisp.cluster_queries(x, x[..., 0] > 0, config), q
    ),
    jax.eval_shape(
      lambda x: crisp.cluster_documents(x, x[..., 0] > 0, config), d
    ),
  )
  assert tuple(found.means.shape[1] for found in got) == sizes


@pytest.mark.parametrize("name", crisp.PRESETS)
def test_packed_equals_each_document_alone(name):
  rng = np.random.default_rng(0)
  lengths = np.array([3, 0, 40, 9, 1, 17, 40, 64, 33])
  offsets = np.concatenate([[0], np.cumsum(lengths)])
  tokens = rng.normal(size=(offsets[-1], 4)).astype(np.float32)
  config = crisp.CrispConfig(**crisp.PRESETS[name])
  means, ends = crisp.cluster_packed(
    tokens, offsets, config, bucket=8, batch_tokens=100
  )
  assert means.dtype == np.float32 and ends.dtype == np.int64
  assert len(ends) == 10 and ends[0] == 0 and ends[-1] == len(means)
  for i, n in enumerate(lengths):
    own = tokens[offsets[i] : offsets[i + 1]]
    size = config.document_clusters or max(1, int(config.document_ratio * n))
    want = lloyd(own, size, 10)
    np.testing.assert_allclose(
      means[ends[i] : ends[i + 1]], want, rtol=1e-4, atol=1e-5
    )


def test_packed_means_go_into_the_index():
  rng = np.random.default_rng(0)
  lengths = np.array([20, 3, 31])
  offsets = np.concatenate([[0], np.cumsum(lengths)])
  tokens = rng.normal(size=(offsets[-1], 4)).astype(np.float32)
  config = crisp.CrispConfig(**crisp.PRESETS["C4x8"])
  index = token_index.build(*crisp.cluster_packed(tokens, offsets, config))
  assert index.num_documents == 3
  empty = crisp.cluster_packed(tokens[:0], np.array([0, 0]), config)
  assert empty[0].shape == (0, 4) and empty[1].tolist() == [0, 0]


def test_packed_keeps_bfloat16():
  tokens = np.asarray(jnp.arange(6.0, dtype=jnp.bfloat16)[:, None])
  config = crisp.CrispConfig(document_clusters=1)
  means, _ = crisp.cluster_packed(tokens, np.array([0, 2, 6]), config)
  assert means.dtype == jnp.bfloat16
  np.testing.assert_array_equal(means.astype(np.float32), [[0.5], [3.5]])


@pytest.mark.unchecked
def test_errors():
  x, mask = example()
  with pytest.raises(
    ValueError, match="give one of num_clusters and ratio, got None and None"
  ):
    crisp.cluster(x, mask)
  with pytest.raises(ValueError, match="num_clusters and ratio, got 3 and 0.5"):
    crisp.cluster(x, mask, num_clusters=3, ratio=0.5)
  with pytest.raises(ValueError, match=r"ratio must lie in \(0, 1\], got 0.0"):
    crisp.cluster(x, mask, ratio=0.0)
  with pytest.raises(ValueError, match="num_clusters must lie in 1..inf"):
    crisp.cluster(x, mask, num_clusters=0)
  with pytest.raises(ValueError, match="rounding must be one of 'floor'"):
    crisp.cluster(x, mask, ratio=0.5, rounding="up")
  with pytest.raises(ValueError, match="x_tokens=12, mask_tokens=11"):
    crisp.cluster(x, mask[:, :-1], num_clusters=2)
  config = crisp.CrispConfig(document_clusters=2)
  with pytest.raises(ValueError, match="query_clusters and query_ratio"):
    crisp.cluster_queries(x, mask, config)
  config = dataclasses.replace(config, document_clusters=None)
  with pytest.raises(ValueError, match="document_clusters and document_ratio"):
    crisp.cluster_documents(x, mask, config)
  with pytest.raises(ValueError, match="offsets must ascend from 0"):
    crisp.cluster_packed(np.zeros((3, 2)), np.array([0, 2]), C2)


def test_packed_compiles_one_program_per_shape():
  tokens = np.random.default_rng(0).normal(size=(320, 3)).astype(np.float32)
  config = crisp.CrispConfig(document_clusters=2, num_iterations=3)
  jax.clear_caches()  # a full cache drops what it counts
  before = crisp.cluster._cache_size()
  for length in (8, 7, 5):
    crisp.cluster_packed(
      tokens[: 32 * length],
      np.arange(33) * length,
      config,
      bucket=8,
      batch_tokens=64,
    )
  # 8 documents of 8 padded tokens each time.
  assert crisp.cluster._cache_size() - before == 1

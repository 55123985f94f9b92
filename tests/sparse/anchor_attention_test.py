"""AnchorAttention against explicit sets of keys in float64."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from tests.compiled import run
from tokjax.ops import attention
from tokjax.sparse import anchor_attention as aa
from tokjax.sparse import causal_heads
from tokjax.sparse.anchor_attention import AnchorConfig

BLOCK, STEP, GROUP = 2, 4, 8


def arrays(seed, num_tokens=40, batch=2, heads=4, key_heads=2, width=4):
  normal = np.random.default_rng(seed).normal
  return [
    2 * normal(size=(batch, h, num_tokens, width)).astype(np.float32)
    for h in (heads, key_heads, key_heads)
  ]


@jax.jit
def stages(q, k, v, theta, segment_ids):
  """Each step by itself, and the recall."""
  config = AnchorConfig(BLOCK, STEP, theta, largest_tile=4)
  more = dict(segment_ids=segment_ids)
  state = aa.anchor_state(q, k, v, config, **more)
  stripes = aa.stripe_select(q, k, state.anchor, config, **more)
  read = aa.stripe_attention(
    state.read, q, k, v, stripes.index, stripes.count, config, **more
  )
  return state, stripes, read, aa.recall(read.lse, q, k, **more)


def staged(q, k, v, theta, segment_ids=None):
  if segment_ids is None:
    segment_ids = np.zeros((q.shape[0], q.shape[2]), np.int32)
  return jax.device_get(stages(q, k, v, np.float32(theta), segment_ids))


class Head:
  """One head of one sequence in float64: who reads what, and the result."""

  def __init__(self, q, k, v, ids, theta, room, overflow, sizes):
    block, step = sizes
    group = block * step
    q, k, v = (np.where((ids >= 0)[:, None], x, 0) for x in (q, k, v))
    self.logits = q.astype(np.float64) @ k.T.astype(np.float64)
    self.logits /= math.sqrt(q.shape[1])
    n = len(ids)
    first = [i for i in range(n)]  # of each row's sequence
    for i in range(1, n):
      if ids[i] == ids[i - 1]:
        first[i] = first[i - 1]
    self.causal = [
      set(range(first[i], i + 1)) if ids[i] >= 0 else set() for i in range(n)
    ]
    self.near = []
    for i in range(n):
      window = range(i // group * group - block, i + 1)
      sink = range(first[i], first[i] + block)
      self.near.append(self.causal[i] & (set(window) | set(sink)))
    self.anchor = [
      max((self.logits[i, j] for j in self.near[i]), default=-np.inf)
      for i in range(n)
    ]
    self.chosen, self.count, self.read = [], [], list(self.near)
    for g in range(-(-n // group)):
      rows = [i for i in range(g * group, min(n, (g + 1) * group))]
      rest = set.union(*(self.causal[i] - self.near[i] for i in rows))
      readers = [i for i in rows if rest & self.causal[i]]
      above = {j: -np.inf for j in rest}
      for s in range(step):
        begin = g * group + s * block
        own = [i for i in readers if begin <= i < begin + block]
        if own:
          mean = np.mean(self.logits[own], axis=0)  # as of the mean query
          anchor = np.mean([self.anchor[i] for i in own])
          above = {j: max(a, mean[j] - anchor) for j, a in above.items()}
      for a in above.values():
        assert abs(a + theta) > 1e-4  # else rounding decides
      chosen = sorted(j for j, a in above.items() if a >= -theta)
      if n < (g + 1) * group:
        chosen = sorted(rest)
      self.count.append(len(chosen))
      if len(chosen) > room and n >= (g + 1) * group:
        if overflow == "dense":
          chosen = sorted(rest)
        elif overflow == "truncate":
          chosen = chosen[:room]
        else:
          chosen = sorted(sorted(chosen, key=lambda j: (-above[j], j))[:room])
      self.chosen.append(chosen)
      for i in rows:
        self.read[i] = self.near[i] | (set(chosen) & self.causal[i])
    self.out, self.lse = self.attend(v, self.read)
    self.full_out, self.full_lse = self.attend(v, self.causal)

  def attend(self, v, sets):
    out, lse = np.zeros((len(sets), v.shape[1])), np.full(len(sets), -np.inf)
    for i, keys in enumerate(sets):
      keys = sorted(keys)
      if keys:
        logits = self.logits[i, keys]
        lse[i] = np.logaddexp.reduce(logits)
        out[i] = np.exp(logits - lse[i]) @ v[keys].astype(np.float64)
    return out, lse


def heads(
  q, k, v, theta, ids=None, max_stripes=10**6, overflow="top",
  sizes=(BLOCK, STEP),
):  # fmt: skip
  """The oracle of every head: an object array [B, H]."""
  if ids is None:
    ids = np.zeros((q.shape[0], q.shape[2]), int)
  found = np.empty(q.shape[:2], object)
  for b, h in np.ndindex(*found.shape):
    at = b, h // (q.shape[1] // k.shape[1])
    found[b, h] = Head(
      q[b, h], k[at], v[at], ids[b], theta, max_stripes, overflow, sizes
    )
  return found


def check(got, want):
  """All that the steps returned, against the oracle."""
  state, stripes, read, share = got
  assert not stripes.overflow.any()
  for at, head in np.ndenumerate(want):
    np.testing.assert_allclose(read.out[at], head.out, atol=1e-5)
    np.testing.assert_allclose(read.lse[at], head.lse, atol=1e-5)
    np.testing.assert_allclose(state.anchor[at], head.anchor, atol=1e-5)
    rows = np.isfinite(head.full_lse)
    mass = np.mean(np.exp(head.lse[rows] - head.full_lse[rows]))
    np.testing.assert_allclose(share[at], mass, atol=1e-5)
    assert stripes.count[at].tolist() == head.count
    for chosen, index in zip(head.chosen, stripes.index[at], strict=True):
      assert index[: len(chosen)].tolist() == chosen
      assert (index[len(chosen) :] == read.lse.shape[-1] - 1).all()


def test_worked_example():
  x = jnp.array([2, 0, 1.5, -3, 1, 0])[None, None, :, None]
  v = jnp.arange(6.0)[None, None, :, None]
  whole = jax.jit(
    lambda theta: aa.anchor_attention(
      jnp.ones_like(x), x, v, AnchorConfig(1, 2, theta)
    )
  )
  start = [0, 0.1192, 0.7741, 0.7827]
  for theta, end, count in (
    (0.4, [1.0852, 1.4361], 0),
    (0.6, [1.3653, 1.5977], 1),
    (5.0, [1.3419, 1.5618], 2),
    (np.inf, [1.3419, 1.5618], 2),
  ):
    read, stats = whole(theta)
    np.testing.assert_allclose(read.out[0, 0, :, 0], start + end, atol=6e-5)
    assert stats.count.tolist() == [[[0, 0, count]]]


@pytest.mark.parametrize("theta", [-np.inf, -1.0, 0.0, 2.0, np.inf])
def test_equals_explicit_sets(theta):
  q, k, v = arrays(0)
  want = heads(q, k, v, theta)
  check(staged(q, k, v, theta), want)
  if theta == 0:
    counts = np.array([[head.count for head in row] for row in want])
    assert 0 < counts.mean() < 10 and counts.max() > 2
    # Query heads of a key head choose for themselves.
    assert any(x.chosen != y.chosen for x, y in want[:, :2])
  if theta == np.inf:
    assert all(head.read == head.causal for head in want.flat)


@pytest.mark.parametrize("overflow", ["top", "dense", "truncate"])
def test_overflow_is_counted_and_the_last_rows_read_all(overflow):
  q, k, v = arrays(2, 43)

  @jax.jit
  def whole(q, k, v, theta, segment_ids):
    config = AnchorConfig(BLOCK, STEP, theta, 3, overflow, largest_tile=4)
    return aa.anchor_attention(q, k, v, config, segment_ids=segment_ids)

  one, two = np.zeros((2, 2, 43), np.int32)
  two[0, 13:] = 1
  two[1, 41:] = -1
  for theta, ids in ((0.0, one), (np.inf, one), (0.0, two)):
    read, stats = jax.device_get(whole(q, k, v, np.float32(theta), ids))
    assert stats.overflow.any()
    want = heads(q, k, v, theta, ids, max_stripes=3, overflow=overflow)
    for at, head in np.ndenumerate(want):
      np.testing.assert_allclose(read.out[at], head.out, atol=1e-5)
      np.testing.assert_allclose(read.lse[at], head.lse, atol=1e-5)
      assert stats.count[at].tolist() == head.count
      more = [max(count - 3, 0) for count in head.count[:-1]]
      assert stats.overflow[at].tolist() == [*more, 0]
      pairs = sum(map(len, head.causal))
      kept = sum(map(len, head.read)) / pairs
      np.testing.assert_allclose(stats.kept_fraction[at], kept, rtol=1e-6)
      np.testing.assert_allclose(
        read.out[at][40:], head.full_out[40:], atol=1e-5
      )
      if theta == np.inf:
        assert np.allclose(kept, 1) == (overflow == "dense")
      if overflow == "truncate" and theta == np.inf:
        assert head.chosen[3] == [2, 3, 4]


def test_segments_and_padding():
  q, k, v = arrays(3)
  ids = np.zeros((2, 40), np.int32)
  ids[0, 13:] = 1  # within a block
  ids[0, 31:] = 0  # another sequence of the same name
  ids[1] = [0] * 15 + [-1] * 6 + [2] * 17 + [-1] * 2
  for x in (q, k, v):
    x[np.broadcast_to((ids < 0)[:, None], x.shape[:3])] = np.nan
  for theta in (0.0, np.inf):
    got = staged(q, k, v, theta, ids)
    check(got, heads(q, k, v, theta, ids))
    assert not np.any(got[2].out[1, :, 15:21])


def test_a_packed_sequence_is_as_alone():
  q, k, v = arrays(4)
  ids = np.repeat(np.int32([[0, 1]]), [16, 24], axis=1).repeat(2, axis=0)
  packed = staged(q, k, v, 0.0, ids)
  assert packed[1].count.max() > 2
  # The same program: alone, with padding before it and after.
  for part in (slice(0, 16), slice(16, 40)):
    alone = np.full((2, 40), -1, np.int32)
    alone[:, part] = 7
    got = staged(q, k, v, 0.0, alone)
    groups = slice(part.start // GROUP, part.stop // GROUP)
    np.testing.assert_allclose(
      got[2].out[:, :, part], packed[2].out[:, :, part], atol=1e-6
    )
    np.testing.assert_array_equal(
      got[1].count[:, :, groups], packed[1].count[:, :, groups]
    )


def test_more_theta_more_stripes_in_their_range():
  q, k, v = arrays(5)
  last = -1
  for theta in (*np.linspace(-4, 12, 9), np.inf):
    _, stripes, _, share = staged(q, k, v, theta)
    total = stripes.count.astype(int)
    assert (total >= last).all()
    last = total
    for at in np.ndindex(*total.shape):
      index = stripes.index[at][: total[at]]
      assert (np.diff(index) > 0).all()
      assert ((index >= BLOCK) & (index < at[-1] * GROUP - BLOCK)).all()
    assert (share <= 1 + 1e-6).all()
  assert (total == np.maximum(GROUP * np.arange(5) - 2 * BLOCK, 0)).all()
  np.testing.assert_allclose(share, 1, rtol=1e-6)


def test_a_needle_is_found():
  q, k, v = (x / 4 for x in arrays(6))
  needle = 13
  k[:, :, needle] = 6
  q[:, :, 32:] += 4  # only the last group looks for it
  _, stripes, read, share = staged(q, k, v, 0.5)
  assert (stripes.index[:, :, 4] == needle).any(axis=-1).all()
  assert stripes.count[:, :, 4].max() < 20
  without = staged(q, k, v, -np.inf)[-1]
  assert share.min() > 0.95 > 0.85 > without.max()
  np.testing.assert_allclose(
    read.out[:, :, 32:],
    np.repeat(v[:, :, [needle]], 2, 1).repeat(8, 2),
    atol=0.1,
  )


@pytest.mark.parametrize("num_tokens, step", [(8, 1), (5, 4)])
def test_small_groups_and_few_rows(num_tokens, step):
  """A second group of one block has the first block before it: read once."""
  q, k, v = arrays(7, num_tokens)
  config = AnchorConfig(2, step, 0.5)
  read, stats = run(aa.anchor_attention, q, k, v, config)
  want = heads(q, k, v, 0.5, sizes=(2, step))
  for at in np.ndindex(*want.shape):
    np.testing.assert_allclose(read.out[at], want[at].out, atol=1e-5)
    assert stats.count[at].tolist() == want[at].count


def test_gradients_are_those_of_the_pairs_read():
  q, k, v = arrays(8, 11, batch=1, heads=2, key_heads=1)

  def loss(read):
    return jnp.sum(jnp.sin(read.out)) + jnp.sum(jnp.cos(read.lse))

  def sparse(q, k, v, theta):
    config = AnchorConfig(1, 4, theta, max_stripes=6, largest_tile=2)
    state = aa.anchor_state(q, k, v, config)
    stripes = aa.stripe_select(q, k, state.anchor, config)
    return loss(
      aa.stripe_attention(
        state.read, q, k, v, stripes.index, stripes.count, config
      )
    )

  def dense(q, k, v, bias):
    return loss(attention.attend_with_lse(q, k, v, bias=bias))

  sparse, dense = (jax.jit(jax.grad(f, (0, 1, 2))) for f in (sparse, dense))
  pairs = []
  for theta in (-np.inf, 0.0, np.inf):
    bias = np.full((1, 2, 11, 11), -np.inf, np.float32)
    for at, head in np.ndenumerate(heads(q, k, v, theta, sizes=(1, 4))):
      for row, keys in enumerate(head.read):
        bias[at][row, sorted(keys)] = 0
    pairs.append(np.isfinite(bias).sum())
    for got, want in zip(
      sparse(q, k, v, np.float32(theta)), dense(q, k, v, bias), strict=True
    ):
      np.testing.assert_allclose(got, want, atol=2e-5)
  assert pairs[0] < pairs[1] < pairs[2] == 2 * 66


def test_bfloat16_is_as_near_as_dense():
  q, k, v = (x.astype(jnp.bfloat16) for x in arrays(9, 19))
  config = AnchorConfig(BLOCK, STEP, math.inf)
  read, _ = run(aa.anchor_attention, q, k, v, config)
  dense = run(attention.attend_with_lse, q, k, v, np.tri(19, dtype=bool))
  want = heads(*(x.astype(np.float32) for x in (q, k, v)), np.inf)
  exact = np.array([[head.full_out for head in row] for row in want])
  assert read.out.dtype == jnp.float32
  error = np.abs(read.out - exact).max()
  assert error <= 2 * np.abs(dense.out - exact).max()


def test_no_square_of_all_rows():
  config = AnchorConfig(16, 4, max_stripes=128, largest_tile=128)
  n = 1000  # with rows that fill no group

  def loss(q, k, v):
    read, stats = aa.anchor_attention(q, k, v, config)
    share = aa.recall(read.lse, q, k)
    return jnp.sum(read.out) + jnp.sum(share) + jnp.sum(stats.kept_fraction)

  q = jax.ShapeDtypeStruct((1, 2, n, 8), jnp.float32)
  k = jax.ShapeDtypeStruct((1, 1, n, 8), jnp.float32)
  text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k).as_text()
  largest = max(
    math.prod(map(int, shape.split("x")))
    for shape in re.findall(r"tensor<([0-9x]+)x[a-z]", text)
  )
  assert 2 * n * 8 <= largest < n * n / 4  # 128 rows of logits in `recall`


def test_each_head_meets_its_keys():
  q, k, _ = arrays(13, 5)

  def total(q, k, start, scale):
    return jnp.sum(q * k) * scale + start[-1]

  scale = np.arange(8, dtype=np.float32).reshape(2, 4)
  ids = np.int32([[0, 0, 0, 1, 1], [0, 0, -1, -1, -1]])
  got = run(causal_heads.each_head, total, q, (k,), ids, scale)
  want = np.sum(q * np.repeat(k, 2, axis=1), axis=(2, 3)) * scale
  np.testing.assert_allclose(got, want + [[3], [5]], atol=1e-4)


def test_heads_on_devices():
  q, k, v = arrays(10, 19)
  mesh = jax.make_mesh((2,), ("heads",), axis_types=(AxisType.Explicit,))
  config = AnchorConfig(BLOCK, STEP, 0.0)
  with jax.set_mesh(mesh):
    shards = jax.device_put((q, k, v), jax.P(None, "heads"))
    out = run(aa.anchor_attention, *shards, config)[0].out
    with pytest.raises(ValueError, match="over its first two axes"):
      q, k, v = (jnp.asarray(x[:, :, :18]) for x in (q, k, v))
      q = jax.device_put(q, jax.P(None, None, "heads"))
      aa.anchor_state(q, k, v, config)
  assert out.sharding.spec[1] == "heads"
  out = jax.device_get(out)
  for at, head in np.ndenumerate(heads(*arrays(10, 19), 0.0)):
    np.testing.assert_allclose(out[at], head.out, atol=1e-5)


@pytest.mark.unchecked
@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (dict(block=0), "block must lie in 1.."),
    (dict(max_stripes=0), "max_stripes must lie in 1.."),
    (dict(overflow="drop"), "overflow must be one of 'top', 'dense'"),
  ],
)
def test_settings_are_checked(settings, message):
  q, k, v = arrays(11, 5)
  with pytest.raises(ValueError, match=message):
    aa.anchor_attention(q, k, v, AnchorConfig(**settings))


@pytest.mark.unchecked
def test_sizes_are_checked():
  q, k, v = arrays(12, 5)
  config = AnchorConfig(2, 2)
  with pytest.raises(ValueError, match="q_tokens=5, k_tokens=4"):
    aa.anchor_attention(q, k[:, :, :4], v, config)
  with pytest.raises(ValueError, match="heads_of_q must be a multiple of 2"):
    aa.anchor_attention(q[:, :3], k, v, config)
  with pytest.raises(ValueError, match="q_tokens=5, segment_ids=4"):
    ids = np.zeros((2, 4), np.int32)
    aa.anchor_attention(q, k, v, config, segment_ids=ids)

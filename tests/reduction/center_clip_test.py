import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import compiled, run
from tests.ops import medoids_test
from tests.ops.medoids_test import Oracle
from tokjax.reduction import center_clip as cc

cc = compiled(cc)


LINE = np.array([[[0], [1], [2], [10], [11], [13]]], np.float32)


def video(seed, batch=60, frames=6, rows=5, width=3):
  random = np.random.default_rng(seed)
  x = random.normal(size=(batch, frames, rows, width)).astype(np.float32)
  length = random.integers(0, frames + 1, batch)
  return x, np.arange(frames)[None, :] < length[:, None]


@pytest.mark.parametrize("aggregation", ["medoid", "mean"])
def test_center_cluster_equals_the_oracle(aggregation):
  x, mask = video(0)
  poisoned = np.where(mask[..., None, None], x, np.nan)
  method = jax.jit(
    lambda x, mask: run(
      cc.center_cluster,
      x,
      mask,
      num_segments=3,
      num_centers=3,
      aggregation=aggregation,
    )
  )
  found = jax.device_get(method(poisoned, mask))
  segments = 0
  for b in range(len(x)):
    for s in range(3):
      frames = [t for t in (2 * s, 2 * s + 1) if mask[b, t]]
      assert found.segment_mask[b, s] == (len(frames) > 0)
      if not frames:
        assert not found.mask[b, s].any() and not found.tokens[b, s].any()
        continue
      want = np.mean([x[b, t, 0] for t in frames], axis=0)
      np.testing.assert_allclose(found.tokens[b, s, 0], want, atol=1e-6)
      patches = x[b, 2 * s : 2 * s + 2, 1:].reshape(8, 3)
      valid = np.repeat(mask[b, 2 * s : 2 * s + 2], 4)
      oracle = Oracle(patches, valid, 3)
      if oracle.gap < 1e-5:
        continue
      segments += 1
      assert found.mask[b, s].all()
      assert found.patches.index[b, s].tolist() == oracle.index
      if aggregation == "medoid":
        want = patches[oracle.index]
        assert found.patches.size[b, s].tolist() == [1, 1, 1]
      else:
        groups = [
          [n for n, k in oracle.owner.items() if k == c] for c in range(3)
        ]
        want = np.stack([patches[g].mean(axis=0) for g in groups])
        assert found.patches.size[b, s].tolist() == [len(g) for g in groups]
      np.testing.assert_allclose(found.tokens[b, s, 1:], want, atol=1e-6)
  assert segments > 50


def test_nothing_happens_when_nothing_is_reduced():
  x, _ = video(1, batch=2)
  found = run(cc.center_cluster, x, num_segments=6, num_centers=4)
  np.testing.assert_array_equal(found.tokens, x)
  assert found.mask.all() and found.segment_mask.all()


def test_repeated_frames_become_one():
  frame = video(2, batch=2, frames=1)[0]
  x = np.repeat(frame, 3, axis=1)
  found = run(cc.center_cluster, x, num_segments=1, num_centers=4)
  np.testing.assert_allclose(found.tokens[:, :, 0], frame[:, :, 0], atol=1e-6)
  for b in range(2):
    got = np.asarray(found.tokens[b, 0, 1:])
    order = np.argsort(np.asarray(found.patches.index[b, 0]) % 4)
    np.testing.assert_array_equal(got[order], frame[b, 0, 1:])


def test_segments_of_the_published_code_count_by_their_last_frame():
  x, _ = video(3, batch=1)
  mask = np.array([[True, True, True, False, False, False]])
  ours = run(cc.center_cluster, x, mask, num_segments=3, num_centers=2)
  theirs = run(
    cc.center_cluster,
    x,
    mask,
    num_segments=3,
    num_centers=2,
    compat="reference",
  )
  assert ours.segment_mask.tolist() == [[True, True, False]]
  assert theirs.segment_mask.tolist() == [[True, False, False]]
  whole = run(cc.center_cluster, x, num_segments=3, num_centers=2)
  np.testing.assert_array_equal(theirs.tokens, whole.tokens)
  np.testing.assert_array_equal(ours.tokens[:, 0], whole.tokens[:, 0])
  np.testing.assert_array_equal(ours.tokens[:, 1, 0], x[:, 2, 0])


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("num_keep", [1, 4, medoids_test.N])
def test_center_clip_equals_the_oracle(num_keep, whole):
  x, mask = medoids_test.cases(num_keep, 180, whole)
  poisoned = np.where(mask[..., None], x, np.nan)
  found = jax.device_get(
    run(cc.center_clip, poisoned, jnp.asarray(mask), num_keep=num_keep)
  )
  checked = 0
  for b in range(len(x)):
    if num_keep == medoids_test.N:
      want = np.flatnonzero(mask[b]).tolist()
    else:
      oracle = Oracle(x[b], mask[b], num_keep)
      if not whole and oracle.gap < 1e-5:
        continue
      want = oracle.index
    checked += 1
    assert found.index[b][found.mask[b]].tolist() == want
    np.testing.assert_array_equal(found.tokens[b][: len(want)], x[b, want])
    assert not found.tokens[b][len(want) :].any()
  assert checked > 170


def test_center_clip_on_a_line():
  kept = run(cc.center_clip, LINE, num_keep=2)
  assert kept.index.tolist() == [[1, 4]] and kept.plan is None
  assert kept.tokens[0, :, 0].tolist() == [1, 11]
  means = run(cc.center_clip, LINE, num_keep=2, aggregation="mean")
  np.testing.assert_allclose(means.tokens[0, :, 0], [1, 34 / 3], rtol=1e-6)
  assert means.size.tolist() == [[3, 3]]
  back = means.restore(jnp.array([[[7.0], [8.0]]]), 6)
  assert back[0, :, 0].tolist() == [7, 7, 7, 8, 8, 8]


@pytest.mark.parametrize("aggregation", ["medoid", "mean"])
def test_center_clip_works_segment_by_segment(aggregation):
  x, mask = video(4, batch=30, frames=1, rows=12)
  x, mask = x[:, 0], np.random.default_rng(4).random((30, 12)) < 0.6
  mask[0, :4] = False

  def reduce(x, mask, keep, segments):
    return run(
      cc.center_clip,
      np.where(mask[..., None], x, np.nan),
      jnp.asarray(mask),
      num_keep=keep,
      num_segments=segments,
      aggregation=aggregation,
    )

  whole = reduce(x, mask, 6, 3)
  parts = [reduce(x[:, i : i + 4], mask[:, i : i + 4], 2, 1) for i in (0, 4, 8)]
  for b in range(30):
    index, tokens, size = [], [], []
    for i, part in enumerate(parts):
      live = np.asarray(part.mask[b])
      index += (np.asarray(part.index[b])[live] + 4 * i).tolist()
      tokens += np.asarray(part.tokens[b])[live].tolist()
      size += np.asarray(part.size[b])[live].tolist()
    live = np.arange(6) < len(index)
    np.testing.assert_array_equal(whole.mask[b], live)
    np.testing.assert_array_equal(np.asarray(whole.index[b])[live], index)
    assert (np.asarray(whole.index[b])[~live] == 11).all()
    np.testing.assert_allclose(
      np.asarray(whole.tokens[b])[live], np.reshape(tokens, (-1, 3)), atol=1e-6
    )
    np.testing.assert_array_equal(np.asarray(whole.size[b])[live], size)


@pytest.mark.parametrize("algorithm", ["kmedoids", "spectral"])
def test_all_tokens_and_one_token(algorithm):
  x = video(5, batch=3, frames=1, rows=9)[0][:, 0]
  every = run(cc.center_clip, x, num_keep=9, algorithm=algorithm)
  np.testing.assert_array_equal(every.tokens, x)
  one = run(cc.center_clip, x, num_keep=1, algorithm=algorithm)
  far = np.linalg.norm(x[:, :, None] - x[:, None], axis=-1).sum(axis=-1)
  if algorithm == "kmedoids":
    np.testing.assert_array_equal(one.index[:, 0], far.argmin(axis=1))
  assert one.tokens.shape == (3, 1, 3)


def test_spectral_and_its_options():
  label = np.array([0, 0, 1, 1, 1, 0, 0, 1])
  x = (video(6, batch=2, frames=1, rows=8)[0][:, 0] * 0.1).astype(np.float32)
  x = x + 9 * label[:, None].astype(np.float32)
  found = run(
    cc.center_clip,
    x,
    num_keep=2,
    algorithm="spectral",
    aggregation="mean",
    sigma=1.0,
    num_neighbors=4,
  )
  assert found.size.tolist() == [[4, 4], [4, 4]]
  back = found.restore(jnp.array([[[0.0], [1.0]]] * 2), 8)
  np.testing.assert_array_equal(back[..., 0], [label, label])
  with pytest.raises(TypeError, match="sigma"):
    run(cc.center_clip, x, num_keep=2, sigma=1.0)


def test_gradients():
  x = jnp.asarray(video(7, batch=2)[0])

  def total(x, aggregation):
    found = run(
      cc.center_cluster,
      x,
      num_segments=3,
      num_centers=2,
      aggregation=aggregation,
    )
    return jnp.sum(found.tokens)

  gradient = np.asarray(jax.grad(total)(x, "medoid"))
  np.testing.assert_allclose(gradient[:, :, 0], 0.5)
  patches = gradient[:, :, 1:, 0].reshape(2, 3, 8)
  np.testing.assert_array_equal(
    np.sort(patches)[..., -3:], [[[0, 1, 1]] * 3] * 2
  )
  gradient = np.asarray(jax.grad(total)(x, "mean"))
  np.testing.assert_allclose(
    gradient[:, :, 1:, 0].reshape(2, 3, 8).sum(axis=2), 2, rtol=1e-6
  )
  assert (gradient > 0).all()


def test_pool_frames_equals_a_loop():
  random = np.random.default_rng(8)
  x = random.normal(size=(40, 4, 3)).astype(np.float32)
  mask = random.random((40, 4)) < 0.6
  mask[0] = False
  got = run(
    cc.pool_frames, np.where(mask[..., None], x, np.nan), jnp.asarray(mask)
  )
  assert not np.asarray(got[0]).any()
  for g, one, m in zip(np.asarray(got), x, mask, strict=True):
    if m.any():
      rows = [r / np.linalg.norm(r) for r in one[m].astype(np.float64)]
      mean = np.mean(rows, axis=0)
      np.testing.assert_allclose(g, mean / np.linalg.norm(mean), atol=1e-5)
  everything = run(cc.pool_frames, x)
  np.testing.assert_allclose(np.linalg.norm(everything, axis=1), 1, atol=1e-6)


def test_positions_may_be_renumbered():
  kept = run(cc.center_clip, LINE, num_keep=2, positions="renumber")
  assert kept.position_ids.tolist() == [[0, 1]]
  kept = run(cc.center_clip, LINE, num_keep=2, aggregation="mean")
  assert kept.position_ids.tolist() == [[1, 4]]


@pytest.mark.unchecked
def test_errors():
  x = jnp.ones((2, 6, 5, 3))
  with pytest.raises(ValueError, match="x_frames must be a multiple of 4"):
    cc.center_cluster(x, num_segments=4, num_centers=2)
  with pytest.raises(ValueError, match="num_centers must lie in 1..8, got 9"):
    cc.center_cluster(x, num_segments=3, num_centers=9)
  with pytest.raises(ValueError, match="algorithm must be one of 'kmedoids'"):
    cc.center_cluster(x, num_segments=3, num_centers=2, algorithm="kmeans")
  with pytest.raises(ValueError, match="x_frames=6, frame_mask_frames=5"):
    cc.center_cluster(x, jnp.ones((2, 5), bool), num_segments=3, num_centers=2)
  with pytest.raises(ValueError, match="num_keep must lie in 1..6, got 7"):
    cc.center_clip(jnp.asarray(LINE), num_keep=7)
  with pytest.raises(ValueError, match="num_keep must be a multiple of 2"):
    cc.center_clip(jnp.asarray(LINE), num_keep=3, num_segments=2)
  with pytest.raises(ValueError, match="aggregation must be one of"):
    cc.center_clip(jnp.asarray(LINE), num_keep=3, aggregation="sum")
  with pytest.raises(ValueError, match="class_tokens_segments=6"):
    cc.pool_frames(x[:, :, 0], jnp.ones((2, 5), bool))

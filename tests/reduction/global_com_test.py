import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import compiled, run
from tokjax.reduction import global_com
from tokjax.reduction import global_com_scores as scores

global_com = compiled(global_com)
scores = compiled(scores)


def pictures(seed, grid=(2, 3), side=4, number=60, width=3):
  random = np.random.default_rng(seed)
  crops, tokens = grid[0] * grid[1], side * side

  def normal(*shape):
    return random.normal(size=(number, *shape)).astype(np.float32)

  mask = np.stack(
    [
      scores.unpadded_mask(
        tuple(random.integers(1, 9, 2).tolist()), grid=grid, side=side
      )
      for _ in range(number)
    ]
  )
  mask[0] = True
  thumbnail, x = normal(tokens, width), normal(crops, tokens, width)
  of_thumbnail, of_crops = normal(tokens) * 9, normal(crops, tokens)
  # Every fourth with ties: all alike in the thumbnail, quarters in the crops.
  of_thumbnail[3::4] = 0
  of_crops[3::4] = np.round(of_crops[3::4] * 4) / 4
  return thumbnail, x, of_thumbnail, of_crops, mask


def test_budgets_of_the_worked_example():
  thumbnail = np.zeros((1, 24, 24), np.float32)
  thumbnail[0, 3, 5], thumbnail[0, 2, 20] = 30, 10
  ratio = run(
    scores.crop_budgets,
    jnp.asarray(thumbnail.reshape(1, -1)),
    grid=(2, 2),
    keep_ratio=0.25,
  )
  want = [0.3899, 0.2149, 0.1976, 0.1976]
  np.testing.assert_allclose(ratio[0], want, atol=5e-5)
  count = np.floor(np.asarray(ratio[0]) * 576)
  assert count.tolist() == [224, 123, 113, 113]
  even = run(
    scores.crop_budgets,
    jnp.asarray(thumbnail.reshape(1, -1)),
    grid=(2, 2),
    temperature=1e9,
  )
  np.testing.assert_allclose(even, 0.25, atol=1e-6)


def test_budgets_of_even_thumbnails_and_single_crops():
  even = run(
    scores.crop_budgets, jnp.ones((1, 16)), grid=(2, 2), keep_ratio=0.3
  )
  np.testing.assert_allclose(even, 0.3, rtol=1e-6)
  one = run(scores.crop_budgets, jnp.arange(16.0)[None], grid=(1, 1))
  np.testing.assert_allclose(one, 0.25, rtol=1e-6)
  full = run(
    scores.crop_budgets, jnp.arange(16.0)[None], grid=(2, 2), keep_ratio=1.0
  )
  assert float(full.max()) == 1 and float(full.min()) < 1


@pytest.mark.parametrize("grid", [(2, 2), (1, 3), (3, 2)])
def test_budgets_equal_a_loop(grid):
  side = 5
  thumbnail = np.random.default_rng(0).normal(size=(100, 25)) * 5
  got = run(
    scores.crop_budgets,
    jnp.asarray(thumbnail, "float32"),
    grid=grid,
    keep_ratio=0.6,
    temperature=4.0,
  )
  for g, s in zip(np.asarray(got), thumbnail, strict=True):
    total = np.zeros(grid)
    for y in range(side):
      for x in range(side):
        row = min(y // (side // grid[0]), grid[0] - 1)
        column = min(x // (side // grid[1]), grid[1] - 1)
        total[row, column] += s[y * side + x]
    power = np.exp((total - total.max()) / 4).reshape(-1)
    sigma = power / power.sum()
    want = np.minimum(1, 0.6 * (1 + sigma - sigma.mean()))
    np.testing.assert_allclose(g, want, atol=1e-5)


def stretched(thumbnail, height, width):
  """Bilinear resize with pixel centers, one output at a time."""
  side = thumbnail.shape[0]
  out = np.zeros((height, width))
  for y in range(height):
    for x in range(width):
      v = min(max((y + 0.5) * side / height - 0.5, 0), side - 1)
      u = min(max((x + 0.5) * side / width - 0.5, 0), side - 1)
      i, j = math.floor(v), math.floor(u)
      k, m = min(i + 1, side - 1), min(j + 1, side - 1)
      a, b = v - i, u - j
      out[y, x] = (1 - a) * (
        (1 - b) * thumbnail[i, j] + b * thumbnail[i, m]
      ) + a * ((1 - b) * thumbnail[k, j] + b * thumbnail[k, m])
  return out


def holistic(local, thumbnail, mask, grid, alpha):
  """Scores [n, N] of one picture, -inf outside of it."""
  side = math.isqrt(local.shape[1])
  inside = np.zeros((grid[0] * side, grid[1] * side), bool)
  for j in range(len(local)):
    top, left = (j // grid[1]) * side, (j % grid[1]) * side
    inside[top : top + side, left : left + side] = mask[j].reshape(side, side)
  rows, columns = inside.any(1), inside.any(0)
  canvas = np.zeros(inside.shape)
  canvas[np.ix_(rows, columns)] = stretched(
    thumbnail.reshape(side, side).astype(np.float64), rows.sum(), columns.sum()
  )
  out = np.full(local.shape, -np.inf)
  for j in range(len(local)):
    top, left = (j // grid[1]) * side, (j % grid[1]) * side
    g = canvas[top : top + side, left : left + side].reshape(-1)[mask[j]]
    s = local[j][mask[j]].astype(np.float64)
    if alpha is None:
      lengths = [max(np.linalg.norm(v), 1e-12) for v in (s, g)]
      both = s / lengths[0] + g / lengths[1]
    else:
      both = alpha * g + (1 - alpha) * s
    out[j, mask[j]] = both
  return out


@pytest.mark.parametrize("alpha", [None, 0.3])
def test_holistic_scores_equal_a_loop(alpha):
  _, _, thumbnail, local, mask = pictures(1)
  got = run(
    scores.holistic_scores,
    np.where(mask, local, np.nan),
    thumbnail,
    mask,
    grid=(2, 3),
    alpha=alpha,
  )
  for g, s, t, m in zip(np.asarray(got), local, thumbnail, mask, strict=True):
    want = holistic(s, t, m, (2, 3), alpha)
    np.testing.assert_array_equal(np.isfinite(g), m)
    np.testing.assert_allclose(g[m], want[m], atol=1e-5)


def test_stretching_is_that_of_image_resizing():
  thumbnail = np.random.default_rng(2).normal(size=(1, 16)).astype(np.float32)
  got = run(
    scores.holistic_scores,
    jnp.zeros((1, 6, 16)),
    jnp.asarray(thumbnail),
    grid=(2, 3),
    alpha=1.0,
  )
  want = jax.image.resize(
    thumbnail.reshape(4, 4), (8, 12), "bilinear", antialias=False
  )
  canvas = scores.canvas_of_crops(got[0], (2, 3))
  np.testing.assert_allclose(canvas, want, atol=1e-5)
  np.testing.assert_array_equal(scores.crops_of_canvas(canvas, (2, 3)), got[0])


def method_oracle(example, ratio, grid, keep_ratio, alpha, newline):
  """Positions in the stream, in order, and the closest decision."""
  _, crops, thumbnail, local, mask = example
  tokens, side = len(thumbnail), math.isqrt(len(thumbnail))
  gap = np.inf

  def best(score, number):
    nonlocal gap
    order = sorted(range(len(score)), key=lambda n: (-score[n], n))
    if 0 < number < len(order) and np.isfinite(score[order[number]]):
      lead = score[order[number - 1]] - score[order[number]]
      gap = min(gap, lead if lead > 1e-12 else np.inf)
    return order[:number]

  first = sorted(best(thumbnail, int(tokens * keep_ratio)))
  score = holistic(local, thumbnail, mask, grid, alpha)
  keep = set()
  for j in range(len(crops)):
    exact = mask[j].sum() * ratio[j]
    gap = min(gap, abs(exact - round(exact)) if exact % 1 else np.inf)
    for n in best(score[j], int(exact)):
      keep.add(
        ((j // grid[1]) * side + n // side, (j % grid[1]) * side + n % side)
      )
  rows, columns = grid[0] * side, grid[1] * side
  index = list(first)
  place = tokens
  for y in range(rows):
    crop_row = slice((y // side) * grid[1], (y // side + 1) * grid[1])
    shown = mask[crop_row].reshape(grid[1], side, side)[:, y % side].any()
    for x in range(columns + newline):
      if (y, x) in keep or (x == columns and shown):
        index.append(place)
      place += 1
  return index, gap


@pytest.mark.parametrize("compat", [None, "reference"])
@pytest.mark.parametrize("newline", [False, True])
@pytest.mark.parametrize("keep_ratio", [1 / 15, 0.4, 1.0])
def test_method_equals_the_oracle(compat, newline, keep_ratio):
  grid = (2, 3)
  arrays = pictures(3, number=100)
  line = np.array([1.0, 2.0, 3.0], np.float32) if newline else None
  thumbnail, crops, thumbnail_scores, local, mask = arrays
  hidden = mask[..., None]
  out = jax.device_get(
    jax.jit(
      lambda *a: run(
        global_com.global_com,
        *a,
        line,
        grid=grid,
        keep_ratio=keep_ratio,
        compat=compat,
      )
    )(
      thumbnail,
      np.where(hidden, crops, np.nan),
      thumbnail_scores,
      np.where(mask, local, np.nan),
      mask,
    )
  )
  ratio = np.asarray(
    run(scores.crop_budgets, thumbnail_scores, grid=grid, keep_ratio=keep_ratio)
  )
  alpha = 0.5 if compat is None else None
  num_thumbnail, checked = int(16 * keep_ratio), 0
  for b in range(len(mask)):
    example = [a[b] for a in arrays]
    want, gap = method_oracle(
      example, ratio[b], grid, keep_ratio, alpha, newline
    )
    if gap < 1e-5:
      continue
    checked += 1
    index = out.index[b][out.mask[b]].tolist()
    assert sorted(index) == want
    assert index[num_thumbnail:] == want[num_thumbnail:]
    if compat is None:
      assert index == want
    else:
      falling = thumbnail_scores[b][index[:num_thumbnail]]
      assert (np.diff(falling) <= 0).all()
    canvas = np.asarray(scores.canvas_of_crops(jnp.asarray(crops[b]), grid))
    if newline:
      canvas = np.concatenate([canvas, np.tile(line, (8, 1, 1))], axis=1)
    stream = np.concatenate([thumbnail[b], canvas.reshape(-1, 3)])
    np.testing.assert_array_equal(out.tokens[b][out.mask[b]], stream[index])
    assert not out.tokens[b][~out.mask[b]].any()
    np.testing.assert_array_equal(out.position_ids[b], out.index[b])
  assert checked > 70


def test_a_single_crop_and_everything():
  thumbnail, crops, t, s, _ = pictures(4, grid=(1, 1), number=2)
  quarter = run(global_com.global_com, thumbnail, crops, t, s, grid=(1, 1))
  assert quarter.mask.sum(axis=1).tolist() == [8, 8]
  whole = run(
    global_com.global_com,
    thumbnail,
    crops,
    t,
    s,
    grid=(1, 1),
    compat="reference",
  )
  assert whole.mask.sum(axis=1).tolist() == [20, 20]
  np.testing.assert_array_equal(whole.tokens[:, 4:], crops[:, 0])
  every = run(
    global_com.global_com, thumbnail, crops, t, s, grid=(1, 1), keep_ratio=1.0
  )
  stream = np.concatenate([thumbnail, crops[:, 0]], axis=1)
  np.testing.assert_array_equal(every.tokens, stream)
  renumbered = run(
    global_com.global_com,
    thumbnail,
    crops,
    t,
    s,
    grid=(1, 1),
    positions="renumber",
  )
  np.testing.assert_array_equal(renumbered.position_ids[0], np.arange(8))


def test_gradients_reach_kept_tokens_only():
  thumbnail, crops, t, s, mask = (jnp.asarray(a) for a in pictures(5, number=2))

  def total(thumbnail, crops, t, s):
    out = run(global_com.global_com, thumbnail, crops, t, s, mask, grid=(2, 3))
    return jnp.sum(out.tokens), out

  gradients, out = jax.grad(total, (0, 1, 2, 3), has_aux=True)(
    thumbnail, crops, t, s
  )
  kept = sum(float(g[..., 0].sum()) for g in gradients[:2])
  assert kept == float(out.mask.sum())
  for g in gradients[:2]:
    assert set(np.unique(g)) == {0.0, 1.0}
  assert not any(np.asarray(g).any() for g in gradients[2:])


def test_unpadded_mask_is_the_rule_of_the_host():
  for height, width in ((3, 7), (7, 3), (5, 5), (1, 9), (336, 672)):
    for grid in ((2, 2), (1, 3), (3, 1)):
      rows, columns = 6 * grid[0], 6 * grid[1]
      if width / height > columns / rows:
        pad = (rows - int(height * columns / width)) // 2
        want = (rows - 2 * pad) * columns
      else:
        pad = (columns - int(width * rows / height)) // 2
        want = rows * (columns - 2 * pad)
      mask = scores.unpadded_mask((height, width), grid=grid, side=6)
      assert mask.shape == (grid[0] * grid[1], 36) and mask.sum() == want
      canvas = np.asarray(scores.canvas_of_crops(jnp.asarray(mask), grid))
      np.testing.assert_array_equal(canvas, canvas[::-1, ::-1])


def test_class_scores_equal_a_loop():
  random = np.random.default_rng(6)
  q = random.normal(size=(3, 2, 4)).astype(np.float32)
  k = random.normal(size=(3, 2, 6, 4)).astype(np.float32)
  logit = np.array(
    [
      [[q[b, h] @ k[b, h, s] / 2 for s in range(6)] for h in range(2)]
      for b in range(3)
    ]
  )
  got = run(scores.class_scores, q, k)
  np.testing.assert_allclose(got, logit[:, :, 1:].mean(axis=1), atol=1e-6)
  power = np.exp(logit) / np.exp(logit).sum(axis=2, keepdims=True)
  got = run(scores.class_scores, q, k, kind="prob")
  np.testing.assert_allclose(got, power[:, :, 1:].mean(axis=1), atol=1e-6)


def test_no_class_scores_equal_a_loop():
  random = np.random.default_rng(7)
  x = random.normal(size=(5, 8, 3)).astype(np.float32)
  mask = random.random((5, 8)) < 0.7
  mask[0] = True
  got = run(
    scores.no_class_scores,
    np.where(mask[..., None], x, np.nan),
    jnp.asarray(mask),
  )
  for g, one, m in zip(
    np.asarray(got), x.astype(np.float64), mask, strict=True
  ):
    mean = one[m].mean(axis=0)
    for n in range(8):
      want = -one[n] @ mean / np.linalg.norm(one[n]) / np.linalg.norm(mean)
      assert abs(g[n] - (want if m[n] else 0)) < 1e-5


@pytest.mark.unchecked
def test_errors():
  thumbnail, crops, t, s, mask = pictures(8, number=2)
  with pytest.raises(ValueError, match="grid_cells=4, crops=6"):
    global_com.global_com(thumbnail, crops, t, s, grid=(2, 2))
  with pytest.raises(ValueError, match="tokens must form a square, got 15"):
    scores.crop_budgets(t[:, :15], grid=(2, 2))
  with pytest.raises(ValueError, match="grid_rows must lie in 1..4, got 5"):
    scores.crop_budgets(t, grid=(5, 2))
  with pytest.raises(ValueError, match="keep_ratio must lie in 0..1, got 2"):
    global_com.global_com(thumbnail, crops, t, s, grid=(2, 3), keep_ratio=2)
  with pytest.raises(ValueError, match="crop_tokens=16, mask_tokens=15"):
    scores.holistic_scores(s, t, mask[:, :, :15], grid=(2, 3))
  with pytest.raises(ValueError, match="kind must be one of 'logit', 'prob'"):
    scores.class_scores(jnp.ones((1, 1, 2)), jnp.ones((1, 1, 3, 2)), kind="x")
  with pytest.raises(ValueError, match="x_tokens=16, mask_tokens=15"):
    scores.no_class_scores(thumbnail, jnp.ones((2, 15), bool))

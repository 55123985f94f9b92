"""HiPrune against its definition by sets, in plain Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import compiled
from tokjax.reduction import hiprune

hiprune = compiled(hiprune)

GRID = (3, 4)


def case(seed, batch=100, grid=GRID, coarse=False, width=3):
  """Scores below 1, with ties when coarse; masked entries hold NaN."""
  rng = np.random.default_rng(seed)
  tokens = grid[0] * grid[1]
  features = rng.normal(size=(batch, tokens, width)).astype(np.float32)
  scores = rng.random((2, batch, tokens)).astype(np.float32)
  if coarse:
    scores = np.floor(scores * 5) / 8
  mask = rng.random((batch, tokens)) < 0.8
  mask[0], mask[1] = True, False
  features = np.where(mask[..., None], features, np.float32(np.nan))
  shallow, deep = np.where(mask, scores, np.float32(np.nan))
  return features, shallow, deep, mask


def highest(scores, candidates, count):
  order = sorted(candidates, key=lambda j: (-scores[j], j))
  return order[: max(count, 0)]


def around(anchor, grid, compat):
  rows, columns = grid
  last = rows * columns - 1
  if compat == "reference":
    steps = (-1, 1, -columns, columns)
    return {min(max(anchor + step, 0), last) for step in steps}
  row, column = divmod(anchor, columns)
  places = [(row, column - 1), (row, column + 1)]
  places += [(row - 1, column), (row + 1, column)]
  return {
    r * columns + c for r, c in places if 0 <= r < rows and 0 <= c < columns
  }


def by_sets(shallow, deep, mask, num_keep, alpha, grid, compat):
  valid = [int(j) for j in np.flatnonzero(mask)]
  anchors = highest(shallow, valid, round(num_keep * alpha / 5))
  buffers = set().union(*(around(a, grid, compat) for a in anchors))
  buffers = (buffers & set(valid)) - set(anchors)
  chosen = anchors + highest(shallow, buffers, num_keep - len(anchors))
  room = num_keep - len(chosen)
  if compat == "reference":
    lowered = np.array(deep, np.float64)
    lowered[chosen] -= 1
    return sorted(set(chosen) | set(highest(lowered, valid, room)))
  rest = set(valid) - set(chosen)
  return sorted(chosen + highest(deep, rest, room))


reduce_jit = jax.jit(
  hiprune.hiprune, static_argnames=("num_keep", "alpha", "grid", "compat")
)


def compare(given, num_keep, alpha, compat, grid=GRID):
  got = jax.device_get(
    reduce_jit(*given, num_keep=num_keep, alpha=alpha, grid=grid, compat=compat)
  )
  features, shallow, deep, mask = given
  counts = []
  for b in range(len(features)):
    want = by_sets(shallow[b], deep[b], mask[b], num_keep, alpha, grid, compat)
    np.testing.assert_array_equal(got.index[b, : len(want)], want)
    np.testing.assert_array_equal(got.mask[b], np.arange(num_keep) < len(want))
    np.testing.assert_array_equal(got.tokens[b, : len(want)], features[b, want])
    counts.append(len(want))
  return np.array(counts)


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("compat", ["grid", "reference"])
@pytest.mark.parametrize(
  # Without anchors; one; two whose neighbours may overlap; too many for the
  # room; all.
  "num_keep, alpha",
  [(6, 0.0), (6, 0.8), (10, 1.0), (3, 1.0), (1, 1.0), (12, 0.5)],
)
def test_equals_the_definition_by_sets(num_keep, alpha, compat, coarse):
  for seed in range(2):
    given = case(seed, coarse=coarse)
    counts = compare(given, num_keep, alpha, compat)
    valid = given[3].sum(axis=1)
    np.testing.assert_array_equal(counts, np.minimum(valid, num_keep))


def test_sums_let_the_reference_pick_twice():
  # Column sums instead of means: subtracting 1 does not exclude.
  features, shallow, deep, mask = case(3)
  given = (features, shallow, deep * 12, mask)
  counts = compare(given, 6, 1.0, "reference")
  assert (counts < np.minimum(mask.sum(axis=1), 6)).any()
  counts = compare(given, 6, 1.0, "grid")
  np.testing.assert_array_equal(counts, np.minimum(mask.sum(axis=1), 6))


def test_four_by_four_by_hand():
  shallow = jnp.zeros((1, 16)).at[0, 5].set(1.0)
  deep = jnp.full((1, 16), 0.03)
  for token, value in ((0, 0.2), (3, 0.15), (15, 0.1)):
    deep = deep.at[0, token].set(value)
  for compat in ("grid", "reference"):
    kept = hiprune.hiprune(
      jnp.ones((1, 16, 2)),
      shallow,
      deep,
      num_keep=8,
      grid=(4, 4),
      alpha=0.625,
      compat=compat,
    )
    assert kept.index.tolist() == [[0, 1, 3, 4, 5, 6, 9, 15]]


def test_neighbours_of_a_corner_differ():
  # Anchor 3 ends the first row of four: the flat order wraps to 4 and clamps
  # -1 to 0; on the grid only 2 and 7 are beside it.
  shallow = jnp.zeros((1, 12)).at[0, 3].set(1.0)
  deep = jnp.zeros((1, 12)).at[0, 11].set(0.5)
  kept = {
    compat: hiprune.hiprune(
      jnp.ones((1, 12, 2)),
      shallow,
      deep,
      num_keep=5,
      grid=GRID,
      alpha=1.0,
      compat=compat,
    ).index.tolist()
    for compat in ("grid", "reference")
  }
  assert kept["grid"] == [[0, 2, 3, 7, 11]]  # 0 is the first of the ties
  assert kept["reference"] == [[0, 2, 3, 4, 7]]


def test_without_anchors_registers_are_the_highest_of_deep():
  features, shallow, deep, mask = map(jnp.asarray, case(4))
  got = hiprune.hiprune(
    features, shallow, deep, mask, num_keep=5, grid=GRID, alpha=0.0
  )
  other = hiprune.hiprune(
    features, deep, deep, mask, num_keep=5, grid=GRID, alpha=0.0
  )
  np.testing.assert_array_equal(got.index, other.index)


def test_isolated_anchors_leave_no_room_for_registers():
  shallow = jnp.zeros((1, 81)).at[0, jnp.array([10, 16, 40])].set(1.0)
  deep = jnp.arange(81.0)[None] / 100
  kept = hiprune.hiprune(
    jnp.ones((1, 81, 2)), shallow, deep, num_keep=15, grid=(9, 9), alpha=1.0
  )
  want = [a + step for a in (10, 16, 40) for step in (-9, -1, 0, 1, 9)]
  assert kept.index.tolist() == [sorted(want)]


@pytest.mark.parametrize("num_keep, alpha, anchors", [
  (192, 0.1, 4), (128, 0.1, 3), (64, 0.1, 1), (24, 0.1, 0),
])  # fmt: skip
def test_number_of_anchors_is_the_papers(num_keep, alpha, anchors):
  # Anchors lie apart and low in the image, registers fill it from the top.
  shallow = jnp.zeros((1, 576))
  for i, (row, column) in enumerate(
    ((10, 3), (10, 12), (14, 3), (14, 12), (20, 20))
  ):
    shallow = shallow.at[0, 24 * row + column].set(1.0 - i / 10)
  deep = jnp.arange(576.0)[::-1][None] / 1000
  kept = hiprune.hiprune(
    jnp.ones((1, 576, 1)),
    shallow,
    deep,
    num_keep=num_keep,
    grid=(24, 24),
    alpha=alpha,
  )
  assert int(jnp.sum(kept.index >= 9 * 24)) == 5 * anchors
  assert int(kept.index[0, 0]) == 0 and bool(kept.mask.all())


def text_case(seed):
  features, shallow, deep, mask = case(seed)
  rng = np.random.default_rng(seed)
  text = rng.normal(size=(len(features), 5, 3)).astype(np.float32)
  text_mask = rng.random(text.shape[:2]) < 0.7
  text_mask[:, 0] = True
  text = np.where(text_mask[..., None], text, np.float32(np.nan))
  return features, shallow, deep, mask, text, text_mask


def test_text_adds_the_closest_of_the_rest():
  given = text_case(5)
  features, shallow, deep, mask, text, text_mask = given
  got = hiprune.hiprune(
    *map(jnp.asarray, given), num_keep=5, grid=GRID, alpha=1.0, beta=0.4
  )
  assert got.index.shape[1] == 5 + 2
  for b in range(len(features)):
    base = by_sets(shallow[b], deep[b], mask[b], 5, 1.0, GRID, "grid")
    mean = text[b, text_mask[b]].astype(float).mean(axis=0)
    wide = features[b].astype(float)
    cosine = wide @ mean / np.linalg.norm(wide, axis=1) / np.linalg.norm(mean)
    rest = set(map(int, np.flatnonzero(mask[b]))) - set(base)
    want = sorted(base + highest(cosine, rest, 2))
    np.testing.assert_array_equal(got.index[b, : len(want)], want)
    assert int(got.mask[b].sum()) == len(want)


def test_gradient_goes_to_kept_features_only():
  given = [jnp.nan_to_num(jnp.asarray(x)) for x in text_case(6)[:3]]
  mask = jnp.asarray(text_case(6)[3])
  text = jnp.nan_to_num(jnp.asarray(text_case(6)[4]))

  def total(features, shallow, deep, text):
    kept = hiprune.hiprune(
      features, shallow, deep, mask, text, num_keep=5, grid=GRID, beta=0.2
    )
    return jnp.sum(kept.tokens), kept.mask

  gradients, kept = jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True)(
    *given, text
  )
  np.testing.assert_array_equal(
    gradients[0].sum(axis=(1, 2)), 3 * kept.sum(axis=1)
  )
  assert set(np.unique(gradients[0])) <= {0, 1}
  for gradient in gradients[1:]:
    np.testing.assert_array_equal(gradient, jnp.zeros_like(gradient))


def test_received_is_the_mean_over_heads_and_valid_rows():
  rng = np.random.default_rng(0)
  q, k = rng.normal(size=(2, 6, 2, 9, 4)).astype(np.float32)
  mask = rng.random((6, 9)) < 0.7
  mask[:, 0] = True
  hidden = ~mask[:, None, :, None]
  q, k = (np.where(hidden, np.float32(np.nan), x) for x in (q, k))
  got = hiprune.received_scores(*map(jnp.asarray, (q, k, mask)))
  for b in range(6):
    seen = np.flatnonzero(mask[b])
    want = np.zeros(9)
    for h in range(2):
      e = np.exp(q[b, h, seen].astype(float) @ k[b, h, seen].T / 2)
      p = e / e.sum(axis=1, keepdims=True)
      want[seen] += p.mean(axis=0) / 2
    np.testing.assert_allclose(got[b], want[1:], atol=1e-6)


def test_received_in_windows_and_groups():
  rng = np.random.default_rng(1)
  q, k = map(jnp.asarray, rng.normal(size=(2, 2, 2, 8, 4)).astype(np.float32))
  ids = jnp.array([[0] * 4 + [1] * 4] * 2, jnp.int32)
  got = hiprune.received_scores(
    q, k, num_prefix=0, segment_ids=ids, group_size=2
  )
  halves = [
    hiprune.received_scores(q[:, :, part], k[:, :, part], num_prefix=0) / 2
    for part in (slice(0, 4), slice(4, 8))
  ]
  want = jnp.concatenate(halves, axis=1).reshape(2, 4, 2).mean(axis=-1)
  np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.unchecked
@pytest.mark.parametrize(
  "change, message",
  [
    (dict(shallow=(2, 11)), "shallow_tokens=11"),
    (dict(mask=(2, 11)), "features_tokens=12, mask_tokens=11"),
    (dict(grid=(3, 3)), "features_tokens=12, grid_cells=9"),
    (dict(num_keep=13), "num_keep must lie in 1..12, got 13"),
    (dict(alpha=1.5), "alpha must lie in 0..1, got 1.5"),
    (dict(compat="code"), "compat must be one of 'grid', 'reference'"),
    (dict(text=(2, 4, 5)), "features_dim=3, text_dim=5"),
    (dict(text=(2, 4, 3), num_keep=12), "num_keep_with_text"),
  ],
)
def test_errors_name_the_argument(change, message):
  given = dict(
    features=(2, 12, 3), shallow=(2, 12), deep=(2, 12), num_keep=6, grid=GRID
  )
  given["beta"] = 0.5
  given |= change
  given = {
    name: jnp.zeros(value, bool if name == "mask" else jnp.float32)
    if isinstance(value, tuple) and name != "grid"
    else value
    for name, value in given.items()
  }
  with pytest.raises(ValueError, match=message):
    hiprune.hiprune(**given)


@pytest.mark.unchecked
def test_received_errors():
  x = jnp.zeros((1, 2, 9, 4))
  with pytest.raises(ValueError, match="patches must be a multiple of 3"):
    hiprune.received_scores(x, x, group_size=3)
  with pytest.raises(ValueError, match="q_tokens=9, k_tokens=8"):
    hiprune.received_scores(x, x[:, :, 1:])
  with pytest.raises(ValueError, match="num_prefix must lie in 0..8, got 9"):
    hiprune.received_scores(x, x, num_prefix=9)

"""Codebooks: moving means, resets, and what may be trained by what."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from tests.compiled import run
from tokjax.tokenizers import code_resets, codebook
from tokjax.tokenizers.codebook import Codebook, CodebookConfig, CodebookState


def config(**settings):
  defaults = {"num_codes": 6, "dim": 3, "learning": "ema"}
  return CodebookConfig(**(defaults | settings))


def state_of(codes):
  codes = np.asarray(codes, np.float32)
  return CodebookState(np.ones(len(codes), np.float32), codes, codes)


def step(settings, state, x, index, seed=0):
  return run(
    codebook.update,
    state,
    x,
    index,
    config=settings,
    key=jax.random.key(seed),
  )


def test_worked_example_of_moving_means():
  settings = config(num_codes=2, dim=2, decay=0.9)
  x = np.array([[0.2, 0], [0.9, 0.1], [1.1, 0.3]], np.float32)
  got = step(settings, state_of([[0, 0], [1, 0]]), x, np.array([0, 1, 1]))
  np.testing.assert_allclose(got.counts, [1.0, 1.1], rtol=1e-6)
  np.testing.assert_allclose(got.sums, [[0.02, 0], [1.1, 0.04]], rtol=1e-5)
  want = [[0.02, 0], [1.0, 0.0363636]]
  np.testing.assert_allclose(got.codes, want, rtol=1e-4)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_equals_a_loop(metric):
  random = np.random.default_rng(0)
  settings = config(metric=metric, decay=0.7)
  codes = random.normal(size=(6, 3))
  x = random.normal(size=(2, 20, 3)).astype(np.float32)
  index = random.integers(-1, 5, (2, 20))
  got = step(settings, state_of(codes), x, index)
  counts, sums = 0.7 * np.ones(6), 0.7 * codes
  for row, k in zip(x.reshape(-1, 3).astype(float), index.ravel(), strict=True):
    if k >= 0:
      counts[k] += 0.3
      length = np.linalg.norm(row) if metric == "cosine" else 1
      sums[k] += 0.3 * row / length
  smooth = (counts + 1e-5) / (counts.sum() + 6e-5) * counts.sum()
  want = sums / smooth[:, None]
  if metric == "cosine":
    want /= np.linalg.norm(want, axis=1, keepdims=True)
  np.testing.assert_allclose(got.counts, counts, rtol=1e-5)
  np.testing.assert_allclose(got.codes, want, rtol=1e-4, atol=1e-6)


def test_on_one_batch_moving_means_become_those_of_k_means():
  random = np.random.default_rng(1)
  centers = np.array([[0, 0], [8, 0], [0, 8]])
  x = (centers[np.arange(60) % 3] + random.normal(size=(60, 2))).astype("f4")
  settings = config(num_codes=3, dim=2, decay=0.5)

  @jax.jit
  def train(state):
    def one(state, _):
      far = jnp.sum((x[:, None] - state.codes[None]) ** 2, -1)
      index = jnp.argmin(far, -1)
      return codebook.update(state, x, index, config=settings), None

    return jax.lax.scan(one, state, length=40)[0]

  got = train(state_of(centers + 1))
  want = [x[k::3].mean(0) for k in range(3)]
  np.testing.assert_allclose(got.codes, want, atol=1e-4)


def test_dead_codes_become_vectors_of_the_batch_that_count():
  settings = config(reset="batch", reset_threshold=0.95, decay=0.9)
  x = np.arange(24, dtype=np.float32).reshape(8, 3) + 100
  index = np.array([0, 0, 1, 1, -1, -1, 1, 0])
  codes = np.arange(18).reshape(6, 3)
  got = step(settings, state_of(codes), x, index)
  alive = {tuple(row) for row, k in zip(x, index, strict=True) if k >= 0}
  for k in range(2, 6):
    assert tuple(got.codes[k].tolist()) in alive
    assert got.counts[k] == np.float32(0.95)
    np.testing.assert_allclose(got.sums[k], got.codes[k] * 0.95, rtol=1e-6)
  assert len({tuple(row.tolist()) for row in got.codes[2:]}) == 4  # all others
  kept = step(config(decay=0.9), state_of(codes), x, index)
  np.testing.assert_array_equal(got.codes[:2], kept.codes[:2])
  again = step(settings, state_of(codes), x, index, seed=1)
  assert not np.array_equal(got.codes, again.codes)


def test_nothing_is_reset_from_a_batch_without_vectors():
  settings = config(reset="batch", reset_threshold=10.0)
  x, index = np.ones((4, 3), np.float32), np.full(4, -1)
  got = step(settings, state_of(np.arange(18).reshape(6, 3)), x, index)
  assert np.all(np.isfinite(got.codes)) and np.all(got.counts < 1)


def test_the_most_used_code_gives_half_to_the_least_used():
  settings = config(num_codes=3, dim=2, reset="split", reset_threshold=0.5,
                    decay=0.0)  # fmt: skip
  x = np.array([[4, 2]] * 8 + [[1, 1]] * 3, np.float32)
  index = np.array([0] * 8 + [1] * 3)
  got = step(settings, state_of(np.zeros((3, 2))), x, index)
  np.testing.assert_array_equal(got.counts, [4, 3, 4])
  np.testing.assert_allclose(got.codes[0], [4, 2], rtol=1e-4)
  np.testing.assert_allclose(got.codes[2], [4, 2], rtol=0.011)
  assert not np.allclose(got.codes[2], got.codes[0], rtol=1e-5)


def test_how_far_codes_move_to_their_anchors():
  """The published weights of 4,096 codes: .9990, .0166 and none."""
  number = 4096
  usage = np.full(number, 1.0, np.float32)
  usage[:3] = 0, 1e-6 / 0.99, 1 / number / 0.99
  hits = np.zeros(number, np.int32)
  hits[3] = 8
  rows, mask = np.array([[1.0], [np.nan]], np.float32), np.array([True, False])
  got = run(
    code_resets.toward_anchors,
    np.zeros((number, 1), np.float32), usage, hits, rows, mask,
  )  # fmt: skip
  np.testing.assert_allclose(got.codes[:3, 0], [0.9990, 0.0166, 0], atol=5e-5)
  np.testing.assert_allclose(got.usage[:4], [0, 1e-6, 1 / number, 1], 1e-5)
  nothing = run(
    code_resets.toward_anchors,
    np.ones((number, 1), np.float32), usage, hits * 0, rows, mask & False,
  )  # fmt: skip
  assert np.all(nothing.codes == 1)
  np.testing.assert_array_equal(nothing.usage, usage)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("learning", ["ema", "gradient"])
def test_anchors_equal_a_loop(learning, metric):
  random = np.random.default_rng(4)
  settings = config(
    metric=metric, learning=learning, reset="anchors", decay=0.9
  )  # fmt: skip
  codes = random.normal(size=(6, 3))
  x = 3 * random.normal(size=(20, 3)).astype(np.float32)
  index = random.integers(-1, 4, 20)
  usage = np.array([0.3, 0.01, 0.0, 0.02, 0.001, 0.0], np.float32)
  state = state_of(codes)._replace(usage=usage)
  parameter = None
  if learning == "gradient":
    shift = np.full((6, 3), 0.25, np.float32)
    parameter = codes.astype(np.float32) - shift
    state = CodebookState(state.counts, usage=usage, shift=shift)
  got = run(codebook.update, state, x, index, config=settings, codes=parameter)

  def unit(y):
    length = np.linalg.norm(y, axis=-1, keepdims=True)
    return y / length if metric == "cosine" else y

  want = codes.copy()
  kept = x[index >= 0].astype(float)
  hits = np.bincount(index[index >= 0], minlength=6)
  counts = 0.9 + 0.1 * hits
  smooth = (counts + 1e-5) / (counts.sum() + 6e-5) * counts.sum()
  if learning == "ema":
    sums = 0.9 * codes
    for row, k in zip(unit(x.astype(float)), index, strict=True):
      if k >= 0:
        sums[k] += 0.1 * row
    want = unit(sums / smooth[:, None])
  share = 0.9 * usage + 0.1 * hits / hits.sum()
  for k in range(6):
    weight = np.exp(-share[k] * 6 * 10 / (1 - 0.9) - 1e-3)
    nearest = np.argmin(((unit(kept) - unit(want[k])) ** 2).sum(-1))
    want[k] = (1 - weight) * want[k] + weight * kept[nearest]
  np.testing.assert_allclose(got.usage, share, rtol=1e-5)
  if learning == "gradient":
    np.testing.assert_allclose(parameter + got.shift, want, atol=2e-5)
  else:
    np.testing.assert_allclose(got.codes, unit(want), atol=2e-5)
    sums = unit(want) * smooth[:, None]
    np.testing.assert_allclose(got.sums, sums, atol=2e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("reset", ["none", "batch", "split", "anchors"])
def test_over_eight_devices_equals_one(reset, kind):
  random = np.random.default_rng(2)
  settings = config(num_codes=16, reset=reset, decay=0.5)
  state = state_of(random.normal(size=(16, 3)))
  if reset == "anchors":
    state = state._replace(usage=np.zeros(16, np.float32))
  x = random.normal(size=(64, 3)).astype(np.float32)
  index = random.integers(-1, 9, 64)
  want = step(settings, state, x, index)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
  rows = jax.NamedSharding(mesh, jax.P("data"))
  x, index = jax.device_put((x, index), rows)
  sharded = jax.shard_map(
    functools.partial(
      codebook.update,
      config=settings,
      key=jax.random.key(0),
      axis_name="data",
    ),
    mesh=mesh,
    in_specs=(jax.P(), jax.P("data"), jax.P("data")),
    out_specs=jax.P(),
  )
  got = jax.jit(sharded)(state, x, index)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
    got,
    want,
  )


def test_state_gets_no_gradient_and_a_matrix_moves_all_codes():
  rngs, x = nnx.Rngs(0), np.ones((2, 3), np.float32)
  book = Codebook(config(learning="simvq"), rngs=rngs)
  state = book.init_state(jax.random.key(1))
  np.testing.assert_allclose(book.table(state), state.codes, rtol=1e-6)

  @jax.jit
  def gradients(book, state):
    loss = lambda book, state: jnp.sum((x - book.table(state)[:2]) ** 2)  # noqa: E731
    return jax.grad(loss, argnums=(0, 1))(book, state)

  of_book, of_state = gradients(book, state)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_state))
  moved = state.codes @ of_book.mix[...]
  assert np.all(np.abs(moved).sum(-1) > 1e-3)  # the unused codes, too
  after = run(
    codebook.update, state, x, np.array([0, 1]), config=book.config
  )  # fmt: skip
  np.testing.assert_array_equal(after.codes, state.codes)
  assert after.counts[0] > after.counts[2]


def test_optimisers_see_only_what_they_may_change():
  sizes = {
    learning: sum(x.size for x in jax.tree.leaves(jax.eval_shape(
      lambda learning=learning: Codebook(
        config(learning=learning), rngs=nnx.Rngs(0)
      ))))
    for learning in ("gradient", "ema", "simvq")
  }  # fmt: skip
  assert sizes == {"gradient": 18, "ema": 0, "simvq": 9}


def test_k_means_of_the_first_batch():
  x = np.array([[0.0, 0], [0, 2], [9, 0], [9, 2], [50, 50]], np.float32)
  mask = np.array([1, 1, 1, 1, 0], bool)
  got = codebook.from_data(
    jax.random.key(3), x, mask, config=config(num_codes=2, dim=2)
  )
  order = np.argsort(got.codes[:, 0])
  np.testing.assert_allclose(got.codes[order], [[0, 1], [9, 1]], atol=1e-6)
  np.testing.assert_array_equal(got.counts, [2, 2])
  np.testing.assert_allclose(got.sums, got.codes * 2)


@pytest.mark.unchecked
@pytest.mark.parametrize("settings, message", [
  ({"learning": "magic"}, "learning must be one of"),
  ({"metric": "manhattan"}, "metric must be one of"),
  ({"reset": "often"}, "reset must be one of"),
  ({"decay": 1.5}, "decay must lie in"),
  ({"num_codes": 0}, "num_codes must lie in"),
  ({"reset": "batch", "learning": "gradient"}, 'needs learning "ema"'),
  ({"reset": "anchors", "learning": "simvq"}, 'learning "ema" or "gradient"'),
  ({"reset": "anchors", "decay": 1}, "decay must be below 1"),
])  # fmt: skip
def test_settings_that_cannot_be(settings, message):
  with pytest.raises(ValueError, match=message):
    Codebook(config(**settings), rngs=nnx.Rngs(0))


def test_errors():
  x, index = jnp.ones((2, 3)), jnp.zeros(2, jnp.int32)
  with pytest.raises(ValueError, match="key must be given for reset 'batch'"):
    codebook.update(
      state_of(np.ones((6, 3))), x, index, config=config(reset="batch")
    )
  anchored = config(reset="anchors", learning="gradient")
  state = Codebook(anchored, rngs=nnx.Rngs(0)).init_state(jax.random.key(0))
  with pytest.raises(ValueError, match="codes must be given for reset"):
    codebook.update(state, x, index, config=anchored)
  with pytest.raises(ValueError, match='learning must be "ema"'):
    codebook.from_data(jax.random.key(0), x, config=config(learning="gradient"))


def test_rows_of_a_batch_are_flat_and_padding_is_zero():
  x = np.arange(6, dtype=np.float32).reshape(1, 3, 2)
  rows, mask = run(
    code_resets.rows_of_all_devices, x, np.array([[True, False, True]])
  )
  np.testing.assert_array_equal(rows, [[0, 1], [0, 0], [4, 5]])
  np.testing.assert_array_equal(mask, [True, False, True])


def test_resets_on_their_own():
  key, counts = jax.random.key(0), np.array([8.0, 0.0], np.float32)
  table = np.array([[4.0], [0.0]], np.float32)
  rows, mask = np.array([[7.0], [9.0]], np.float32), np.array([False, True])
  got = run(
    code_resets.from_batch, key, counts, table, rows, mask, threshold=1.0
  )
  np.testing.assert_array_equal(got[0], [8, 1])
  np.testing.assert_array_equal(got[1], [[4], [9]])
  got = run(code_resets.split_most_used, key, counts, table, threshold=5.0)
  np.testing.assert_array_equal(got[0], counts)  # 4 would be dead again

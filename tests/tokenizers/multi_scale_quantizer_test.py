"""Multi-scale residual quantisation of maps and of rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from tests.compiled import run
from tokjax.ops import resample
from tokjax.tokenizers import multi_scale_quantizer
from tokjax.tokenizers.codebook import CodebookConfig
from tokjax.tokenizers.multi_scale_quantizer import MultiScaleConfig
from tokjax.tokenizers.vector_quantizer import VQConfig

K, D = 9, 3
SIZES = (1, 2, 4)


def make(learning="gradient", sizes=SIZES, codebook=None, **settings):
  """A quantizer whose codes are as far apart as tokens, and its state."""
  book = CodebookConfig(K, D, learning=learning)
  book = dataclasses.replace(book, **(codebook or {}))
  settings.setdefault("code_deviation", 1.0)
  if settings.get("layout") == "row":
    settings.setdefault("num_convolutions", 0)
  config = MultiScaleConfig(book, sizes, **settings)

  @jax.jit
  def build():
    quantizer = config.build(nnx.Rngs(0))
    return quantizer, quantizer.init_state(jax.random.key(1))

  return build()


def tokens(shape=(3, 16, D), seed=0):
  random = np.random.default_rng(seed)
  return random.normal(size=shape).astype(np.float32)


@functools.partial(jax.jit, static_argnames="train")
def call(
  quantizer, x, state, mask=None, key=None, train=False, num_active=None
):
  return quantizer(x, state, mask, key=key, train=train, num_active=num_active)


def convolved(x, kernel, bias):
  """3 x 3, zeros round the map, in loops."""
  padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
  out = np.zeros_like(x)
  for i in range(x.shape[0]):
    for j in range(x.shape[1]):
      window = padded[i : i + 3, j : j + 3]
      out[i, j] = np.einsum("hwc,hwcd->d", window, kernel) + bias
  return out


def oracle(quantizer, table, x):
  """Indices and cumulative sums of one map, scale by scale, in float64."""
  config, side = quantizer.config, quantizer.config.sizes[-1]
  assigned = multi_scale_quantizer.shared_convolutions(
    len(config.sizes), max(1, config.num_convolutions)
  )
  x = x.reshape(side, side, -1).astype(np.float64)
  total, indices, sums = np.zeros_like(x), [], []
  for scale, n in enumerate(config.sizes):
    left, step = x - total, side // n
    cells = left.reshape(n, step, n, step, -1).mean(axis=(1, 3))
    index = np.argmin(((cells[:, :, None] - table) ** 2).sum(-1), -1)
    up = resample.cubic_matrix(n, side).astype(np.float64)
    h = np.einsum("ph,qw,hwc->pqc", up, up, table[index])
    if config.num_convolutions:
      kernel, bias = (
        np.asarray(value[...][assigned[scale]], np.float64)
        for value in (
          quantizer.convolutions.kernel,
          quantizer.convolutions.bias,
        )
      )
      h = 0.5 * h + 0.5 * convolved(h, kernel, bias)
    total = total + h
    indices.append(index.reshape(-1))
    sums.append(total.reshape(side * side, -1))
  return np.concatenate(indices), np.stack(sums)


@pytest.mark.parametrize("convolutions", [0, 4])
def test_a_map_equals_a_loop(convolutions):
  quantizer, state = make(num_convolutions=convolutions)
  if convolutions:  # a bias that is not zero
    bias = jnp.asarray(tokens((convolutions, D), 5))
    quantizer.convolutions.bias = nnx.Param(0.1 * bias)
  x = tokens()
  found, after = call(quantizer, x, state)
  table = np.asarray(quantizer.codebook.table(state), np.float64)
  indices, sums = zip(
    *(oracle(quantizer, table, one) for one in x), strict=True
  )
  np.testing.assert_array_equal(found.indices, np.stack(indices))
  sums = np.stack(sums, axis=1)  # [S, B, N, d]
  np.testing.assert_allclose(found.codes, sums[-1], atol=1e-5)
  error = ((x[None] - sums) ** 2).mean()
  assert float(found.losses["codebook"]) == pytest.approx(error, rel=1e-5)
  assert float(found.losses["commitment"]) == pytest.approx(
    0.25 * error, rel=1e-5
  )
  used = np.bincount(np.ravel(indices), minlength=K) > 0
  assert float(found.stats["usage"]) == pytest.approx(used.mean())
  jax.tree.map(np.testing.assert_array_equal, after, state)
  # What the scales add, and prefixes of them.
  added = run(quantizer.contributions, found.indices, state)
  np.testing.assert_allclose(np.cumsum(added, 0), sums, atol=1e-5)
  for upto in range(1, 4):
    got = run(quantizer.lookup, found.indices, state, upto=upto)
    np.testing.assert_allclose(got, sums[upto - 1], atol=1e-5)
  np.testing.assert_allclose(
    run(quantizer.lookup, found.indices, state), found.codes, atol=1e-6
  )
  # The inputs of a generator: what is known, in the size of what comes.
  given = run(quantizer.ar_inputs, found.indices, state)
  maps = sums.reshape(3, 3, 4, 4, D)
  want = [
    maps[0].reshape(3, 2, 2, 2, 2, D).mean((2, 4)).reshape(3, 4, D),
    maps[1].reshape(3, 16, D),
  ]
  np.testing.assert_allclose(given, np.concatenate(want, 1), atol=1e-5)


def test_two_by_two_by_hand():
  config = MultiScaleConfig(CodebookConfig(5, 1), (1, 2), num_convolutions=0)
  quantizer = multi_scale_quantizer.MultiScaleQuantizer(
    config, rngs=nnx.Rngs(0)
  )
  codes = jnp.array([[2.5], [-1.5], [-0.5], [0.5], [1.5]])
  quantizer.codebook.codes = nnx.Param(codes)
  state = quantizer.init_state(jax.random.key(0))
  x = np.array([[[1.0], [2], [3], [4]]], np.float32)
  found, _ = call(quantizer, x, state)
  assert found.indices.tolist() == [[0, 1, 2, 3, 4]]
  np.testing.assert_array_equal(found.codes, x)
  given = run(quantizer.ar_inputs, found.indices, state)
  assert given[0, :, 0].tolist() == [2.5] * 4
  # Of the first scale 1.25, of both 0: the mean over scales.
  assert float(found.losses["codebook"]) == pytest.approx(0.625)


@pytest.mark.parametrize("layout", ["map", "row"])
def test_one_scale_is_plain_quantisation(layout):
  sizes = (4,) if layout == "map" else (16,)
  quantizer, state = make(sizes=sizes, layout=layout, num_convolutions=0)
  plain = VQConfig(CodebookConfig(K, D)).build(nnx.Rngs(0))
  plain.codebook.codes = quantizer.codebook.codes
  x = tokens()
  found, _ = call(quantizer, x, state)
  want, _ = jax.jit(plain)(x, plain.init_state(jax.random.key(0)))
  np.testing.assert_array_equal(found.indices, want.indices)
  np.testing.assert_array_equal(found.codes, want.codes)
  for name, loss in want.losses.items():
    assert float(found.losses[name]) == pytest.approx(float(loss), rel=1e-5)
  assert run(quantizer.ar_inputs, found.indices, state).shape == (3, 0, D)


def test_a_row_with_fixed_maps_equals_a_loop():
  quantizer, state = make("ema", (1, 3, 7), layout="row", up="linear")
  x = tokens((2, 7, D))
  found, _ = call(quantizer, x, state)
  for b in range(2):
    total, indices = np.zeros((7, D)), []
    for n in (1, 3, 7):
      down, up = resample.area_matrix(7, n), resample.linear_matrix(n, 7)
      a = down @ (x[b] - total)
      codes = np.asarray(state.codes)
      index = np.argmin(((a[:, None] - codes) ** 2).sum(-1), -1)
      total = total + (up @ codes[index] if n < 7 else codes[index])
      indices.append(index)
    np.testing.assert_array_equal(found.indices[b], np.concatenate(indices))
    np.testing.assert_allclose(found.codes[b], total, atol=1e-5)


def test_learned_maps_are_averages_that_start_linear_and_learn():
  settings = {"sizes": (1, 3, 7), "layout": "row", "up": "linear"}
  quantizer, state = make("ema", learned_maps=True, **settings)
  fixed, _ = make("ema", **settings)
  codes = np.eye(7, dtype=np.float32)[:, :D]
  near = run(lambda q, x: q._up(x[:3], 1), quantizer, codes)
  want = run(lambda q, x: q._up(x[:3], 1), fixed, codes)
  np.testing.assert_allclose(near, want, atol=0.05)
  same = np.ones((7, D), np.float32)  # rows that sum to one keep constants
  for move, number in (("_down", 7), ("_up", 3)):
    got = run(lambda q, x: getattr(q, move)(x, 1), quantizer, same[:number])  # noqa: B023
    np.testing.assert_allclose(got, 1, rtol=1e-5)

  def loss(quantizer):
    found, _ = quantizer(tokens((2, 7, D)), state, train=True)
    return found.losses["codebook"]

  gradient = jax.jit(jax.grad(loss))(quantizer)
  # One code gives all the same, whatever its share.
  assert np.allclose(gradient.links[0][...], 0, atol=1e-6)
  assert np.abs(gradient.links[1][...]).max() > 1e-4


def test_gradients():
  quantizer, state = make()
  x, g = tokens(), tokens(seed=3)

  @jax.jit
  def gradients(quantizer, x):
    def part(name, quantizer, x):
      found, _ = quantizer(x, state, train=True)
      return jnp.sum(g * found.codes) if name == "z" else found.losses[name]

    return {
      name: jax.grad(functools.partial(part, name), argnums=(0, 1))(
        quantizer, x
      )
      for name in ("z", "commitment", "codebook")
    }

  got = gradients(quantizer, x)
  total = lambda tree: sum(np.abs(x).sum() for x in jax.tree.leaves(tree))  # noqa: E731
  # Straight through, once: not once for each scale.
  np.testing.assert_allclose(got["z"][1], g, rtol=1e-6)
  assert total(got["z"][0]) == 0 == total(got["commitment"][0])
  found, _ = call(quantizer, x, state)
  sums = np.cumsum(run(quantizer.contributions, found.indices, state), axis=0)
  want = 0.25 * 2 * (x[None] - sums).sum(0) / (3 * x.size)
  np.testing.assert_allclose(got["commitment"][1], want, atol=1e-6)
  of_codes, of_x = got["codebook"]
  assert not np.any(of_x)
  used = np.isin(np.arange(K), found.indices)
  moved = np.abs(of_codes.codebook.codes[...]).sum(-1) > 0
  np.testing.assert_array_equal(moved, used)
  kernel = np.abs(of_codes.convolutions.kernel[...]).sum((1, 2, 3, 4))
  # Three scales of four convolutions: the third is nobody's.
  shared = multi_scale_quantizer.shared_convolutions(3, 4)
  np.testing.assert_array_equal(kernel > 0, np.isin(np.arange(4), shared))
  assert not np.all(kernel > 0)


def test_inputs_of_a_scale_depend_on_the_scales_before_it_only():
  quantizer, state = make()
  found, _ = call(quantizer, tokens(), state)
  given = run(quantizer.ar_inputs, found.indices, state)
  parts = quantizer.split(found.indices)
  assert [part.shape[1] for part in parts] == [1, 4, 16]
  for scale, changes in enumerate(
    [(True, True), (False, True), (False, False)]
  ):
    other = [(p + 1) % K if i == scale else p for i, p in enumerate(parts)]
    other = run(quantizer.ar_inputs, jnp.concatenate(other, 1), state)
    moved = np.abs(other - given).max((0, 2)) > 1e-6
    assert (moved[:4].any(), moved[4:].any()) == changes


def test_scales_that_are_not_in_use_add_and_cost_nothing():
  quantizer, state = make("ema", codebook={"decay": 0.5})
  x, active = tokens(), np.array([1, 2, 3])
  whole, _ = call(quantizer, x, state)
  found, after = call(quantizer, x, state, num_active=active, train=True)
  want = np.array(whole.indices)
  want[0, 1:], want[1, 5:] = -1, -1
  np.testing.assert_array_equal(found.indices, want)
  prefix = [
    run(quantizer.lookup, whole.indices, state, upto=n)[n - 1] for n in active
  ]
  np.testing.assert_allclose(found.codes, np.stack(prefix), atol=1e-5)
  again = run(quantizer.lookup, found.indices, state)
  np.testing.assert_allclose(again, found.codes, atol=1e-5)
  hits = np.bincount(want[want >= 0], minlength=K)
  np.testing.assert_allclose(after.counts, (1 + hits) / 2, rtol=1e-6)
  sums = np.cumsum(run(quantizer.contributions, whole.indices, state), 0)
  error = ((x[None] - sums) ** 2).mean((2, 3))
  counted = np.arange(3)[:, None] < active[None]
  assert float(found.losses["commitment"]) == pytest.approx(
    0.25 * float(error[counted].mean()), rel=1e-5
  )


def test_dropped_scales_of_training_are_random_and_at_least_so_many():
  quantizer, state = make(dropout_from=2)
  x = tokens()
  kept = set()
  for seed in range(12):
    key = jax.random.key(seed)
    found, _ = call(quantizer, x, state, key=key, train=True)
    kept.add(int((found.indices[0] >= 0).sum()))
  assert kept == {5, 21}
  found, _ = call(quantizer, x, state)
  assert np.all(found.indices >= 0)


@pytest.mark.parametrize("learning", ["gradient", "ema"])
def test_masked_examples_change_nothing(learning):
  quantizer, state = make(learning, codebook={"decay": 0.5})
  x, mask = tokens(), np.array([True, False, True])

  @jax.jit
  def both(quantizer, x):
    def loss(quantizer, x):
      found, after = quantizer(x, state, mask, train=True)
      return sum(found.losses.values()), (found, after)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(quantizer, x)

  one = both(quantizer, x)
  x[1] = np.nan
  two = both(quantizer, x)
  jax.tree.map(np.testing.assert_array_equal, one, two)
  found = two[0][1][0]
  assert np.all(found.indices[1] == -1) and not np.any(found.codes[1])
  alone, _ = call(quantizer, x[[0, 2]], state)
  np.testing.assert_array_equal(found.indices[::2], alone.indices)
  for name, loss in alone.losses.items():
    assert float(found.losses[name]) == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_over_eight_devices_equals_one(kind):
  quantizer, state = make("ema", (1, 3, 5), {"reset": "batch"}, layout="row")
  x, key = tokens((8, 5, D)), jax.random.key(2)
  mask = np.arange(8) != 3
  want = call(quantizer, x, state, mask, key, train=True)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
  x, mask = jax.device_put((x, mask), jax.NamedSharding(mesh, jax.P("data")))

  def local(x, state, mask):
    found, state = quantizer(
      x, state, mask, train=True, key=key, axis_name="data"
    )
    return found[:3], (found.losses, found.stats, state)

  got = jax.jit(
    jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(jax.P("data"), jax.P(), jax.P("data")),
      out_specs=(jax.P("data"), jax.P()),
    )
  )(x, state, mask)
  want = want[0][:3], (want[0].losses, want[0].stats, want[1])
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
    got,
    want,
  )


def test_bfloat16_in_and_out():
  quantizer, state = make("ema", layout="row", sizes=(1, 5))
  x = jnp.asarray(tokens((2, 5, D)), jnp.bfloat16)
  found, _ = call(quantizer, x, state)
  want, _ = call(quantizer, x.astype(jnp.float32), state)
  assert found.codes.dtype == jnp.bfloat16
  np.testing.assert_array_equal(found.indices, want.indices)


def test_convolutions_shared_by_scales():
  shared = multi_scale_quantizer.shared_convolutions
  assert shared(10, 4) == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
  assert shared(1, 4) == [0] and shared(3, 1) == [0, 0, 0]
  assert shared(5, 5) == [0, 1, 2, 3, 4]
  assert shared(8, 2) == [0, 0, 0, 0, 1, 1, 1, 1]


def test_bytes():
  config = MultiScaleConfig(CodebookConfig(4096, 32))
  assert multi_scale_quantizer.num_bytes(config) == 680 * 12 / 8
  assert multi_scale_quantizer.num_bytes(config, upto=3) == 14 * 12 / 8
  row = MultiScaleConfig(
    CodebookConfig(256, 8), (1, 2, 4), layout="row", num_convolutions=0
  )
  assert multi_scale_quantizer.num_bytes(row) == 7


@pytest.mark.unchecked
@pytest.mark.parametrize("settings, message", [
  ({"layout": "cube"}, "layout must be one of"),
  ({"up": "nearest"}, "up must be one of"),
  ({"sizes": (2, 1)}, r"never fall, got \(2, 1\)"),
  ({"sizes": ()}, "sizes must be positive"),
  ({"dropout_from": 4}, "dropout_from must lie in 0..3"),
  ({"codebook": {"metric": "cosine"}}, 'metric must be "euclidean"'),
  ({"layout": "row", "num_convolutions": 4}, "no neighbours in space, got 4"),
  ({"learned_maps": True}, 'learned_maps needs layout "row", got "map"'),
  ({"learning": "simvq"}, "code_deviation does not go with"),
])  # fmt: skip
def test_settings_that_cannot_be(settings, message):
  with pytest.raises(ValueError, match=message):
    make(**settings)


@pytest.mark.unchecked
def test_errors():
  quantizer, state = make(dropout_from=1)
  with pytest.raises(ValueError, match=r"end in 16 tokens of width 3, got"):
    quantizer(jnp.ones((2, 4, D)), state)
  with pytest.raises(ValueError, match="key must be given to train"):
    quantizer(jnp.ones((2, 16, D)), state, train=True)
  with pytest.raises(ValueError, match="indices=20, tokens=21"):
    quantizer.lookup(jnp.zeros((2, 20), jnp.int32), state)
  with pytest.raises(ValueError, match="upto must lie in 0..3, got 4"):
    quantizer.lookup(jnp.zeros((2, 21), jnp.int32), state, upto=4)

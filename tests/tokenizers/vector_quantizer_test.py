"""Vector quantisation: indices, losses, and who gets which gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from tests.compiled import run
from tokjax.tokenizers import measures
from tokjax.tokenizers.codebook import CodebookConfig
from tokjax.tokenizers.vector_quantizer import VectorQuantizer, VQConfig

K, D = 7, 4


def make(learning="gradient", metric="euclidean", codebook=None, **settings):
  book = CodebookConfig(K, D, metric=metric, learning=learning)
  book = dataclasses.replace(book, **(codebook or {}))
  config = VQConfig(book, **settings)
  return VectorQuantizer(config, rngs=nnx.Rngs(0))


def tokens(seed=0, shape=(3, 5, D)):
  random = np.random.default_rng(seed)
  return random.normal(size=shape).astype(np.float32)


def spread(quantizer, state, seed=1):
  """The same quantizer and state with codes as far apart as tokens."""
  codes = tokens(seed, (K, D))
  if quantizer.codebook.codes is not None:
    quantizer.codebook.codes = nnx.Param(jnp.asarray(codes))
  else:
    state = state._replace(codes=codes, sums=codes)
  return quantizer, state


@functools.partial(jax.jit, static_argnames="train")
def call(quantizer, x, state, mask=None, key=None, train=False):
  return quantizer(x, state, mask, key=key, train=train)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("learning", ["gradient", "ema", "simvq"])
def test_equals_a_loop(learning, metric):
  quantizer = make(learning, metric)
  quantizer, state = spread(quantizer, quantizer.init_state(jax.random.key(0)))
  x, mask = tokens(), np.random.default_rng(2).random((3, 5)) < 0.7
  found, after = call(quantizer, x, state, mask)
  table = np.asarray(quantizer.codebook.table(state), np.float64)
  y = x.astype(np.float64)
  if metric == "cosine":
    y /= np.linalg.norm(y, axis=-1, keepdims=True)
  index = np.argmin(((y[..., None, :] - table) ** 2).sum(-1), -1)
  np.testing.assert_array_equal(found.indices, np.where(mask, index, -1))
  want = np.where(mask[..., None], table[index], 0)
  np.testing.assert_allclose(found.codes, want, atol=1e-6)
  error = ((y - table[index]) ** 2).mean(-1)[mask].mean()
  losses = {"commitment": 0.25 * error, "codebook": error}
  if learning == "ema":
    del losses["codebook"]
  assert found.losses.keys() == losses.keys()
  for name, value in losses.items():
    assert float(found.losses[name]) == pytest.approx(value, rel=1e-5)
  used = np.bincount(index[mask], minlength=K) / mask.sum()
  assert float(found.stats["usage"]) == pytest.approx((used > 0).mean())
  entropy = -sum(p * np.log(p) for p in used if p)
  assert float(found.stats["perplexity"]) == pytest.approx(
    np.exp(entropy), rel=1e-5
  )
  jax.tree.map(np.testing.assert_array_equal, after, state)
  again = run(quantizer.lookup, found.indices, state)
  np.testing.assert_allclose(again, found.codes, atol=1e-6)


def test_vectors_of_the_table_are_their_codes_without_loss():
  quantizer = make("ema")
  quantizer, state = spread(quantizer, quantizer.init_state(jax.random.key(0)))
  found, after = call(quantizer, state.codes, state, train=True)
  np.testing.assert_array_equal(found.indices, np.arange(K))
  np.testing.assert_array_equal(found.codes, state.codes)
  assert float(found.losses["commitment"]) == 0
  # Each means itself: smoothing aside nothing moves.
  np.testing.assert_allclose(after.codes, state.codes, rtol=1e-4)


def test_gradients_of_straight_through_commitment_and_table():
  quantizer = make()
  quantizer, state = spread(quantizer, quantizer.init_state(jax.random.key(0)))
  x, g = tokens(0, (4, D)), tokens(3, (4, D))

  @jax.jit
  def gradients(quantizer, x):
    def part(name, quantizer, x):
      found, _ = quantizer(x, state, train=True)
      if name == "codes":
        return jnp.sum(g * found.codes)
      return found.losses[name]

    return {
      name: jax.grad(functools.partial(part, name), argnums=(0, 1))(
        quantizer, x
      )
      for name in ("codes", "commitment", "codebook")
    }

  got = gradients(quantizer, x)
  found, _ = call(quantizer, x, state)
  np.testing.assert_allclose(got["codes"][1], g, rtol=1e-6)
  assert not np.any(got["codes"][0].codebook.codes[...])
  want = 0.25 * 2 * (x - found.codes) / x.size
  np.testing.assert_allclose(got["commitment"][1], want, rtol=1e-4, atol=1e-7)
  assert not np.any(got["commitment"][0].codebook.codes[...])
  assert not np.any(got["codebook"][1])
  of_table = np.abs(got["codebook"][0].codebook.codes[...]).sum(-1)
  used = np.isin(np.arange(K), found.indices)
  np.testing.assert_array_equal(of_table > 0, used)
  assert not np.all(used)


@pytest.mark.parametrize("estimator", ["rotation", "directional", "index"])
def test_other_estimators(estimator):
  quantizer = make(estimator=estimator)
  quantizer, state = spread(quantizer, quantizer.init_state(jax.random.key(0)))
  x, g, key = tokens(), tokens(3), jax.random.key(5)

  @jax.jit
  def both(quantizer, x):
    def value(quantizer, x):
      codes = quantizer(x, state, train=True, key=key)[0].codes
      return jnp.sum(g * codes), codes

    return jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(quantizer, x)

  (_, codes), (of_quantizer, of_x) = both(quantizer, x)
  plain = call(quantizer, x, state)[0].codes
  of_table = np.abs(of_quantizer.codebook.codes[...]).sum(-1)
  assert np.all(np.isfinite(of_x)) and not np.allclose(of_x, g, atol=1e-3)
  if estimator == "rotation":
    np.testing.assert_allclose(codes, plain, atol=1e-5)
    scale = np.linalg.norm(plain, axis=-1) / np.linalg.norm(x, axis=-1)
    length = np.linalg.norm(g, axis=-1)
    np.testing.assert_allclose(
      np.linalg.norm(of_x, axis=-1), scale * length, rtol=1e-4
    )
  elif estimator == "directional":
    got, want = (np.linalg.norm(y - x, axis=-1) for y in (codes, plain))
    np.testing.assert_allclose(got, want, rtol=1e-4)
  else:
    np.testing.assert_allclose(codes, plain, atol=1e-5)
    assert np.all(of_table > 0)  # of unused codes, too


def test_gumbel_draws_a_code_and_has_the_gradient_of_a_soft_choice():
  tau, key = 0.7, jax.random.key(5)
  quantizer = make(estimator="gumbel", gumbel_temperature=tau)
  quantizer, state = spread(quantizer, quantizer.init_state(jax.random.key(0)))
  x, g = tokens(0, (6, D)), tokens(3, (6, D))

  @jax.jit
  def both(x):
    def value(x):
      found, after = quantizer(x, state, train=True, key=key)
      return jnp.sum(g * found.codes), (found, after)

    return jax.value_and_grad(value, has_aux=True)(x)

  (_, (found, after)), of_x = both(x)
  table = np.asarray(quantizer.codebook.codes[...], np.float64)
  noise = jax.random.gumbel(jax.random.split(key)[0], (6, 1, K))[:, 0]
  noisy = -((x[:, None] - table) ** 2).sum(-1) + np.asarray(noise, np.float64)
  index = np.argmax(noisy, -1)
  np.testing.assert_array_equal(found.indices, index)
  np.testing.assert_allclose(found.codes, table[index], atol=1e-6)
  p = np.exp(noisy / tau)
  p /= p.sum(-1, keepdims=True)
  worth = g @ table.T
  of_logits = p * (worth - (p * worth).sum(-1, keepdims=True)) / tau
  np.testing.assert_allclose(of_x, 2 * of_logits @ table, rtol=2e-4, atol=1e-5)
  error = ((x - table[index]) ** 2).mean()
  assert float(found.losses["commitment"]) == pytest.approx(0.25 * error, 1e-5)
  drawn = np.bincount(index, minlength=K)
  np.testing.assert_allclose(after.counts, 0.99 + 0.01 * drawn, rtol=1e-6)
  nearest = call(quantizer, x, state)[0].indices
  np.testing.assert_array_equal(nearest, np.argmin(
    ((x[:, None] - table) ** 2).sum(-1), -1))  # fmt: skip


def test_anchors_move_codes_as_if_written_into_the_parameter():
  quantizer = make("gradient", "cosine", codebook={"reset": "anchors"})
  state = quantizer.init_state(jax.random.key(0))
  written = np.asarray(quantizer.codebook.codes[...], np.float64)
  usage, rate = np.zeros(K), 0.5

  @jax.jit
  def step(quantizer, state, x):
    def loss(quantizer):
      found, after = quantizer(x, state, train=True)
      return sum(found.losses.values()), (found.indices, after)

    (_, aux), grads = jax.value_and_grad(loss, has_aux=True)(quantizer)
    moved = jax.tree.map(lambda p, g: p - rate * g, quantizer, grads)
    return moved, *aux

  unit = lambda y: y / np.linalg.norm(y, axis=-1, keepdims=True)  # noqa: E731
  for seed in range(3):
    x = 2 * tokens(seed, (5, D))
    y, table = unit(x.astype(float)), unit(written)
    index = np.argmin(((y[:, None] - table) ** 2).sum(-1), -1)
    # Of the codebook loss, through the length.
    of_table = np.zeros((K, D))
    for row, k in zip(y, index, strict=True):
      of_table[k] += 2 * (table[k] - row) / y.size
    of_codes = of_table - table * (of_table * table).sum(-1, keepdims=True)
    of_codes /= np.linalg.norm(written, axis=-1, keepdims=True)
    usage = 0.99 * usage + 0.01 * np.bincount(index, minlength=K) / 5
    weight = np.exp(-usage * K * 10 / 0.01 - 1e-3)[:, None]
    near = np.argmin(((table[:, None] - y) ** 2).sum(-1), -1)
    written = (1 - weight) * written + weight * x[near] - rate * of_codes
    quantizer, found, state = step(quantizer, state, x)
    np.testing.assert_array_equal(found, index)
    table = run(quantizer.codebook.table, state)
    np.testing.assert_allclose(table, unit(written), atol=1e-4)


@pytest.mark.parametrize("estimator", ["straight_through", "gumbel", "index"])
def test_padding_reaches_no_gradient(estimator):
  quantizer = make(estimator=estimator, input_dim=6)
  quantizer, state = spread(quantizer, quantizer.init_state(jax.random.key(0)))
  x, mask = tokens(0, (3, 5, 6)), np.random.default_rng(2).random((3, 5)) < 0.6
  x[~mask] = np.nan

  @jax.jit
  def gradients(quantizer, x):
    def total(quantizer, x):
      found, _ = quantizer(x, state, mask, train=True, key=jax.random.key(1))
      return jnp.sum(jnp.sin(found.codes)) + sum(found.losses.values())

    return jax.grad(total, argnums=(0, 1))(quantizer, x)

  of_quantizer, of_x = gradients(quantizer, x)
  assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(of_quantizer))
  assert np.all(np.isfinite(of_x)) and not np.any(of_x[~mask])


def test_bits_of_a_vector():
  quantizer = VQConfig(CodebookConfig(8, 2), num_heads=3).build(nnx.Rngs(0))
  assert quantizer.num_codes == 8 and quantizer.bits_per_vector == 9.0


def test_heads_share_a_table():
  quantizer = make("ema", num_heads=2)
  one = make("ema")
  quantizer, state = spread(quantizer, quantizer.init_state(jax.random.key(0)))
  x = tokens(0, (3, 5, 2 * D))
  found, _ = call(quantizer, x, state)
  want, _ = call(one, x.reshape(3, 5, 2, D), state)
  np.testing.assert_array_equal(found.indices, want.indices)
  np.testing.assert_array_equal(found.codes, want.codes.reshape(x.shape))


def test_projections_come_and_go_around_the_table():
  quantizer = make("ema", "cosine", input_dim=9, num_heads=2)
  quantizer, state = spread(quantizer, quantizer.init_state(jax.random.key(0)))
  x = tokens(0, (3, 5, 9))
  found, _ = call(quantizer, x, state)
  y = (x @ quantizer.project_in[...]).reshape(3, 5, 2, D)
  inner, _ = call(make("ema", "cosine"), y, state)
  np.testing.assert_array_equal(found.indices, inner.indices)
  want = inner.codes.reshape(3, 5, 2 * D) @ quantizer.project_out[...]
  np.testing.assert_allclose(found.codes, want, atol=1e-5)
  again = run(quantizer.lookup, found.indices, state)
  np.testing.assert_allclose(again, found.codes, atol=1e-6)


def test_masked_vectors_change_nothing():
  quantizer = make("ema", codebook={"decay": 0.5}, entropy_weight=0.1)
  quantizer, state = spread(quantizer, quantizer.init_state(jax.random.key(0)))
  x, mask = tokens(), np.random.default_rng(2).random((3, 5)) < 0.6
  one = call(quantizer, x, state, mask, train=True)
  x[~mask] = 1e9
  two = call(quantizer, x, state, mask, train=True)
  jax.tree.map(np.testing.assert_array_equal, one, two)
  nothing, after = call(
    quantizer, x, state, np.zeros_like(mask), train=True
  )  # fmt: skip
  assert all(float(loss) == 0 for loss in nothing.losses.values())
  assert not np.any(nothing.codes) and np.all(np.isfinite(after.codes))


def test_sampled_codes_follow_their_distance():
  quantizer = make(sample_temperature=1.0)
  quantizer, state = spread(quantizer, quantizer.init_state(jax.random.key(0)))
  x = np.broadcast_to(tokens(0, (1, D)), (20_000, D))
  found, _ = call(quantizer, x, state, key=jax.random.key(1), train=True)
  table = quantizer.codebook.codes[...]
  p = np.exp(-((x[:1] - table) ** 2).sum(-1))
  got = np.bincount(found.indices, minlength=K) / len(x)
  np.testing.assert_allclose(got, p / p.sum(), atol=0.015)
  nearest, _ = call(quantizer, x[:1], state)
  assert nearest.indices[0] == np.argmax(p)


def test_entropy_and_orthogonality_are_named_and_weighted():
  quantizer = make(entropy_weight=0.1, orthogonality_weight=10.0,
                   entropy_temperature=1.0)  # fmt: skip
  quantizer, state = spread(quantizer, quantizer.init_state(jax.random.key(0)))
  x = tokens()
  found, _ = call(quantizer, x, state)
  table = np.asarray(quantizer.codebook.codes[...], np.float64)
  far = ((x[..., None, :] - table) ** 2).sum(-1).reshape(-1, K)
  p = np.exp(-far) / np.exp(-far).sum(-1, keepdims=True)
  entropy = lambda p: -(p * np.log(p)).sum(-1)  # noqa: E731
  want = 0.1 * (entropy(p).mean() - entropy(p.mean(0)))
  assert float(found.losses["entropy"]) == pytest.approx(want, rel=1e-4)
  unit = table / np.linalg.norm(table, axis=-1, keepdims=True)
  want = 10 * (((unit @ unit.T) ** 2).sum() / K**2 - 1 / K)
  assert float(found.losses["orthogonality"]) == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_over_eight_devices_equals_one(kind):
  quantizer = make("ema", codebook={"reset": "batch"}, entropy_weight=0.1)
  quantizer, state = spread(quantizer, quantizer.init_state(jax.random.key(0)))
  x, key = tokens(0, (8, 5, D)), jax.random.key(2)
  mask = np.random.default_rng(2).random((8, 5)) < 0.6
  want = call(quantizer, x, state, mask, key, train=True)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
  x, mask = jax.device_put((x, mask), jax.NamedSharding(mesh, jax.P("data")))

  def local(x, state, mask):
    found, state = quantizer(
      x, state, mask, train=True, key=key, axis_name="data"
    )
    return found[:3], (found.losses, found.stats, state)

  (rows, whole) = jax.jit(
    jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(jax.P("data"), jax.P(), jax.P("data")),
      out_specs=(jax.P("data"), jax.P()),
    )
  )(x, state, mask)
  got = rows, whole
  want = want[0][:3], (want[0].losses, want[0].stats, want[1])
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
    got,
    want,
  )


def test_bfloat16_in_and_out():
  quantizer = make("ema")
  quantizer, state = spread(quantizer, quantizer.init_state(jax.random.key(0)))
  x = jnp.asarray(tokens(), jnp.bfloat16)
  found, _ = call(quantizer, x, state)
  want, _ = call(quantizer, x.astype(jnp.float32), state)
  assert found.codes.dtype == jnp.bfloat16
  np.testing.assert_array_equal(found.indices, want.indices)


@pytest.mark.unchecked
@pytest.mark.parametrize("settings, message", [
  ({"estimator": "magic"}, "estimator must be one of"),
  ({"num_heads": 0}, "num_heads must lie in"),
  ({"learning": "ema", "estimator": "index"}, 'got "ema"'),
  ({"learning": "ema", "orthogonality_weight": 1.0}, 'got "ema"'),
  ({"estimator": "rotation", "sample_temperature": 1.0}, "diverges"),
  ({"estimator": "gumbel", "sample_temperature": 1.0}, "samples by itself"),
  ({"estimator": "gumbel", "gumbel_temperature": 0.0}, "must be positive"),
])  # fmt: skip
def test_settings_that_cannot_be(settings, message):
  with pytest.raises(ValueError, match=message):
    make(**settings)


def test_errors():
  quantizer = make("ema", codebook={"reset": "batch"})
  state = quantizer.init_state(jax.random.key(0))
  with pytest.raises(
    ValueError, match=r"x must have width 4, got shape \(2, 5"
  ):
    quantizer(jnp.ones((2, 5)), state)
  with pytest.raises(ValueError, match="key must be given to train"):
    quantizer(jnp.ones((2, D)), state, train=True)
  gumbel = make(estimator="gumbel")
  with pytest.raises(ValueError, match="key must be given to train"):
    gumbel(jnp.ones((2, D)), state, train=True)


def test_mean_of_what_counts():
  x, mask = np.array([1.0, 5, 3], np.float32), np.array([1, 0, 1], bool)
  assert run(measures.masked_mean, x, mask) == 2
  assert run(measures.masked_mean, x, mask & False) == 0
  found = run(measures.usage_stats, np.array([0, 0, 3, -1]), num_codes=4)
  assert found["usage"] == 0.5
  assert float(found["perplexity"]) == pytest.approx(1.8899, rel=1e-4)

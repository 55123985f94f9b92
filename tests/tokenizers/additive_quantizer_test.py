"""Additive quantisation in a network: choices, losses, gradients, masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

from tests.compiled import run
from tokjax.tokenizers.additive_quantizer import AdditiveQuantizer, AQConfig
from tokjax.tokenizers.codebook import CodebookConfig, CodebookState
from tokjax.tokenizers.residual_quantizer import ResidualQuantizer, RVQConfig

M, K, D = 3, 5, 4


def make(codes=None, **settings):
  book = CodebookConfig(K, D, **settings.pop("codebook", {}))
  quantizer = AQConfig(book, M, **settings).build(nnx.Rngs(0))
  if codes is not None:
    quantizer.codebooks.codes = nnx.Param(jnp.asarray(codes))
  return quantizer


def tables(seed=1):
  random = np.random.default_rng(seed)
  return random.normal(size=(M, K, D)).astype(np.float32)


def tokens(seed=0, shape=(3, 8, D)):
  random = np.random.default_rng(seed)
  return random.normal(size=shape).astype(np.float32)


STATE = CodebookState(np.ones((M, K), np.float32))


@functools.partial(jax.jit, static_argnames="train")
def call(quantizer, x, mask=None, key=None, train=False):
  return quantizer(x, STATE, mask, key=key, train=train)


def test_one_sweep_is_residual_quantisation_and_more_is_closer():
  x = tokens(shape=(10, 8, D))
  greedy, _ = call(make(tables(), num_sweeps=1), x)
  config = RVQConfig(CodebookConfig(K, D, learning="ema"), M)
  rvq = ResidualQuantizer(config, rngs=nnx.Rngs(0))
  state = CodebookState(STATE.counts, tables(), tables())
  want, _ = run(rvq, x, state)
  np.testing.assert_array_equal(greedy.indices, want.indices)
  np.testing.assert_allclose(greedy.codes, want.codes, atol=1e-5)
  quantizer = make(tables(), num_rounds=4, num_perturbed=2)
  swept, _ = call(quantizer, x)
  perturbed, _ = call(quantizer, x, key=jax.random.key(0))
  error = [np.sum((f.codes - x) ** 2, -1) for f in (greedy, swept, perturbed)]
  assert np.all(error[1] <= error[0] + 1e-5)
  assert error[2].mean() < error[1].mean() < error[0].mean()
  each = np.take_along_axis(
    tables()[:, None], np.moveaxis(swept.indices.reshape(-1, M), -1, 0)
    [:, :, None, None], axis=2,
  )  # fmt: skip
  np.testing.assert_allclose(
    swept.codes.reshape(-1, D), each[:, :, 0].sum(0), atol=1e-5
  )
  again = run(quantizer.lookup, swept.indices, STATE)
  np.testing.assert_allclose(again, swept.codes, atol=1e-6)
  assert quantizer.num_codes == K
  assert quantizer.bits_per_vector == pytest.approx(M * np.log2(K))


def test_the_encoder_gets_its_gradient_and_all_books_that_of_the_whole_sum():
  quantizer, x, g = make(tables()), tokens(), tokens(3)
  found, after = call(quantizer, x, train=True)
  counts = np.stack(
    [np.bincount(found.indices[..., m].ravel(), minlength=K) for m in range(M)]
  )
  np.testing.assert_allclose(after.counts, 0.99 + 0.01 * counts, rtol=1e-5)

  @jax.jit
  def gradients(quantizer, x):
    def codes(quantizer, x):
      return jnp.sum(g * quantizer(x, STATE, train=True)[0].codes)

    def loss(name, quantizer, x):
      return quantizer(x, STATE, train=True)[0].losses[name]

    names = "commitment", "codebook"
    parts = [codes, *(functools.partial(loss, name) for name in names)]
    return [jax.grad(part, argnums=(0, 1))(quantizer, x) for part in parts]

  of_codes, of_commitment, of_codebook = gradients(quantizer, x)
  left = x - np.asarray(found.codes)
  np.testing.assert_allclose(of_codes[1], g, rtol=1e-6)
  np.testing.assert_allclose(
    of_commitment[1], 0.25 * 2 * left / x.size, rtol=1e-3, atol=1e-7
  )
  assert not np.any(of_codebook[1])
  for gradient in of_codes[0], of_commitment[0]:
    assert not np.any(gradient.codebooks.codes[...])
  want = np.zeros((M, K, D))
  for m in range(M):
    np.add.at(want[m], np.asarray(found.indices[..., m]), -2 * left / x.size)
  got = of_codebook[0].codebooks.codes[...]
  np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-6)


def test_books_learn():
  x = tokens(4, (64, D))
  start = make(tables())
  optimizer = optax.adam(0.03)

  @jax.jit
  def learn(quantizer):
    def step(carry, _):
      quantizer, moments = carry

      def loss(quantizer):
        found, _ = quantizer(x, STATE, train=True)
        return found.losses["codebook"]

      value, slope = jax.value_and_grad(loss)(quantizer)
      updates, moments = optimizer.update(slope, moments)
      return (optax.apply_updates(quantizer, updates), moments), value

    carry = quantizer, optimizer.init(quantizer)
    return jax.lax.scan(step, carry, length=60)[1]

  losses = learn(start)
  assert losses[-1] < 0.65 * losses[0]


def test_masked_vectors_have_no_influence():
  quantizer, x = make(tables()), tokens()
  mask = np.random.default_rng(2).random(x.shape[:-1]) < 0.7
  want = call(quantizer, x, mask, train=True)
  poisoned = np.where(mask[..., None], x, np.nan)
  got = call(quantizer, poisoned, mask, train=True)
  jax.tree.map(np.testing.assert_array_equal, got, want)
  assert np.all(got[0].indices[~mask] == -1) and not np.any(got[0].codes[~mask])
  only, _ = call(quantizer, x[mask], train=True)
  for name, value in only.losses.items():
    np.testing.assert_allclose(got[0].losses[name], value, rtol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_over_eight_devices_equals_one(kind):
  quantizer, x = make(tables()), tokens(0, (8, 6, D))
  want = call(quantizer, x, train=True)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
  x = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))

  def local(x):
    found, state = quantizer(x, STATE, train=True, axis_name="data")
    return found[:2], (found.losses, found.stats, state)

  got = jax.jit(
    jax.shard_map(
      local,
      mesh=mesh,
      in_specs=jax.P("data"),
      out_specs=(jax.P("data"), jax.P()),
    )
  )(x)
  want = want[0][:2], (want[0].losses, want[0].stats, want[1])
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, got, want)


@pytest.mark.unchecked
@pytest.mark.parametrize("codebook, message", [
  ({"learning": "ema"}, "learning must be one of 'gradient'"),
  ({"metric": "cosine"}, "metric must be one of 'euclidean'"),
  ({"reset": "anchors"}, "reset must be one of 'none'"),
])  # fmt: skip
def test_settings_that_cannot_be(codebook, message):
  with pytest.raises(ValueError, match=message):
    make(codebook=codebook)


@pytest.mark.unchecked
def test_errors():
  with pytest.raises(
    ValueError, match=r"x must have width 4, got shape \(2, 5"
  ):
    make()(jnp.ones((2, 5)), STATE)
  with pytest.raises(ValueError, match="num_books must lie in"):
    AdditiveQuantizer(AQConfig(CodebookConfig(K, D), 0), rngs=nnx.Rngs(0))

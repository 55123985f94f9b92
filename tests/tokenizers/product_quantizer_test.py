"""Neural product quantisation: groups, rotation, gradients, search."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from tests.compiled import run
from tokjax.ops import quantize
from tokjax.tokenizers.codebook import CodebookConfig, CodebookState
from tokjax.tokenizers.product_quantizer import PQConfig, ProductQuantizer
from tokjax.tokenizers.vector_quantizer import VectorQuantizer, VQConfig

G, K, WIDTH = 3, 4, 2
D = G * WIDTH


def make(learning="ema", rotate=False, **settings):
  book = CodebookConfig(K, WIDTH, learning=learning)
  return PQConfig(VQConfig(book, **settings), G, rotate).build(nnx.Rngs(0))


def tables(seed=1):
  random = np.random.default_rng(seed)
  return random.normal(size=(G, K, WIDTH)).astype(np.float32)


def state_of(codes):
  return CodebookState(np.ones((G, K), np.float32), codes, codes)


def tokens(seed=0, shape=(3, 8, D)):
  random = np.random.default_rng(seed)
  return random.normal(size=shape).astype(np.float32)


@functools.partial(jax.jit, static_argnames="train")
def call(quantizer, x, state, mask=None, key=None, train=False):
  return quantizer(x, state, mask, key=key, train=train)


def turned(quantizer, seed=5):
  """A rotation of its own."""
  random = np.random.default_rng(seed)
  quantizer.skew = nnx.Param(jnp.asarray(random.normal(size=(D, D)) / 4))
  return quantizer


@pytest.mark.parametrize("rotate", [False, True])
def test_it_is_vector_quantisation_by_all_combinations(rotate):
  quantizer, e = make(rotate=rotate), tables()
  rotation = np.eye(D)
  if rotate:
    rotation = np.asarray(run(turned(quantizer).rotation), float)
    assert np.abs(rotation - np.eye(D)).max() > 0.1
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(D), atol=1e-5)
  paths = np.array(list(itertools.product(range(K), repeat=G)))
  whole = np.concatenate([e[g, paths[:, g]] for g in range(G)], 1) @ rotation
  x = tokens()
  config = VQConfig(CodebookConfig(K**G, D, learning="ema"))
  vq = VectorQuantizer(config, rngs=nnx.Rngs(0))
  whole = whole.astype(np.float32)
  state = CodebookState(np.ones(K**G, np.float32), whole, whole)
  want, _ = run(vq, x, state)
  found, after = call(quantizer, x, state_of(e))
  np.testing.assert_array_equal(found.indices, paths[want.indices])
  np.testing.assert_allclose(found.codes, want.codes, atol=1e-5)
  np.testing.assert_allclose(
    found.losses["commitment"], want.losses["commitment"], rtol=1e-4
  )
  jax.tree.map(np.testing.assert_array_equal, after, state_of(e))
  again = run(quantizer.lookup, found.indices, state_of(e))
  np.testing.assert_allclose(again, found.codes, atol=1e-6)
  assert quantizer.num_codes == K and quantizer.bits_per_vector == 6


def test_its_tables_are_a_product_codebook():
  quantizer, e, x = turned(make(rotate=True)), tables(), tokens()[0]
  found, _ = call(quantizer, x, state_of(e))
  book = run(quantizer.product_codebook, state_of(e))
  np.testing.assert_array_equal(book, e)
  rotation = run(quantizer.rotation)
  codes = found.indices.astype(jnp.uint8)
  scores = quantize.pq_scores(book, codes, tokens(1)[0] @ rotation.T)
  np.testing.assert_allclose(scores, tokens(1)[0] @ found.codes.T, atol=1e-5)


@pytest.mark.parametrize("rotate", [False, True])
def test_gradients_reach_encoder_tables_and_rotation_as_they_should(rotate):
  quantizer = make("gradient", rotate)
  quantizer.groups.quantizers.codebook.codes = nnx.Param(jnp.asarray(tables()))
  if rotate:
    turned(quantizer)
  state = quantizer.init_state(jax.random.key(0))
  x, g = tokens(), tokens(3)

  @jax.jit
  def gradients(quantizer, x):
    def codes(quantizer, x):
      return jnp.sum(g * quantizer(x, state, train=True)[0].codes)

    def loss(name, quantizer, x):
      return quantizer(x, state, train=True)[0].losses[name]

    names = "commitment", "codebook"
    parts = [codes, *(functools.partial(loss, name) for name in names)]
    return [jax.grad(part, argnums=(0, 1))(quantizer, x) for part in parts]

  of_codes, of_commitment, of_codebook = gradients(quantizer, x)
  found, _ = call(quantizer, x, state)
  # Straight through, and R^T R is the identity.
  np.testing.assert_allclose(of_codes[1], g, rtol=1e-4, atol=1e-5)
  want = 0.25 * 2 * (x - found.codes) / x.size
  np.testing.assert_allclose(of_commitment[1], want, rtol=1e-3, atol=1e-6)
  assert not np.any(of_codebook[1])

  def table(gradient):
    return np.asarray(gradient.groups.quantizers.codebook.codes[...])

  assert not np.any(table(of_codes[0])) and not np.any(table(of_commitment[0]))
  moved = np.abs(table(of_codebook[0])).sum(-1) > 0
  used = [np.isin(np.arange(K), found.indices[..., m]) for m in range(G)]
  np.testing.assert_array_equal(moved, used)
  if rotate:
    for gradient in of_codes[0], of_commitment[0]:
      skew = np.asarray(gradient.skew[...])
      assert np.isfinite(skew).all() and np.abs(skew).max() > 1e-4
    assert not np.any(of_codebook[0].skew[...])


def test_masked_vectors_have_no_influence():
  quantizer, x = turned(make("ema", rotate=True)), tokens()
  mask = np.random.default_rng(2).random(x.shape[:-1]) < 0.7
  want = call(quantizer, x, state_of(tables()), mask, train=True)
  poisoned = np.where(mask[..., None], x, np.nan)
  got = call(quantizer, poisoned, state_of(tables()), mask, train=True)
  jax.tree.map(np.testing.assert_array_equal, got, want)
  assert np.all(got[0].indices[~mask] == -1) and not np.any(got[0].codes[~mask])


def test_k_means_of_each_group():
  x = tokens(4, (40, D))
  quantizer = turned(make(rotate=True))
  state = quantizer.init_from_data(jax.random.key(0), x)
  found, _ = call(quantizer, x, state)
  for g in range(G):
    counts = np.bincount(found.indices[:, g], minlength=K)
    np.testing.assert_array_equal(state.counts[g], counts)
  assert np.sum((found.codes - x) ** 2) < 0.5 * np.sum(x**2)
  with pytest.raises(ValueError, match="input_dim must be None, got 3"):
    make(input_dim=3).init_from_data(jax.random.key(0), np.ones((9, 9)))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_over_eight_devices_equals_one(kind):
  quantizer, state = turned(make(rotate=True)), state_of(tables())
  x = tokens(0, (8, 6, D))
  want = call(quantizer, x, state, train=True)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
  x = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))

  def local(x, state):
    found, state = quantizer(x, state, train=True, axis_name="data")
    return found[:2], (found.losses, found.stats, state)

  got = jax.jit(
    jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(jax.P("data"), jax.P()),
      out_specs=(jax.P("data"), jax.P()),
    )
  )(x, state)
  want = want[0][:2], (want[0].losses, want[0].stats, want[1])
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, got, want)


@pytest.mark.unchecked
def test_errors():
  with pytest.raises(ValueError, match="num_heads must be 1, got 2"):
    make(num_heads=2)
  config = dataclasses.replace(make().config, num_groups=0)
  with pytest.raises(ValueError, match="num_groups must lie in"):
    ProductQuantizer(config, rngs=nnx.Rngs(0))
  with pytest.raises(
    ValueError, match=r"x must have width 6, got shape \(2, 5"
  ):
    make()(jnp.ones((2, 5)), state_of(tables()))

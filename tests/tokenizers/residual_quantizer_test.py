"""Residual quantisation: stages, prefixes, beams, dropout, one gradient."""

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
from tokjax.tokenizers.codebook import CodebookConfig, CodebookState
from tokjax.tokenizers.residual_quantizer import ResidualQuantizer, RVQConfig
from tokjax.tokenizers.vector_quantizer import VectorQuantizer, VQConfig

M, K, D = 3, 5, 4


def make(num_stages=M, num_codes=K, dim=D, codebook=None, **settings):
  book = CodebookConfig(num_codes, dim, learning="ema")
  book = dataclasses.replace(book, **(codebook or {}))
  config = RVQConfig(book, num_stages, **settings)
  return ResidualQuantizer(config, rngs=nnx.Rngs(0))


def tables(seed=1, shape=(M, K, D)):
  random = np.random.default_rng(seed)
  scale = 0.5 ** np.arange(shape[0]).reshape(-1, 1, 1)
  return (random.normal(size=shape) * scale).astype(np.float32)


def state_of(codes):
  codes = np.asarray(codes, np.float32)
  return CodebookState(np.ones(codes.shape[:-1], np.float32), codes, codes)


def tokens(seed=0, shape=(3, 6, D)):
  random = np.random.default_rng(seed)
  return random.normal(size=shape).astype(np.float32)


@functools.partial(jax.jit, static_argnames="train")
def call(
  quantizer, x, state, mask=None, num_active=None, key=None, train=False
):
  return quantizer(x, state, mask, num_active=num_active, key=key, train=train)


def loop(x, codes, num_active=M):
  """Indices and sums in float64, stage after stage."""
  indices = np.full((*x.shape[:-1], len(codes)), -1)
  total = np.zeros(x.shape)
  for where in np.ndindex(x.shape[:-1]):
    for m in range(num_active):
      left = x[where] - total[where]
      k = np.argmin(((left - codes[m]) ** 2).sum(-1))
      indices[*where, m] = k
      total[where] += codes[m, k]
  return indices, total


@pytest.mark.parametrize("num_active", [None, 2, 0])
def test_equals_a_loop(num_active):
  quantizer, state, x = make(), state_of(tables()), tokens()
  found, after = call(quantizer, x, state, num_active=num_active)
  used = M if num_active is None else num_active
  indices, total = loop(x.astype(float), state.codes.astype(float), used)
  np.testing.assert_array_equal(found.indices, indices)
  np.testing.assert_allclose(found.codes, total, atol=1e-5)
  jax.tree.map(np.testing.assert_array_equal, after, state)
  again = run(quantizer.lookup, found.indices, state)
  np.testing.assert_allclose(again, found.codes, atol=1e-6)


def test_worked_example():
  codes = [[[1, 1], [-1, -1], [9, 9], [9, 9]],
           [[0.5, 0], [0, 0.5], [-0.5, 0], [0, -0.5]]]  # fmt: skip
  x = np.array([[1.4, 0.8]], np.float32)
  found, _ = call(make(2, 4, 2), x, state_of(codes))
  assert found.indices.tolist() == [[0, 0]]
  np.testing.assert_allclose(found.codes, [[1.5, 1.0]])
  error = float(np.sum((found.codes - x) ** 2))
  assert error == pytest.approx(0.05, rel=1e-4)


def test_a_prefix_of_the_codes_is_what_fewer_stages_give():
  quantizer, state, x = make(), state_of(tables()), tokens()
  whole, _ = call(quantizer, x, state)
  for n in range(M + 1):
    part, _ = call(quantizer, x, state, num_active=n)
    got = run(quantizer.lookup, whole.indices, state, num_active=n)
    np.testing.assert_allclose(got, part.codes, atol=1e-6)
    np.testing.assert_array_equal(part.indices[..., :n], whole.indices[..., :n])
    assert np.all(part.indices[..., n:] == -1)
  rows = np.array([0, 1, 3])
  each, _ = call(quantizer, x, state, num_active=rows)
  got = run(quantizer.lookup, whole.indices, state, num_active=rows)
  np.testing.assert_allclose(each.codes, got, atol=1e-6)


def test_with_zero_among_the_codes_no_stage_makes_it_worse():
  codes = tables()
  codes[:, 0] = 0
  x = tokens()
  errors = [
    np.sum(
      (call(make(), x, state_of(codes), num_active=n)[0].codes - x) ** 2, -1
    )
    for n in range(M + 1)
  ]
  for before, after in itertools.pairwise(errors):
    assert np.all(after <= before + 1e-6)


def test_one_stage_is_vector_quantisation():
  codes, x = tables(shape=(1, K, D)), tokens()
  mask = np.random.default_rng(2).random(x.shape[:-1]) < 0.7
  got, after = call(make(1), x, state_of(codes), mask, train=True)
  config = VQConfig(CodebookConfig(K, D, learning="ema"))
  vq = VectorQuantizer(config, rngs=nnx.Rngs(0))
  want, after_vq = jax.jit(functools.partial(vq, train=True))(
    x, state_of(codes[0]), mask
  )
  np.testing.assert_array_equal(got.indices[..., 0], want.indices)
  np.testing.assert_allclose(got.codes, want.codes, atol=1e-6)
  for name in want.losses:
    np.testing.assert_allclose(got.losses[name], want.losses[name], rtol=1e-5)
  jax.tree.map(
    lambda g, w: np.testing.assert_allclose(g[0], w, rtol=1e-6),
    after,
    after_vq,
  )


def test_the_beam_finds_what_greed_misses():
  codes = [[[0.0], [1.0]], [[0.0], [0.6]]]
  x = np.array([[0.55]], np.float32)
  greedy, _ = call(make(2, 2, 1), x, state_of(codes))
  beam, _ = call(make(2, 2, 1, beam_size=2), x, state_of(codes))
  assert greedy.indices.tolist() == [[1, 0]]
  assert beam.indices.tolist() == [[0, 1]]
  np.testing.assert_allclose(beam.codes, [[0.6]])


def test_a_wide_beam_is_exhaustive_and_respects_stages_and_mask():
  codes, x = tables(), tokens()
  mask = np.random.default_rng(3).random(x.shape[:-1]) < 0.7
  quantizer = make(beam_size=K ** (M - 1))
  found, _ = call(quantizer, x, state_of(codes), mask)
  sums = np.stack([
    sum(codes[m, k] for m, k in enumerate(path))
    for path in itertools.product(range(K), repeat=M)
  ])  # fmt: skip
  best = ((x[..., None, :] - sums) ** 2).sum(-1).min(-1)
  error = ((x - found.codes) ** 2).sum(-1)
  np.testing.assert_allclose(error[mask], best[mask], rtol=1e-4)
  assert np.all(found.indices[~mask] == -1) and not np.any(found.codes[~mask])
  greedy, _ = call(make(), x, state_of(codes), num_active=2)
  two, _ = call(quantizer, x, state_of(codes), num_active=2)
  assert np.all(two.indices[..., 2] == -1)
  worse = ((x - greedy.codes) ** 2).sum(-1) - ((x - two.codes) ** 2).sum(-1)
  assert np.all(worse > -1e-6) and np.any(worse > 1e-3)


def test_the_encoder_gets_the_gradient_once_and_each_table_its_own():
  quantizer = make(codebook={"learning": "gradient"})
  quantizer.codebooks.codes = nnx.Param(jnp.asarray(tables()))
  state = quantizer.init_state(jax.random.key(0))
  x, g = tokens(), tokens(3)

  @jax.jit
  def gradients(quantizer, x):
    def codes(quantizer, x):
      return jnp.sum(g * quantizer(x, state, train=True)[0].codes)

    def loss(name, quantizer, x):
      return quantizer(x, state, train=True)[0].losses[name]

    parts = [
      codes,
      *(functools.partial(loss, n) for n in ("commitment", "codebook")),
    ]
    return [jax.grad(part, argnums=(0, 1))(quantizer, x) for part in parts]

  of_codes, of_commitment, of_codebook = gradients(quantizer, x)
  np.testing.assert_allclose(of_codes[1], g, rtol=1e-6)
  assert not np.any(of_codes[0].codebooks.codes[...])
  indices, _ = loop(x.astype(float), tables().astype(float))
  left, want = x.astype(float), 0
  for m in range(M):
    left = left - tables()[m, indices[..., m]]
    want = want + 0.25 * 2 * left / (x.size * M)
  np.testing.assert_allclose(of_commitment[1], want, rtol=1e-3, atol=1e-6)
  assert not np.any(of_codebook[1])
  moved = np.abs(of_codebook[0].codebooks.codes[...]).sum(-1) > 0
  used = [np.isin(np.arange(K), indices[..., m]) for m in range(M)]
  np.testing.assert_array_equal(moved, used)


def test_dropout_keeps_a_random_number_of_first_stages():
  quantizer, state, x = make(dropout_from=1), state_of(tables()), tokens()
  kept = set()
  for seed in range(12):
    found, _ = call(
      quantizer, x, state, key=jax.random.key(seed), train=True
    )  # fmt: skip
    counts = np.sum(found.indices >= 0, axis=-1)
    assert np.ptp(counts) == 0  # one number a step
    kept.add(int(counts[0, 0]))
  assert kept == {1, 2, 3}
  whole, _ = call(quantizer, x, state)
  assert np.all(whole.indices >= 0)


def test_a_shared_table_learns_from_all_stages():
  quantizer, x = make(shared=True), tokens()
  codes = tables(shape=(1, K, D))[0]
  found, after = call(quantizer, x, state_of(codes), train=True)
  indices, _ = loop(x.astype(float), np.broadcast_to(codes, (M, K, D)))
  np.testing.assert_array_equal(found.indices, indices)
  want = 0.99 + 0.01 * np.bincount(indices.ravel(), minlength=K)
  np.testing.assert_allclose(after.counts, want, rtol=1e-6)


def test_rotation_is_by_the_sum():
  quantizer, state, x = make(estimator="rotation"), state_of(tables()), tokens()
  found, _ = call(quantizer, x, state, train=True)
  plain, _ = call(quantizer, x, state)
  np.testing.assert_allclose(found.codes, plain.codes, atol=1e-5)


def test_k_means_of_what_is_left():
  x = tokens(4, (40, D))
  state = make(2).init_from_data(jax.random.key(0), x)
  found, _ = call(make(2), x, state)
  error = [np.sum((x - call(make(2), x, state, num_active=n)[0].codes) ** 2)
           for n in range(3)]  # fmt: skip
  assert error[0] > 1.5 * error[1] > 1.8 * error[2]
  np.testing.assert_array_equal(
    state.counts[1], np.bincount(found.indices[:, 1], minlength=K)
  )
  with pytest.raises(ValueError, match="shared must be False"):
    make(shared=True).init_from_data(jax.random.key(0), x)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_over_eight_devices_equals_one(kind):
  quantizer = make(codebook={"reset": "batch"}, dropout_from=1)
  state, x, key = state_of(tables()), tokens(0, (8, 6, D)), jax.random.key(1)
  want = call(quantizer, x, state, key=key, train=True)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
  x = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))

  def local(x, state):
    found, state = quantizer(x, state, train=True, key=key, axis_name="data")
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
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
    got,
    want,
  )


@pytest.mark.unchecked
@pytest.mark.parametrize("settings, message", [
  ({"estimator": "index"}, "estimator must be one of"),
  ({"num_stages": 0}, "num_stages must lie in"),
  ({"dropout_from": 4}, "dropout_from must lie in"),
  ({"beam_size": 0}, "beam_size must lie in"),
  ({"codebook": {"metric": "cosine"}}, 'must be "euclidean"'),
])  # fmt: skip
def test_settings_that_cannot_be(settings, message):
  with pytest.raises(ValueError, match=message):
    make(**settings)


def test_errors():
  quantizer, state = make(dropout_from=1), state_of(tables())
  with pytest.raises(
    ValueError, match=r"x must have width 4, got shape \(2, 5"
  ):
    quantizer(jnp.ones((2, 5)), state)
  with pytest.raises(ValueError, match="key must be given to train"):
    quantizer(jnp.ones((2, D)), state, train=True)


def test_padding_reaches_no_gradient_and_bits_add_up():
  quantizer, state, x = make(), state_of(tables()), tokens()
  mask = np.random.default_rng(2).random(x.shape[:-1]) < 0.7
  x[~mask] = np.nan

  @jax.jit
  def gradient(x):
    def total(x):
      found, _ = quantizer(x, state, mask, train=True)
      return jnp.sum(found.codes) + sum(found.losses.values())

    return jax.grad(total)(x)

  got = np.asarray(gradient(x))
  assert np.all(np.isfinite(got)) and not np.any(got[~mask])
  assert quantizer.num_codes == K
  assert quantizer.bits_per_vector == pytest.approx(M * np.log2(K))


def test_anchors_bring_each_stage_to_what_is_left_for_it():
  """Of two far points the first stage takes the middle, the second the rest."""
  settings = {"learning": "gradient", "reset": "anchors"}
  quantizer = RVQConfig(CodebookConfig(1, 2, **settings), 2).build(nnx.Rngs(0))
  state = quantizer.init_state(jax.random.key(0))
  x = np.array([[4.0, 2.0]], np.float32)
  # Codes in use move by exp(-10) of the way: those of the first step, wholly
  # unused so far, count as used by it.
  _, after = call(quantizer, x, state, train=True)
  start = np.asarray(quantizer.codebooks.codes[...])[:, 0]
  left = [x[0], x[0] - start[0]]
  weight = np.exp(-10 - 1e-3)
  for m in range(2):
    want = weight * (left[m] - start[m])
    np.testing.assert_allclose(after.shift[m, 0], want, rtol=1e-3, atol=1e-9)

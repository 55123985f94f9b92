"""ILLUME: quantised features, their loss, padding, and a frozen table."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.compiled import run
from tokjax.tokenizers.codebook import CodebookConfig
from tokjax.tokenizers.illume import IllumeConfig
from tokjax.tokenizers.transformer import TransformerConfig
from tokjax.tokenizers.vector_quantizer import VQConfig

TINY = IllumeConfig(
  features_dim=5,
  num_tokens=6,
  trunk=TransformerConfig(8, 1, 2),
  quantizer=VQConfig(CodebookConfig(7, 4, learning="simvq")),
  semantic_weight=2.0,
)


@functools.cache
def build(config=TINY):
  model = jax.jit(lambda: config.build(nnx.Rngs(0)))()
  return model, jax.jit(model.init_state)(jax.random.key(1))


def features(seed=0, shape=(3, 6, 5)):
  random = np.random.default_rng(seed)
  return 3 * random.normal(size=shape).astype(np.float32) + 1


@functools.partial(jax.jit, static_argnames="train")
def call(model, x, state, mask=None, train=False):
  return model(x, state, mask, train=train)


def unit(x):
  x = np.float64(x)
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_features_come_back_from_their_codes():
  (model, state), x = build(), features()
  found, _ = call(model, x, state)
  codes = run(model.encode, x, state)
  again = run(model.decode, codes.indices, state)
  np.testing.assert_allclose(found.output, again, atol=1e-5)
  assert found.losses.keys() == {"semantic", "commitment", "codebook"}
  want = 2 * (1 - (unit(x) * unit(again)).sum(-1).mean())
  assert float(found.losses["semantic"]) == pytest.approx(want, rel=1e-5)


def test_the_table_before_its_matrix_has_learned_is_the_frozen_one():
  (model, state), x = build(), features()
  found = run(model.encode, x, state)
  y = np.float64(run(model.vectors, x))
  far = ((y[..., None, :] - np.float64(state.codes)) ** 2).sum(-1)
  np.testing.assert_array_equal(found.indices, far.argmin(-1))


def test_the_matrix_and_both_trunks_learn_but_not_the_frozen_table():
  (model, state), x = build(), features()

  @jax.jit
  def gradients(model, x, state):
    def loss(model, x, codes):
      found, _ = model(x, state._replace(codes=codes), train=True)
      return sum(found.losses.values())

    return jax.grad(loss, (0, 1, 2))(model, x, state.codes)

  of_model, of_x, of_codes = gradients(model, x, state)
  assert not np.any(of_codes)
  assert np.any(of_x)  # an encoder before it may learn
  still = [
    jax.tree_util.keystr(path)
    for path, g in jax.tree_util.tree_leaves_with_path(of_model)
    if not np.abs(g).max() > 0
  ]
  # A softmax does not see what all keys have in common.
  assert all("key" in path and "bias" in path for path in still), still


def test_targets_of_mean_0_and_variance_1():
  model, state = build(dataclasses.replace(TINY, normalize_target=True))
  x = features()
  found, _ = call(model, x, state)
  target = np.float64(x) - x.mean(-1, keepdims=True)
  want = 2 * (1 - (unit(target) * unit(found.output)).sum(-1).mean())
  assert float(found.losses["semantic"]) == pytest.approx(want, rel=1e-4)
  plain, _ = call(*build()[:1], x, state)
  assert abs(float(plain.losses["semantic"]) - want) > 1e-3


def test_padding_changes_nothing():
  (model, state), x = build(), features()
  mask = np.arange(6)[None] < np.array([4, 6, 1])[:, None]
  one, after = call(model, x, state, mask, train=True)
  x[~mask] = np.nan
  two = call(model, x, state, mask, train=True)
  jax.tree.map(np.testing.assert_array_equal, (one, after), two)
  assert not np.any(one.output[~mask])
  codes = run(model.encode, x, state, mask)
  alone = run(model.encode, x[:1, :4], state)
  np.testing.assert_array_equal(codes.indices[0, :4], alone.indices[0])
  assert np.all(codes.indices[~mask] == -1)
  again = run(model.decode, codes.indices, state)
  np.testing.assert_allclose(again, one.output, atol=1e-5)
  cosine = (unit(x[mask]) * unit(one.output[mask])).sum(-1).mean()
  want = 2 * (1 - cosine)
  assert float(one.losses["semantic"]) == pytest.approx(want, rel=1e-5)


def test_defaults_are_built_whole():
  shapes = nnx.eval_shape(lambda: IllumeConfig().build(nnx.Rngs(0)))
  state = jax.eval_shape(
    lambda: IllumeConfig().build(nnx.Rngs(0)).init_state(jax.random.key(0))
  )
  assert state.codes.shape == (16384, 32)
  assert shapes.positions.shape == (256, 1152)
  assert shapes.encoder.blocks.mlp.up.kernel.shape == (4, 1152, 4608)


@pytest.mark.unchecked
def test_errors():
  model, state = build()
  with pytest.raises(ValueError, match="width_of_features=4, features_dim=5"):
    model.encode(features(0, (1, 6, 4)), state)
  with pytest.raises(ValueError, match="tokens=3, num_tokens=6"):
    model.decode(jnp.zeros((1, 3), jnp.int32), state)
  wide = dataclasses.replace(TINY.quantizer, input_dim=8)
  with pytest.raises(ValueError, match="input_dim must be one of None"):
    dataclasses.replace(TINY, quantizer=wide).build(nnx.Rngs(0))

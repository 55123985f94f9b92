"""SETRec: tokens of items, what reads what, and what the loss trains."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.compiled import run
from tokjax.ops import item_sets
from tokjax.tokenizers import setrec
from tokjax.tokenizers.setrec import SetRecConfig

CONFIG = SetRecConfig(
  cf_dim=3,
  feature_dim=5,
  num_semantic=2,
  hidden=(6,),
  width=8,
  num_layers=2,
  history=4,
)


@functools.cache
def built(**settings):
  config = dataclasses.replace(CONFIG, **settings)
  return jax.jit(lambda: config.build(nnx.Rngs(0)))()


def inputs(items=7):
  rng = np.random.default_rng(0)
  cf = rng.standard_normal((items, 3)).astype(np.float32)
  features = rng.standard_normal((items, 5)).astype(np.float32)
  history = np.array([[-1, -1, 2, 5], [0, 3, 3, 1]], np.int32)
  return cf, features, history, np.array([4, 6], np.int32)


@jax.jit
def answered(model, tokens, mask):
  return model(tokens, mask)


def drawn(batch=2):
  rng = np.random.default_rng(1)
  x = rng.standard_normal((batch, 4, 3, 8)).astype(np.float32)
  mask = np.array([[0, 1, 1, 1], [1, 1, 1, 1]], bool)
  return jnp.asarray(x), jnp.asarray(mask)


def mlp(layers, x):
  for number, layer in enumerate(layers):
    x = np.maximum(x, 0) if number else x
    kernel = np.asarray(layer.kernel[...], float)
    x = x @ kernel + np.asarray(layer.bias[...], float)
  return x


def test_set_of_an_item():
  model, (cf, features, *_) = built(), inputs()
  got = run(model.tokens, cf, features)
  assert got.shape == (7, 3, 8)
  kernel = np.asarray(model.cf.kernel[...], float)
  np.testing.assert_allclose(got[:, 0], cf @ kernel, rtol=1e-4, atol=1e-5)
  want = mlp(model.encoder, features.astype(float)).reshape(7, 2, 8)
  np.testing.assert_allclose(got[:, 1:], want, rtol=1e-4, atol=1e-5)
  shapes = [layer.kernel.shape for layer in model.decoder]
  assert shapes == [(16, 6), (6, 5)]  # mirrored
  assert not any(np.asarray(layer.bias[...]).any() for layer in model.encoder)


def test_losses_are_their_definitions():
  model, (cf, features, history, target) = built(), inputs()
  got = run(model.losses, cf, features, history, target)
  catalogue = run(model.catalogue, cf, features)
  tokens = run(model.histories, catalogue, history)
  answers = answered(model, tokens, jnp.asarray(history >= 0))
  want = run(item_sets.set_loss, answers, catalogue, target)
  np.testing.assert_allclose(got.ranking, want, rtol=1e-5)
  latent = mlp(model.encoder, features.astype(float))
  error = np.square(mlp(model.decoder, latent) - features).mean(1)
  occurrences = [2, 5, 0, 3, 3, 1]
  np.testing.assert_allclose(
    got.reconstruction, 0.7 * error[occurrences].mean(), rtol=1e-4
  )


def test_histories_are_rows_of_the_catalogue():
  model, (cf, features, history, _) = built(), inputs()
  catalogue = np.asarray(run(model.catalogue, cf, features))
  got = np.asarray(run(model.histories, catalogue, history))
  np.testing.assert_array_equal(got[1, 2], catalogue[:, 3])
  assert not got[0, :2].any()


def test_padding_has_no_influence():
  model, (tokens, mask) = built(), drawn()
  poisoned = jnp.where(mask[..., None, None], tokens, jnp.nan)
  got, want = answered(model, poisoned, mask), answered(model, tokens, mask)
  np.testing.assert_array_equal(got, want)
  changed = answered(model, tokens.at[0, 1].multiply(-1), mask)
  assert np.abs(changed - want)[:, 0].max() > 1e-4
  np.testing.assert_array_equal(changed[:, 1], want[:, 1])


def test_order_within_an_item_means_nothing():
  model, (tokens, mask) = built(), drawn()
  want = answered(model, tokens, mask)
  mixed = tokens.at[:, 1].set(tokens[:, 1, jnp.array([2, 0, 1])])
  np.testing.assert_allclose(
    answered(model, mixed, mask), want, rtol=1e-4, atol=1e-5
  )
  moved = tokens[:, jnp.array([0, 2, 1, 3])]  # the order of items does
  assert np.abs(answered(model, moved, mask) - want).max() > 1e-4


def test_slots_and_their_queries_move_together():
  model, (tokens, mask) = built(), drawn()
  order = jnp.array([0, 2, 1])
  graph, state = nnx.split(model)
  other = nnx.merge(graph, jax.tree.map(jnp.copy, state))
  other.queries[...] = model.queries[...][order]
  behind = model.positions[...]
  other.positions[...] = behind.at[-3:].set(behind[-3:][order])
  got = answered(other, tokens[:, :, order], mask)
  want = answered(model, tokens, mask)[order]
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_tokens_of_an_item_do_not_read_each_other():
  """Through all layers: the derivative is exactly zero."""
  model = built(num_instruction=0, num_response=0)
  sizes = {"num_instruction": 0, "num_items": 4, "set_size": 3}
  sizes |= {"num_response": 0, "num_queries": 3}
  mask = jnp.asarray(item_sets.set_mask(**sizes))

  @jax.jit
  def moved(x, along):
    through = lambda x: model.transformer(x, mask=mask)  # noqa: E731
    return jax.jvp(through, (x,), (along,))[1]

  x = jax.random.normal(jax.random.key(0), (1, 15, 8))
  along = jnp.zeros_like(x).at[0, 4].set(jnp.arange(8.0))  # item 1, token 1
  found = np.abs(moved(x, along))[0].max(-1)
  assert (found[[0, 1, 2, 3, 5]] == 0).all()
  assert (found[[4, 6, 7, 8, 9, 12, 13, 14]] > 0).all()


def test_queries_do_not_read_each_other():
  model, (tokens, mask) = built(), drawn()
  graph, state = nnx.split(model)
  other = nnx.merge(graph, jax.tree.map(jnp.copy, state))
  other.queries[...] = model.queries[...].at[1].multiply(-1.0)
  got, want = answered(other, tokens, mask), answered(model, tokens, mask)
  np.testing.assert_array_equal(got[0], want[0])
  np.testing.assert_array_equal(got[2], want[2])
  assert np.abs(got[1] - want[1]).max() > 1e-3


def test_gradients_go_to_the_tokenizers_and_not_to_frozen_inputs_alone():
  model, (cf, features, history, target) = built(), inputs()

  @jax.jit
  def gradient(model):
    return jax.grad(
      lambda model: sum(model.losses(cf, features, history, target))
    )(model)

  found = gradient(model)
  for name in ("cf", "encoder", "decoder", "queries", "positions", "texts"):
    for leaf in jax.tree.leaves(getattr(found, name)):
      assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, name


@pytest.mark.parametrize("left", ["cf", "semantic"])
def test_one_kind_of_token_alone(left):
  cf, features, history, target = inputs()
  if left == "cf":
    model, features = built(num_semantic=0), None
  else:
    model, cf = built(cf_dim=0), None
  losses = run(model.losses, cf, features, history, target)
  assert np.isfinite(losses.ranking)
  assert (losses.reconstruction == 0) == (left == "cf")
  weights = setrec.set_weights(model.config, 0.3)
  np.testing.assert_array_equal(weights, np.ones(model.config.set_size))


def test_without_semantic_tokens_it_is_one_vector():
  model, (cf, _, history, _) = built(num_semantic=0), inputs()
  catalogue = run(model.catalogue, cf, None)
  tokens = run(model.histories, catalogue, history)
  answers = answered(model, tokens, jnp.asarray(history >= 0))
  got = run(item_sets.set_score, answers, catalogue, jnp.ones(1))
  items = cf @ np.asarray(model.cf.kernel[...])
  np.testing.assert_allclose(got, answers[0] @ items.T, rtol=1e-4, atol=1e-5)


def test_learns_what_follows():
  model, (cf, features, *_) = built(), inputs()
  rng = np.random.default_rng(2)
  history = rng.integers(0, 7, (16, 4)).astype(np.int32)
  target = ((history[:, -1] + 1) % 7).astype(np.int32)

  optimizer = optax.adam(2e-2)

  @jax.jit
  def trained(model):
    def loss(model):
      return model.losses(cf, features, history, target).ranking

    def step(carry, _):
      model, moments = carry
      value, gradient = jax.value_and_grad(loss)(model)
      updates, moments = optimizer.update(gradient, moments)
      return (optax.apply_updates(model, updates), moments), value

    start = model, optimizer.init(model)
    return jax.lax.scan(step, start, length=200)[1]

  losses = trained(model)
  assert losses[-1] < 0.5 * losses[0]


def test_errors():
  with pytest.raises(ValueError, match="num_semantic must be positive"):
    SetRecConfig(cf_dim=0, num_semantic=0).build(nnx.Rngs(0))
  model, (tokens, mask) = built(), drawn()
  with pytest.raises(ValueError, match="tokens=3, history=4"):
    jax.eval_shape(model, tokens[:, 1:], mask[:, 1:])
  with pytest.raises(ValueError, match="tokens_of_item=2, slots=3"):
    jax.eval_shape(model, tokens[:, :, 1:], mask)
  with pytest.raises(ValueError, match="features must be given"):
    model.tokens(jnp.ones((7, 3)), None)
  with pytest.raises(ValueError, match="beta must lie in 0..1, got 2"):
    setrec.set_weights(CONFIG, 2)

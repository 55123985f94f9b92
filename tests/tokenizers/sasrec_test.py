"""SASRec: a causal model of sequences of items."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.compiled import run
from tokjax.tokenizers import sasrec
from tokjax.tokenizers.sasrec import SasrecConfig

CONFIG = SasrecConfig(7, width=8, num_layers=2, history=4)


@functools.cache
def built():
  return jax.jit(lambda: CONFIG.build(nnx.Rngs(0)))()


@jax.jit
def states(model, history):
  return model(history)


HISTORY = np.array([[-1, -1, 2, 5], [0, 3, 3, 1]], np.int32)
TARGET = np.array([[-1, -1, 5, 6], [3, 3, 1, 4]], np.int32)


def test_later_items_and_padding_have_no_influence():
  model = built()
  want = states(model, HISTORY)
  changed = HISTORY.copy()
  changed[1, 2:] = 6
  got = states(model, changed)
  np.testing.assert_array_equal(got[1, :2], want[1, :2])
  assert np.abs(got[1, 2:] - want[1, 2:]).max() > 1e-3
  longer = HISTORY.copy()
  longer[0, 1] = 4  # an item before the others is read
  assert np.abs(states(model, longer)[0, 2:] - want[0, 2:]).max() > 1e-3


def test_loss_is_a_loop():
  model = built()
  known = np.array([0, 1, 0, 1, 1, 1, 1], bool)
  got = run(sasrec.next_item_loss, model, HISTORY, TARGET, known)
  hidden = np.asarray(states(model, HISTORY), float)
  items = np.asarray(model.items[...], float)
  losses = []
  for b, n in zip(*np.nonzero(TARGET >= 0), strict=True):
    scores = items @ hidden[b, n]
    losses.append(np.log(np.exp(scores[known]).sum()) - scores[TARGET[b, n]])
  assert len(losses) == 6
  np.testing.assert_allclose(got, np.mean(losses), rtol=1e-5)


def test_dropout_needs_a_key():
  model = built()
  one, two = (jax.random.key(seed) for seed in (1, 2))
  plain = run(sasrec.next_item_loss, model, HISTORY, TARGET)
  first = run(sasrec.next_item_loss, model, HISTORY, TARGET, key=one)
  second = run(sasrec.next_item_loss, model, HISTORY, TARGET, key=two)
  assert len({float(plain), float(first), float(second)}) == 3


def test_embeddings_are_frozen_and_zero_where_nothing_was_learned():
  model = built()
  known = jnp.arange(7) != 2
  got = np.asarray(model.item_embeddings(known))
  assert not got[2].any() and got[[0, 1, 3, 4, 5, 6]].any(1).all()
  gradient = jax.grad(lambda model: jnp.sum(model.item_embeddings()))(model)
  assert not np.asarray(gradient.items[...]).any()


def test_gradient_reaches_all_parameters():
  model = built()

  @jax.jit
  def gradient(model):
    return jax.grad(
      lambda model: sasrec.next_item_loss(model, HISTORY, TARGET)
    )(model)

  for leaf in jax.tree.leaves(gradient(model)):
    assert np.isfinite(leaf).all()
  assert np.abs(gradient(model).items[...]).max(1).all()


def test_errors():
  with pytest.raises(ValueError, match="history=3, history_of_config=4"):
    jax.eval_shape(built(), HISTORY[:, 1:])
  with pytest.raises(ValueError, match="num_items must lie in"):
    SasrecConfig(0).build(nnx.Rngs(0))

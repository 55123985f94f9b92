"""A language model with a frozen table: what it reads and what it learns."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.compiled import run
from tokjax.tokenizers import unicode_glyphs
from tokjax.tokenizers.glyph_language_model import GlyphLanguageModelConfig

VOCABULARY, WIDTH = 11, 8


@functools.cache
def model(**settings):
  config = GlyphLanguageModelConfig(
    VOCABULARY, WIDTH, num_layers=2, num_heads=2, init_scale=0.4, **settings
  )
  return jax.jit(lambda: config.build(nnx.Rngs(0)))()


def table():
  return jax.random.normal(jax.random.key(5), (VOCABULARY, WIDTH))


def ids():
  return jax.random.randint(jax.random.key(6), (2, 6), 0, VOCABULARY)


@jax.jit
def logits(model, ids, table=None, mask=None):
  return model(ids, table, mask)


@jax.jit
def nats(model, ids, table=None, mask=None):
  return model.negative_log_likelihood(ids, table, mask)


def rotated(x, base=10000.0):
  """[N, d] in float64."""
  half = x.shape[1] // 2
  pairs = x[:, :half] + 1j * x[:, half:]
  rates = base ** (-np.arange(half) / half)
  pairs = pairs * np.exp(1j * np.arange(len(x))[:, None] * rates)
  return np.concatenate([pairs.real, pairs.imag], axis=1)


def normed(x):
  return (x - x.mean(-1, keepdims=True)) / np.sqrt(
    x.var(-1, keepdims=True) + 1e-5
  )


def by_hand(model, rows):
  """One text, layer by layer; biases are zero and scales one at the start."""
  x, n = np.asarray(rows, float), len(rows)
  blocks = jax.tree.map(
    lambda leaf: np.asarray(leaf, float), model.blocks.blocks
  )
  erf = np.vectorize(math.erf)
  for layer in range(2):
    block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], blocks)
    y, mixed = normed(x), []
    q, k, v = (y @ getattr(block.attention, name).kernel[...]
               for name in ("query", "key", "value"))  # fmt: skip
    for head in range(2):
      part = slice(4 * head, 4 * head + 4)
      scores = rotated(q[:, part]) @ rotated(k[:, part]).T / 2
      scores = np.where(np.tril(np.ones((n, n))), scores, -np.inf)
      shares = np.exp(scores - scores.max(1, keepdims=True))
      mixed.append(shares / shares.sum(1, keepdims=True) @ v[:, part])
    x = x + np.concatenate(mixed, 1) @ block.attention.out.kernel[...]
    hidden = normed(x) @ block.mlp.up.kernel[...]
    hidden = hidden * (1 + erf(hidden / np.sqrt(2))) / 2
    x = x + hidden @ block.mlp.down.kernel[...]
  return normed(x) @ np.asarray(model.head.kernel[...], float)


def test_logits_and_losses_equal_numpy():
  got, costs = logits(model(), ids(), table()), nats(model(), ids(), table())
  assert got.dtype == costs.dtype == jnp.float32
  for i in range(2):
    want = by_hand(model(), np.asarray(table())[ids()[i]])
    np.testing.assert_allclose(got[i], want, atol=2e-4)
    total = np.log(np.exp(want).sum(1))
    chosen = want[np.arange(5), np.asarray(ids())[i, 1:]]
    np.testing.assert_allclose(costs[i], total[:-1] - chosen, atol=2e-4)


def test_frozen_and_trainable_read_the_same_rows():
  trained = model(embedding="trainable")
  rows = trained.embedding[...]
  frozen = model()
  alike = jax.tree.map(lambda x: x, trained)
  alike.embedding, alike.config = None, frozen.config
  got, want = logits(alike, ids(), rows), logits(trained, ids())
  np.testing.assert_allclose(got, want, atol=1e-5)
  twice = GlyphLanguageModelConfig(
    VOCABULARY, WIDTH, num_layers=2, num_heads=2, init_scale=0.4,
    embedding_scale=2.0,
  )  # fmt: skip
  alike.config = twice
  np.testing.assert_allclose(logits(alike, ids(), rows / 2), want, atol=1e-5)


def test_table_has_no_gradient_and_the_optimiser_no_state_for_it():
  def loss(model, table):
    return jnp.mean(model.negative_log_likelihood(ids(), table))

  model_grad, table_grad = run(jax.grad(loss, (0, 1)), model(), table())
  assert not np.asarray(table_grad).any()
  assert all(np.asarray(x).any() for x in (model_grad.head.kernel[...],
             model_grad.blocks.blocks.attention.query.kernel[...]))  # fmt: skip
  state = jax.eval_shape(optax.adamw(1e-3).init, model())
  shapes = [x.shape for x in jax.tree.leaves(state)]
  assert (VOCABULARY, WIDTH) not in shapes
  assert shapes.count((WIDTH, VOCABULARY)) == 2  # of the head
  state = jax.eval_shape(optax.adamw(1e-3).init, model(embedding="trainable"))
  assert [x.shape for x in jax.tree.leaves(state)].count(
    (VOCABULARY, WIDTH)
  ) == 2


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_later_tokens_and_padding_have_no_influence(positions):
  settings = {"positions": positions, "max_length": 6}
  other = ids().at[:, 4:].set(jnp.array([[-1, 3], [0, 0]]))
  mask = jnp.arange(6)[None] < jnp.array([[4], [4]])
  args = (model(**settings), other, table(), mask)
  got, want = logits(*args), logits(model(**settings), ids(), table())
  np.testing.assert_allclose(got[:, :4], want[:, :4], atol=1e-5)
  assert np.abs(got[:, 5] - want[:, 5]).max() > 1e-3
  costs = nats(*args)
  whole = nats(model(**settings), ids(), table())
  np.testing.assert_allclose(costs[:, :3], whole[:, :3], atol=1e-5)
  assert not np.asarray(costs[:, 3:]).any()


def test_order_counts():
  for positions in ("rotary", "learned"):
    one = model(positions=positions, max_length=6)
    swapped = ids()[:, [1, 0, 2, 3, 4, 5]]
    got, want = logits(one, swapped, table()), logits(one, ids(), table())
    assert np.abs(got[:, -1] - want[:, -1]).max() > 1e-3


def test_packed_table_gives_the_same_logits():
  bits = jax.random.bernoulli(jax.random.key(0), 0.4, (VOCABULARY, 16))
  bits = bits.astype(jnp.uint8)
  made = run(unicode_glyphs.frozen_embedding, bits, WIDTH)
  packed = run(unicode_glyphs.packed_embedding, bits, WIDTH)
  got, want = logits(model(), ids(), packed), logits(model(), ids(), made)
  np.testing.assert_allclose(got, want, atol=1e-4)


def test_errors_name_the_argument():
  for settings, given, message in (
    ({}, None, "table must be given exactly if the embedding is frozen"),
    ({"embedding": "trainable"}, table(), "table must be given exactly"),
    ({}, table()[:-1], "rows_of_table=10, vocabulary_size=11"),
    ({}, table()[:, :-1], "width_of_table=7, width=8"),
    ({"positions": "learned", "max_length": 5}, table(), "number_of_ids"),
  ):
    with pytest.raises(ValueError, match=message):
      jax.eval_shape(model(**settings), ids(), given)
  for settings, message in (
    ({"positions": "sine"}, "positions must be one of"),
    ({"embedding": "tied"}, "embedding must be one of"),
    ({"num_heads": 3}, "width must be a multiple of 3"),
    ({"num_heads": 8}, "width_of_head must be a multiple of 2, got 1"),
  ):
    settings = {"num_heads": 2, **settings}
    config = GlyphLanguageModelConfig(VOCABULARY, WIDTH, 1, **settings)
    with pytest.raises(ValueError, match=message):
      jax.eval_shape(lambda config=config: config.build(nnx.Rngs(0)))

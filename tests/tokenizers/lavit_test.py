"""LaVIT: who reads whom, variable lengths, who learns from what."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.compiled import run
from tests.tokenizers.tiny_tokenizer import built, gradients, parts, quantizer
from tokjax.tokenizers.lavit import LavitConfig

CONFIG = LavitConfig(
  8, 6, 6, 1, 2, 2.0, quantizer(), epsilon=0.0, init_scale=0.3
)


def features(seed=0):
  return np.float32(np.random.default_rng(seed).normal(size=(3, 6, 8)))


KEEP = np.float32([[1, 0, 1, 1, 0, 0], [1] * 6, [0, 0, 0, 0, 0, 1]])


def merge(x, keep, config=CONFIG):
  tokenizer, _ = built(config)
  return np.asarray(run(type(tokenizer).merge, tokenizer, x, keep))


def test_kept_patches_read_earlier_kept_and_all_dropped_ones():
  x, want = features(), merge(features(), KEEP)
  for j in range(6):
    changed = x.copy()
    changed[:, j] = features(1)[:, j]
    moved = np.abs(merge(changed, KEEP) - want).max(axis=-1) > 1e-6
    for b, i in np.argwhere(KEEP):
      reads = j == i or (not KEEP[b, j]) or (j < i and KEEP[b, j])
      # What only other dropped patches read of each other counts for nothing:
      # with one layer it cannot come back.
      assert moved[b, i] == reads, (b, i, j)


def test_all_kept_or_none_is_finite():
  config = dataclasses.replace(CONFIG, epsilon=1e-6)
  for keep in (np.ones((3, 6)), np.zeros((3, 6))):
    assert np.all(np.isfinite(merge(features(), np.float32(keep), config)))


def test_the_choice_is_hard_with_a_soft_gradient():
  tokenizer, _ = built(CONFIG)

  @jax.jit
  def chosen(tokenizer, key):
    return tokenizer.select(features(), key)

  for seed in range(3):
    keep, logits = chosen(tokenizer, jax.random.key(seed))
    assert set(np.unique(keep)) <= {0.0, 1.0}
    np.testing.assert_allclose(np.exp(logits).sum(-1), 1, rtol=1e-5)
  surest = chosen(tokenizer, None)
  np.testing.assert_array_equal(
    surest.keep, surest.logits[..., 0] >= surest.logits[..., 1]
  )
  gradient = jax.jit(
    jax.grad(
      lambda t: jnp.sum(t.select(features(), jax.random.key(0)).keep ** 2)
    )
  )(tokenizer)
  assert parts(gradient) == {"selector"}


def test_tokens_are_packed_and_counted():
  tokenizer, state = built(CONFIG)
  found, length = run(type(tokenizer).encode, tokenizer, features(), state)
  keep = np.asarray(run(type(tokenizer).select, tokenizer, features()).keep)
  np.testing.assert_array_equal(length, keep.sum(axis=1))
  for row, number in zip(np.asarray(found.indices), length, strict=True):
    assert np.all(row[:number] >= 0) and np.all(row[number:] == -1)
  small = dataclasses.replace(CONFIG, num_tokens=2)
  fewer, _ = built(small)
  short, length2 = run(type(fewer).encode, fewer, features(), state)
  np.testing.assert_array_equal(length2, np.minimum(length, 2))
  np.testing.assert_array_equal(short.indices, found.indices[:, :2])
  lost, _ = run(type(fewer).__call__, fewer, features(), state)
  want = np.maximum(keep.sum(axis=1) - 2, 0).mean()
  np.testing.assert_allclose(lost.stats["overflow"], want, rtol=1e-6)


def test_decoding_sees_codes_and_their_order_only():
  tokenizer, state = built(CONFIG)
  tokenizer = copy.deepcopy(tokenizer)
  tokenizer.queries[...] = jnp.asarray(features()[0])  # they start at zero
  decode = functools.partial(run, type(tokenizer).decode, tokenizer)
  rows = np.int32([[3, 1, -1, -1, -1, -1]])
  got = np.asarray(decode(rows, state))
  assert (
    np.abs(np.asarray(decode(rows[:, [1, 0, 2, 3, 4, 5]], state)) - got).max()
    > 1e-4
  )
  np.testing.assert_allclose(decode(rows[:, :2], state), got, atol=1e-5)


def test_losses():
  config = dataclasses.replace(CONFIG, stage="merge")
  tokenizer, state = built(config)
  found, same = run(type(tokenizer).__call__, tokenizer, features(), state)
  x, y = np.float64(features()), np.float64(found.output)
  cosine = (x * y).sum(-1) / np.linalg.norm(x, axis=-1)
  cosine = (cosine / np.linalg.norm(y, axis=-1)).mean()
  np.testing.assert_allclose(found.losses["features"], 1 - cosine, rtol=1e-4)
  keep = np.asarray(run(type(tokenizer).select, tokenizer, features()).keep)
  want = 2 * (1 / 3 - keep.mean()) ** 2
  np.testing.assert_allclose(found.losses["rate"], want, rtol=1e-4)
  jax.tree.map(np.testing.assert_array_equal, same, state)


def test_gradients_by_stage():
  key = jax.random.key(0)
  merging = dataclasses.replace(CONFIG, stage="merge")
  decoder = {"from_code", "ranks", "queries", "decoder", "to_feature"}
  merger = {"merger", "norm_merged", "norm_context", "to_code"}
  tokenizer, state = built(merging)
  found = gradients(tokenizer, state, (features(),), ["features"], key)
  assert parts(found) == decoder | merger | {"selector"}
  found = gradients(tokenizer, state, (features(),), ["rate"], key)
  assert parts(found) == {"selector"}
  tokenizer, state = built(CONFIG)
  found = gradients(tokenizer, state, (features(),), None, key)
  assert parts(found) == decoder | merger | {"quantizer"}


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"num_tokens": 7}, "num_tokens must lie in 1..6"),
    ({"feature_dim": 6}, "feature_dim must be a multiple of 4"),
    ({"stage": "both"}, "stage must be one of"),
  ],
)
def test_settings_are_checked(settings, message):
  config = dataclasses.replace(CONFIG, **settings)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda: config.build(nnx.Rngs(0)))


def test_inputs_are_checked():
  tokenizer, state = built(CONFIG)
  with pytest.raises(ValueError, match="key must be given"):
    tokenizer(features(), state, train=True)
  with pytest.raises(ValueError, match="features_patches=5"):
    tokenizer.select(jnp.zeros((1, 5, 8)))
  with pytest.raises(ValueError, match="features_width=4"):
    tokenizer.select(jnp.zeros((1, 6, 4)))

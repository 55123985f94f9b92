"""The network of bi-level routing attention: sizes, modes, statistics."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokjax.models import biformer_shapes
from tokjax.models.biformer import BatchMoments, BiFormer, BiFormerConfig

TINY = BiFormerConfig(
  widths=(4, 8),
  depths=(1, 1),
  attention=("routing", "routing"),
  num_regions=(2, 3),
  top_k=(2, 9),
  head_dim=4,
  num_outputs=5,
  stem_stride=2,
  lepe_size=3,
  init_scale=0.3,
)


def built(config, seed=0):
  """By NumPy: there is nothing to compile."""
  random = np.random.default_rng(seed)
  model = jax.eval_shape(lambda: BiFormer(config, rngs=nnx.Rngs(0)))
  return jax.tree.map(
    lambda x: random.normal(0.2, 0.3, x.shape).astype(x.dtype), model
  )


def photos(batch=3, sides=(10, 12)):
  random = np.random.default_rng(1)
  return random.normal(size=(batch, *sides, 3)).astype(np.float32)


@jax.jit
def infer(model, images, state):
  return model(images, state)[0]


@pytest.mark.parametrize(
  ("name", "parameters", "operations"),
  [
    ("biformer-tiny", 13.1, 2.2),
    ("biformer-small", 25.5, 4.5),
    ("biformer-base", 56.8, 9.8),
    ("biformer-stl", 28.4, 4.6),
  ],
)
def test_published_sizes(name, parameters, operations):
  config = biformer_shapes.shape(name)
  model = jax.eval_shape(lambda: BiFormer(config, rngs=nnx.Rngs(0)))
  count = sum(math.prod(x.shape) for x in jax.tree.leaves(model))
  assert round(count / 1e6, 1) == parameters
  # A multiply-add counts as one in these figures.
  assert round(biformer_shapes.flops(config, 224) / 2e9, 1) == operations


def test_flops_are_those_of_the_program():
  config = dataclasses.replace(
    TINY,
    widths=(128, 128, 128),
    depths=(1, 1, 1),  # the compiler counts the body of a loop once
    attention=("routing", "window", "full"),
    num_regions=(4, 4, 4),
    top_k=(4, 1, 1),
    head_dim=64,
    full_num_heads=2,
    block_size=16,
  )
  model = jax.eval_shape(lambda: BiFormer(config, rngs=nnx.Rngs(0)))
  state = jax.eval_shape(model.init_state)
  images = jax.ShapeDtypeStruct((1, 128, 128, 3), jnp.float32)
  found = infer.lower(model, images, state).cost_analysis()["flops"]
  # It also counts norms, activations and softmax.
  want = biformer_shapes.flops(config, 128)
  assert want < found < 1.1 * want


@pytest.mark.parametrize(
  "changes",
  [
    {
      "attention": ("full", "full"),
      "full_num_heads": 0,
      "full_lepe": "values",
      "full_bias": True,
    },
    {"attention": ("window", "window"), "num_regions": (1, 1), "top_k": (1, 1)},
  ],
)
def test_all_regions_and_one_window_are_full_attention(changes):
  """Of one head: then the two scales are the same."""
  config = dataclasses.replace(TINY, widths=(4, 4), top_k=(4, 9))
  model, images = built(config), photos()
  other = built(dataclasses.replace(config, **changes))
  state = model.init_state()
  want = infer(model, images, state)
  np.testing.assert_allclose(infer(other, images, state), want, rtol=1e-4)
  routed = built(dataclasses.replace(config, top_k=(1, 1)))
  assert np.abs(infer(routed, images, state) - want).max() > 0.01


def test_training_reads_the_batch_and_moves_the_statistics():
  model, images = built(TINY), photos()
  step = jax.jit(lambda model, state: model(images, state, train=True))
  old = jax.tree.map(lambda x: x + 0.5, model.init_state())
  logits, moved = step(model, old)
  at_once = built(dataclasses.replace(TINY, batch_norm_momentum=1.0))
  _, now = step(at_once, old)
  jax.tree.map(
    lambda a, b, c: np.testing.assert_allclose(
      a, 0.9 * b + 0.1 * c, rtol=1e-5, atol=1e-6
    ),
    moved,
    old,
    now,
  )
  # With the statistics of the batch, inference is training; those of a sample
  # have n - 1 in place of n, for the maps of 5 x 6 and 3 x 3.
  places = 3 * np.array([5 * 6, 3 * 3, 3 * 3])
  assert len(now) == len(places)
  biased = tuple(
    BatchMoments(x.mean, x.variance * (n - 1) / n)
    for x, n in zip(now, places, strict=True)
  )
  np.testing.assert_allclose(
    infer(model, images, biased), logits, rtol=1e-4, atol=1e-4
  )


def test_residuals_are_dropped_by_image():
  config = dataclasses.replace(TINY, drop_path_rate=0.5)  # of the last block
  model = built(config)
  images = np.tile(photos(1), (64, 1, 1, 1))
  state = model.init_state()

  @jax.jit
  def maps(model, key):
    return model.features(images, state, key=key)[0][-1]

  found = np.asarray(maps(model, jax.random.key(0))).reshape(64, -1)
  kinds, counts = np.unique(found.round(3), axis=0, return_counts=True)
  assert len(kinds) == 4 and counts.min() > 4  # with and without each of two
  bare = built(config)
  for layer in (bare.stages[1].out, bare.stages[1].down):
    layer.kernel[...] = 0 * layer.kernel[...]
    layer.bias[...] = 0 * layer.bias[...]
  want = np.asarray(maps(bare, jax.random.key(0)))[0].ravel()
  assert np.abs(kinds - want[None]).max(axis=1).min() < 2e-3
  again = maps(model, jax.random.key(1))
  assert np.abs(again.reshape(64, -1) - found).max() > 0.01


def test_features_are_the_maps_of_the_stages():
  model = built(TINY)
  maps, state = jax.eval_shape(
    lambda model, x: model.features(x, model.init_state()), model, photos()
  )
  assert [x.shape for x in maps] == [(3, 5, 6, 4), (3, 3, 3, 8)]
  assert [x.mean.shape for x in state] == [(4,), (8,), (8,)]
  assert biformer_shapes.convolutions(TINY, 1) == [(3, 2, 4, 8)]


@pytest.mark.unchecked
@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"widths": (4, 6)}, "width_of_stage_1 must be a multiple of 4, got 6"),
    ({"depths": (1,)}, "widths=2, depths=1"),
    ({"attention": ("window", "all")}, "attention must be one of 'routing'"),
    ({"stem": "conv"}, "stem must be one of 'convs', 'patches'"),
    ({"stem_stride": 8}, "stem_stride must be one of 2, 4, got 8"),
    ({"top_k": (5, 1)}, "top_k must lie in 1..4, got 5"),
    ({"full_lepe": "x"}, "full_lepe must be one of"),
    ({"drop_path_rate": 1.0}, "drop_path_rate must lie in 0..0.9"),
    ({"lepe_size": 4}, "lepe_size must be one of"),
  ],
)
def test_configs_that_do_not_fit(changes, message):
  with pytest.raises(ValueError, match=message):
    biformer_shapes.check(dataclasses.replace(TINY, **changes))


@pytest.mark.unchecked
def test_inputs_that_do_not_fit():
  model = built(TINY)
  state = model.init_state()
  with pytest.raises(ValueError, match="channels=4, num_channels=3"):
    model(np.zeros((1, 8, 8, 4), np.float32), state)
  with pytest.raises(ValueError, match="statistics=2, batch_norms=3"):
    model(photos(), state[:-1])
  with pytest.raises(ValueError, match="name must be one of 'biformer-tiny'"):
    biformer_shapes.shape("biformer-huge")

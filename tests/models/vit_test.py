"""One ViT for every family: against stored activations and a plain loop."""

import dataclasses
import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.compiled import run
from tests.models.tiny_vit import (
  CONFIG,
  attention64,
  block_of,
  cut,
  embed,
  embed64,
  encode,
  keep_all,
  linear64,
  mlp64,
  norm64,
  output,
  photos,
  tiny,
)
from tokjax.models import vit, vit_blocks, vit_shapes, vit_weights
from tokjax.models.reducing import Reduction, Taps
from tokjax.reduction import types

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
FAMILIES = (
  "clip_tiny",
  "siglip_tiny",
  "dinov2_tiny",
  "dinov2_registers_tiny",
  "vit_tiny",
  "deit_tiny",
)


@functools.cache
def load_golden(name):
  stored = dict(np.load(GOLDEN / name / "hidden.npz"))
  return vit_weights.load(str(GOLDEN / name)), stored


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_stored_transformers_activations(name):
  model, want = load_golden(name)
  count = model.config.num_layers
  layers = tuple(range(count))
  taps = Taps(layers, layers, hidden=layers)
  got = encode(model, want["images"], taps=taps)
  for layer in layers:
    tap = got.taps[layer]
    np.testing.assert_allclose(tap.hidden, want["hidden"][layer + 1], atol=1e-5)
    logits = np.einsum("bhnd,bhmd->bhnm", tap.queries, tap.keys)
    scale = np.float32(tap.keys.shape[-1] ** -0.5)
    weights = run(jax.nn.softmax, logits * scale, axis=-1)
    np.testing.assert_allclose(weights, want["attention"][layer], atol=1e-5)
  np.testing.assert_allclose(output(model, got), want["output"], atol=2e-5)
  np.testing.assert_allclose(
    embed(model, want["images"]), want["output"], atol=2e-5
  )


@pytest.mark.parametrize("name", ["dinov2_tiny", "dinov2_registers_tiny"])
def test_other_shapes_interpolate_positions_as_transformers(name):
  model, want = load_golden(name)
  got = encode(model, want["wide_images"])
  np.testing.assert_allclose(got.tokens, want["wide_hidden"][-1], atol=1e-5)
  np.testing.assert_allclose(output(model, got), want["wide_output"], atol=2e-5)


# Parameters as published: the checkpoints' own counts.
@pytest.mark.parametrize(
  ("name", "count"),
  [
    ("clip_b32", 87_849_216),
    ("clip_l14", 303_966_208),
    ("dinov2_b14", 86_580_480 - 768),  # the mask token of training
    ("deit_s16", 22_050_664),
    ("deit_s16_distilled", 22_436_432),
    ("vit_b16", 86_567_656),
    ("siglip_so400m", 428_225_600),
  ],
)
def test_shapes_have_the_published_number_of_parameters(name, count):
  config = vit_shapes.shape(name)
  model = jax.eval_shape(lambda: vit.Vit(config, rngs=nnx.Rngs(0)))
  assert sum(math.prod(x.shape) for x in jax.tree.leaves(model)) == count


def test_unknown_shapes_are_named():
  with pytest.raises(ValueError, match="clip_b32.*got 'clip_b33'"):
    vit_shapes.shape("clip_b33")
  assert set(vit_shapes.SHAPES) > {"clip_l14_336", "siglip_b16"}


# --- the parts --------------------------------------------------------------


def test_forward_equals_the_loop():
  model, images = tiny(), photos()
  got = encode(model, images)
  for image, tokens in zip(images, np.asarray(got.tokens), strict=True):
    x = embed64(model, image)
    for layer in range(3):
      block = block_of(model, layer)
      x = mlp64(block, attention64(block, x)[0])
    np.testing.assert_allclose(tokens, x, atol=2e-5)
    logits = linear64(model.head, norm64(model.norm, x[0]))
    np.testing.assert_allclose(embed(model, image[None])[0], logits, atol=2e-5)
  assert np.all(got.mask) and np.all(np.asarray(got.size) == 1)
  np.testing.assert_array_equal(got.index, np.tile(np.arange(10), (2, 1)))


def test_attention_equals_a_loop():
  rng = np.random.default_rng(0)
  q = rng.normal(size=(2, 2, 3, 4))
  k, v = rng.normal(size=(2, 2, 2, 5, 4))
  bias = np.log(rng.integers(1, 5, (2, 5)))
  bias[1, 3] = np.finfo(np.float32).min
  got = np.asarray(run(vit_blocks.attend, *map(np.float32, (q, k, v, bias))))
  for b, h, i in np.ndindex(2, 2, 3):
    weight = np.exp(k[b, h] @ q[b, h, i] / 2 + bias[b])
    want = weight @ v[b, h] / weight.sum()
    np.testing.assert_allclose(got[b, h, i], want, rtol=1e-5, atol=1e-6)


def test_initial_weights_and_norms_are_those_of_the_config():
  made = jax.jit(
    lambda: vit_blocks.linear(CONFIG, 400, 300, nnx.Rngs(0), bias=False)
  )()
  assert made.bias is None
  assert abs(np.std(made.kernel[...]) / CONFIG.init_scale - 1) < 0.02
  low = np.arange(12.0).astype(jnp.bfloat16)
  got = jax.jit(lambda x: vit_blocks.norm(CONFIG, nnx.Rngs(0))(x))(low)
  assert got.dtype == jnp.float32 and abs(np.mean(got)) < 1e-6
  assert set(vit_blocks.ACTIVATIONS) == set(vit_shapes.ACTIVATIONS)
  x = np.float32([1.0, -2.0])
  quick = run(vit_blocks.ACTIVATIONS["quick_gelu"], x)
  np.testing.assert_allclose(quick, x / (1 + np.exp(-1.702 * x)), rtol=1e-6)


def test_patches_and_images_are_the_same_input():
  model, images = tiny(), photos()
  got = encode(model, cut(images)).tokens
  np.testing.assert_array_equal(got, encode(model, images).tokens)


def test_batch_equals_one_by_one():
  model, images = tiny(), photos(batch=3)
  want = np.asarray(embed(model, images))
  for i in range(3):
    np.testing.assert_allclose(
      embed(model, images[i : i + 1])[0], want[i], atol=1e-6
    )


@pytest.mark.parametrize("pool", vit_shapes.POOLS)
def test_masked_patches_have_no_influence(pool):
  model = tiny(pool=pool)
  patches = cut(photos())
  mask = np.arange(9) < np.array([[9], [4]])
  want = np.asarray(embed(model, patches, mask))
  poisoned = np.where(mask[..., None], patches, np.nan)
  np.testing.assert_array_equal(embed(model, poisoned, mask), want)
  # As if the patches were not there: the rows removed before the first block.
  keep = Reduction(
    lambda layer, x, keys, size, mask: types.selected(
      x, jnp.tile(jnp.arange(5), (2, 1))
    ),
    layers=(0,),
    place="before",
  )
  removed = np.asarray(embed(model, patches, reductions=(keep,)))
  np.testing.assert_allclose(removed[1], want[1], atol=1e-5)
  assert np.abs(removed[0] - want[0]).max() > 1e-2


def test_image_without_patches_is_finite():
  model, patches = tiny(pool="mean"), cut(photos())
  none = np.zeros((2, 9), bool)
  gradient = jax.jit(jax.grad(lambda m: jnp.sum(jnp.sin(m(patches, none)))))(
    model
  )
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_gradient_reaches_every_parameter():
  model = tiny(layer_scale=0.5, num_registers=2, pool="mean", norm_input=True)
  weight = np.float32(np.random.default_rng(1).normal(size=(2, 5)))
  gradient = jax.jit(
    jax.grad(lambda m: jnp.sum(jnp.sin(m(photos())) * weight))
  )(model)
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
    leaf = np.asarray(leaf)
    per_layer = leaf.reshape(3, -1) if "blocks" in str(path) else leaf[None]
    assert all(np.abs(x).max() > 0 for x in per_layer), path


def test_bfloat16_weights_compute_in_bfloat16_near_float32():
  low = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), tiny())
  high = jax.tree.map(lambda x: np.asarray(x, np.float32), low)
  got = embed(low, photos())
  assert got.dtype == jnp.bfloat16
  # 3 layers of rounding to 8 bits, on values of size 1.
  np.testing.assert_allclose(np.float32(got), embed(high, photos()), atol=0.1)


@pytest.mark.unchecked
@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"num_heads": 5}, "width must be a multiple of 5"),
    ({"patch_size": 13}, "patch_size must lie in 1..12"),
    ({"activation": "relu"}, "activation must be one of 'gelu'"),
    ({"pool": "max"}, "pool must be one of 'class', 'mean', 'attention'"),
    ({"class_token": False}, "without a class_token"),
    ({"distill_head": True}, "distill_head needs a distill_token"),
    (
      {"class_token": False, "distill_token": True, "pool": "mean"},
      "distill_token needs a class_token",
    ),
  ],
)
def test_config_errors_name_the_field(changes, message):
  with pytest.raises(ValueError, match=message):
    tiny(**changes)
  with pytest.raises(ValueError, match=message):
    vit_shapes.check(dataclasses.replace(CONFIG, **changes))


@pytest.mark.unchecked
@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda m: m(jnp.ones((2, 8, 27))), "patches=8, positions=9"),
    (lambda m: m(jnp.ones((2, 3))), "images must have 3 axes"),
    (lambda m: m(jnp.ones((2, 3, 3, 3))), "patch_size must lie in 1..3, got 4"),
    (
      lambda m: m(photos(), jnp.ones((2, 8), bool)),
      "mask must have the shape of the patches",
    ),
    (
      lambda m: m.encode(photos(), taps=Taps(hidden=(3,))),
      "tapped_layer must lie in -3..2, got 3",
    ),
    (
      lambda m: m(photos(), reductions=(Reduction(keep_all, (3,)),)),
      "reduction_layer must lie in 0..2, got 3",
    ),
    (
      lambda m: m(photos(), reductions=(Reduction(keep_all, (0,), "inside"),)),
      "place must be one of 'before', 'middle', 'after'",
    ),
    (
      lambda m: m(photos(), reductions=(Reduction(keep_all, (0,), frames=2),)),
      "place must be 'before'",
    ),
    (
      lambda m: m(
        photos(batch=3),
        reductions=(Reduction(keep_all, (0,), "before", frames=2),),
      ),
      "images must be a multiple of 2, got 3",
    ),
    (
      lambda m: m(
        photos(),
        reductions=(Reduction(keep_all, (0,), "before", queries=True),),
      ),
      "queries of a layer are not there before its block",
    ),
  ],
)
def test_errors_name_the_argument(call, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(call, tiny())


# --- taps ------------------------------------------------------------------


def test_taps_are_what_was_asked_for_and_change_nothing():
  model, images = tiny(), photos()
  plain = encode(model, images)
  assert plain.taps == {}
  got = encode(
    model, images, taps=Taps(queries=(-2,), keys=(-2, 0), hidden=(1, -1))
  )
  np.testing.assert_allclose(got.tokens, plain.tokens, atol=1e-5)
  assert set(got.taps) == {-2, -1, 0, 1}
  np.testing.assert_array_equal(got.taps[-1].hidden, got.tokens)
  assert got.taps[1].queries is None and got.taps[0].hidden is None
  assert got.taps[-2].queries.shape == (2, 3, 10, 4)
  x = embed64(model, images[0])
  x, keys = attention64(block_of(model, 0), x)
  np.testing.assert_allclose(got.taps[0].keys[0], keys, atol=1e-5)
  x = mlp64(block_of(model, 0), x)
  _, keys = attention64(block_of(model, 1), x)
  np.testing.assert_allclose(got.taps[-2].keys[0], keys, atol=1e-5)


def scans(jaxpr):
  return [e for e in jaxpr.eqns if e.primitive.name == "scan"]


def test_without_taps_one_scan_keeps_nothing_of_the_layers():
  model = tiny()
  trace = jax.make_jaxpr(lambda m, x: m.encode(x).tokens)(model, photos())
  (loop,) = scans(trace.jaxpr)
  assert loop.params["length"] == 3
  assert len(loop.outvars) == loop.params["num_carry"] == 1
  # A tap writes out its own layer and leaves the others in their scans.
  trace = jax.make_jaxpr(
    lambda m, x: m.encode(x, taps=Taps(keys=(1,))).taps[1].keys
  )(model, photos())
  assert [e.params["length"] for e in scans(trace.jaxpr)] == [1, 1]
  assert all(len(e.outvars) == 1 for e in scans(trace.jaxpr))


def flops(function, *args):
  compiled = jax.jit(function).lower(*args).compile()
  return compiled.cost_analysis()["flops"]


def test_what_is_not_returned_is_not_computed():
  model = tiny(num_layers=2)
  layers = Taps((0, 1), (0, 1), (0, 1))
  whole = flops(lambda m, x: m.encode(x, taps=layers).tokens, model, photos())
  # Layers written out but nothing of them returned: no other product, the
  # smallest of which is 4% of the whole. A sum may be made twice.
  twice = flops(lambda m, x: m.encode(x, taps=layers), model, photos())
  assert abs(twice / whole - 1) < 0.03
  # The output of layer 0 alone leaves layer 1 out.
  half = flops(
    lambda m, x: m.encode(x, taps=layers).taps[0].hidden, model, photos()
  )
  assert half < 0.6 * whole


def test_flops_are_those_of_the_docstring():
  model = tiny(num_layers=1, width=48, mlp_width=96, image_size=32, pool="mean")
  config, patches = model.config, 64
  rows, width = patches + 1, config.width
  want = 2 * patches * 48 * width
  want += 8 * rows * width**2 + 4 * rows**2 * width
  want += 4 * rows * width * config.mlp_width
  got = flops(lambda m, x: m.encode(x).tokens, model, photos(batch=1, side=32))
  assert want < got < 1.25 * want  # norms, softmax, GELU on top


# --- reductions inside ----------------------------------------------------

"""One ViT for every family: against stored activations and a plain loop."""

import dataclasses
import math
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokjax.models import vit, vit_blocks, vit_shapes, vit_weights
from tokjax.models.reducing import Reduction, Taps
from tokjax.ops import plans
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
CONFIG = vit.VitConfig(
  image_size=12,
  patch_size=4,
  width=12,
  num_layers=3,
  num_heads=3,
  mlp_width=20,
  num_outputs=5,
  init_scale=0.3,
)
hook = pytest.mark.skipif(
  "TOKJAX_TYPECHECK" in os.environ, reason="the type checker speaks first"
)


def tiny(**changes):
  config = dataclasses.replace(CONFIG, **changes)
  return vit.Vit(config, rngs=nnx.Rngs(0))


def encode(model, x, mask=None, **settings):
  """`model.encode`, compiled as a whole: much faster than op by op."""
  return jax.jit(lambda m, x, mask: m.encode(x, mask, **settings))(
    model, x, mask
  )


def embed(model, x, mask=None, **settings):
  return jax.jit(lambda m, x, mask: m(x, mask, **settings))(model, x, mask)


def photos(seed=0, batch=2, side=12):
  return jax.random.normal(jax.random.key(seed), (batch, side, side, 3))


# --- the same in float64 loops, one image at a time -------------------------


def norm64(module, x):
  x = np.asarray(x, np.float64)
  x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.norm_epsilon)
  return x * np.asarray(module.scale[...]) + np.asarray(module.bias[...])


def linear64(module, x):
  kernel = np.asarray(module.kernel[...], np.float64)
  return x @ kernel + np.asarray(module.bias[...], np.float64)


def block_of(model, layer):
  return jax.tree.map(lambda x: x[layer], model.blocks)


def attention64(block, x, size=None):
  """x after attention, and the keys of each head, [H, N, d]."""
  heads = block.config.num_heads
  qkv = linear64(block.qkv, norm64(block.norm_attention, x))
  q, k, v = qkv.reshape(len(x), 3, heads, -1).transpose(1, 2, 0, 3)
  mixed = np.zeros((len(x), heads, q.shape[-1]))
  for h, i in np.ndindex(heads, len(x)):
    logits = k[h] @ q[h, i] / math.sqrt(q.shape[-1])
    if size is not None:
      logits = logits + np.log(size)
    weight = np.exp(logits - logits.max())
    mixed[i, h] = weight @ v[h] / weight.sum()
  return x + linear64(block.out, mixed.reshape(len(x), -1)), k


def mlp64(block, x):
  hidden = linear64(block.up, norm64(block.norm_mlp, x))
  erf = np.vectorize(math.erf)
  hidden = hidden * 0.5 * (1 + erf(hidden / math.sqrt(2)))
  return x + linear64(block.down, hidden)


def embed64(model, image):
  """Rows before the first block."""
  side, patch = image.shape[0], CONFIG.patch_size
  rows = [
    image[i : i + patch, j : j + patch].reshape(-1)
    for i in range(0, side, patch)
    for j in range(0, side, patch)
  ]
  cells = linear64(model.patches, np.asarray(rows, np.float64))
  first = np.asarray(model.class_token[...], np.float64)[None]
  return np.concatenate([first, cells]) + np.asarray(model.positions[...])


# --- published families -----------------------------------------------------


def load_golden(name):
  stored = dict(np.load(GOLDEN / name / "hidden.npz"))
  return vit_weights.load(str(GOLDEN / name)), stored


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_stored_transformers_activations(name):
  model, want = load_golden(name)
  count = model.config.num_layers
  layers = tuple(range(count))
  got = jax.jit(
    lambda m, x: m.encode(x, taps=Taps(layers, layers, hidden=layers))
  )(model, want["images"])
  for layer in layers:
    tap = got.taps[layer]
    np.testing.assert_allclose(tap.hidden, want["hidden"][layer + 1], atol=1e-5)
    logits = np.einsum("bhnd,bhmd->bhnm", tap.queries, tap.keys)
    weights = jax.nn.softmax(logits * tap.keys.shape[-1] ** -0.5, axis=-1)
    np.testing.assert_allclose(weights, want["attention"][layer], atol=1e-5)
  np.testing.assert_allclose(model.embed(got), want["output"], atol=2e-5)
  np.testing.assert_allclose(
    embed(model, jnp.asarray(want["images"])), want["output"], atol=2e-5
  )


@pytest.mark.parametrize("name", ["dinov2_tiny", "dinov2_registers_tiny"])
def test_other_shapes_interpolate_positions_as_transformers(name):
  model, want = load_golden(name)
  got = encode(model, jnp.asarray(want["wide_images"]))
  np.testing.assert_allclose(got.tokens, want["wide_hidden"][-1], atol=1e-5)
  np.testing.assert_allclose(model.embed(got), want["wide_output"], atol=2e-5)


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
  for image, tokens in zip(np.asarray(images), got.tokens, strict=True):
    x = embed64(model, image)
    for layer in range(3):
      block = block_of(model, layer)
      x = mlp64(block, attention64(block, x)[0])
    np.testing.assert_allclose(tokens, x, atol=2e-5)
    logits = linear64(model.head, norm64(model.norm, x[0]))
    np.testing.assert_allclose(
      embed(model, jnp.asarray(image)[None])[0], logits, atol=2e-5
    )
  assert got.mask.all() and (got.size == 1).all()
  np.testing.assert_array_equal(got.index, np.tile(np.arange(10), (2, 1)))


def test_attention_equals_a_loop():
  rng = np.random.default_rng(0)
  q = rng.normal(size=(2, 2, 3, 4))
  k, v = rng.normal(size=(2, 2, 2, 5, 4))
  bias = np.log(rng.integers(1, 5, (2, 5)))
  bias[1, 3] = np.finfo(np.float32).min
  got = vit_blocks.attend(*map(jnp.float32, (q, k, v, bias)))
  for b, h, i in np.ndindex(2, 2, 3):
    weight = np.exp(k[b, h] @ q[b, h, i] / 2 + bias[b])
    want = weight @ v[b, h] / weight.sum()
    np.testing.assert_allclose(got[b, h, i], want, rtol=1e-5, atol=1e-6)


def test_initial_weights_and_norms_are_those_of_the_config():
  made = vit_blocks.linear(CONFIG, 400, 300, nnx.Rngs(0), bias=False)
  assert made.bias is None
  assert abs(float(jnp.std(made.kernel[...])) / CONFIG.init_scale - 1) < 0.02
  low = jnp.arange(12.0).astype(jnp.bfloat16)
  got = vit_blocks.norm(CONFIG, nnx.Rngs(0))(low)
  assert got.dtype == jnp.float32 and abs(float(jnp.mean(got))) < 1e-6
  assert set(vit_blocks.ACTIVATIONS) == set(vit_shapes.ACTIVATIONS)
  x = jnp.array([1.0, -2.0])
  quick = vit_blocks.ACTIVATIONS["quick_gelu"](x)
  np.testing.assert_allclose(quick, x / (1 + np.exp(-1.702 * x)), rtol=1e-6)


@pytest.mark.parametrize("shape", [(4, 6), (5, 7)])
def test_patches_are_cut_row_by_row_and_the_remainder_left(shape):
  images = np.random.default_rng(0).normal(size=(2, *shape, 3))
  got = vit.patchify(jnp.float32(images), 2)
  assert got.shape == (2, 6, 12)
  for b, i, j in np.ndindex(2, 2, 3):
    patch = images[b, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].reshape(-1)
    np.testing.assert_allclose(got[b, 3 * i + j], patch, rtol=1e-6)


def test_patches_and_images_are_the_same_input():
  model, images = tiny(), photos()
  got = encode(model, vit.patchify(images, 4)).tokens
  np.testing.assert_array_equal(got, encode(model, images).tokens)


def test_batch_equals_one_by_one():
  model, images = tiny(), photos(batch=3)
  want = embed(model, images)
  for i in range(3):
    np.testing.assert_allclose(
      embed(model, images[i : i + 1])[0], want[i], atol=1e-6
    )


@pytest.mark.parametrize("pool", vit_shapes.POOLS)
def test_masked_patches_have_no_influence(pool):
  model = tiny(pool=pool)
  patches = vit.patchify(photos(), 4)
  mask = jnp.arange(9)[None] < jnp.array([[9], [4]])
  want = embed(model, patches, mask)
  poisoned = jnp.where(mask[..., None], patches, jnp.nan)
  np.testing.assert_array_equal(embed(model, poisoned, mask), want)
  # As if the patches were not there: the rows removed before the first block.
  keep = Reduction(
    lambda layer, x, keys, size, mask: types.selected(
      x, jnp.tile(jnp.arange(5), (2, 1))
    ),
    layers=(0,),
    place="before",
  )
  removed = embed(model, patches, reductions=(keep,))
  np.testing.assert_allclose(removed[1], want[1], atol=1e-5)
  assert np.abs(removed[0] - want[0]).max() > 1e-2


def test_image_without_patches_is_finite():
  model, patches = tiny(pool="mean"), vit.patchify(photos(), 4)
  none = jnp.zeros((2, 9), bool)
  gradient = jax.jit(jax.grad(lambda m: jnp.sum(jnp.sin(m(patches, none)))))(
    model
  )
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_gradient_reaches_every_parameter():
  model = tiny(layer_scale=0.5, num_registers=2, pool="mean", norm_input=True)
  weight = jax.random.normal(jax.random.key(1), (2, 5))
  gradient = jax.jit(
    jax.grad(lambda m: jnp.sum(jnp.sin(m(photos())) * weight))
  )(model)
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
    leaf = np.asarray(leaf)
    per_layer = leaf.reshape(3, -1) if "blocks" in str(path) else leaf[None]
    assert all(np.abs(x).max() > 0 for x in per_layer), path


def test_bfloat16_weights_compute_in_bfloat16_near_float32():
  model = tiny()
  low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
  high = jax.tree.map(lambda x: x.astype(jnp.float32), low)
  got = low(photos())
  assert got.dtype == jnp.bfloat16
  # 3 layers of rounding to 8 bits, on values of size 1.
  np.testing.assert_allclose(np.float32(got), high(photos()), atol=0.1)


@hook
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


def keep_all(layer, x, keys, size, mask):
  return types.selected(x, jnp.tile(jnp.arange(x.shape[1]), (len(x), 1)), mask)


@hook
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
    call(tiny())


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
  x = embed64(model, np.asarray(images[0]))
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


def by_norm(num_keep):
  """Keeps the class token and the largest others, by what is given."""

  def method(layer, x, keys, size, mask):
    assert (keys is None) == (layer == 0)
    score = jnp.sum(jnp.square(x if keys is None else keys.mean(1)), -1)
    score = jnp.where(mask, score, -jnp.inf).at[:, 0].set(jnp.inf)
    picks = jax.lax.top_k(score, num_keep[layer])[1]
    return types.selected(x, picks, jnp.take_along_axis(mask, picks, 1))

  return method


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("pool", vit_shapes.POOLS)
def test_removed_rows_equal_masked_rows(pool, padded):
  """Before block 0, in the middle of block 1, after block 2."""
  model, patches = tiny(num_layers=4, pool=pool), vit.patchify(photos(2), 4)
  mask = jnp.arange(9)[None] < jnp.array([[9], [5 if padded else 9]])
  method = by_norm({0: 8, 1: 6, 2: 4})
  forms = {}
  for form in ("remove", "mask"):
    reductions = tuple(
      Reduction(method, (layer,), place, form)
      for layer, place in enumerate(("before", "middle", "after"))
    )
    encoded = encode(
      model,
      patches,
      mask,
      taps=Taps(reduced=(0, 1, 2), keys=(2,)),
      reductions=reductions,
    )
    forms[form] = encoded, model.embed(encoded)
  (removed, small), (masked, large) = forms["remove"], forms["mask"]
  assert removed.tokens.shape[1] == 4 and masked.tokens.shape[1] == 10
  assert removed.taps[2].keys.shape[2] == 6
  np.testing.assert_allclose(small, large, atol=1e-5)
  for b in range(2):
    kept = np.asarray(removed.index[b])[np.asarray(removed.mask[b])]
    np.testing.assert_array_equal(kept, np.flatnonzero(masked.mask[b]))
    np.testing.assert_allclose(
      removed.tokens[b, : len(kept)], masked.tokens[b, kept], atol=1e-5
    )
  np.testing.assert_array_equal(removed.size, removed.mask)


def test_keeping_all_is_no_reduction():
  model, images = tiny(), photos()
  want = encode(model, images)
  for place in ("before", "middle", "after"):
    got = encode(
      model, images, reductions=(Reduction(keep_all, (0, 1, 2), place),)
    )
    np.testing.assert_allclose(got.tokens, want.tokens, atol=1e-5)
    np.testing.assert_array_equal(got.index, want.index)


def merge_similar(num_merged):
  """Even rows but the first go to their most similar odd row, as in ToMe."""

  def one(x, keys, size):
    metric = keys.mean(0)
    metric = metric / jnp.linalg.norm(metric, axis=-1, keepdims=True)
    similar = metric[::2] @ metric[1::2].T
    similar = similar.at[0].set(-jnp.inf)
    best = jnp.argmax(similar, axis=1)
    order = jnp.argsort(-jnp.max(similar, axis=1))
    gone, stay = order[:num_merged], jnp.sort(order[num_merged:])
    slot = jnp.zeros(len(x), jnp.int32)
    slot = slot.at[2 * stay].set(jnp.arange(len(stay)))
    slot = slot.at[1::2].set(len(stay) + jnp.arange(len(x) // 2))
    slot = slot.at[2 * gone].set(len(stay) + best[gone])
    total = jnp.zeros(len(x) - num_merged).at[slot].add(size)
    index = jnp.concatenate([2 * stay, 1 + 2 * jnp.arange(len(x) // 2)])
    return plans.Merge(slot, size / total[slot]), index

  def method(layer, x, keys, size, mask):
    plan, index = jax.vmap(one)(x, keys, size)
    return types.fused(x, plan, index, size=size)

  return method


def merge64(x, keys, size, index, num_merged):
  metric = keys.mean(0)
  metric = metric / np.linalg.norm(metric, axis=1, keepdims=True)
  even, odd = list(range(2, len(x), 2)), list(range(1, len(x), 2))
  best = {i: max(odd, key=lambda j: metric[i] @ metric[j]) for i in even}  # noqa: B023
  order = sorted(even, key=lambda i: -(metric[i] @ metric[best[i]]))
  gone = order[:num_merged]
  rows, sizes, places = [], [], []
  for j in [0, *sorted(order[num_merged:]), *odd]:
    group = [j, *(i for i in gone if best[i] == j)]
    sizes.append(sum(size[i] for i in group))
    rows.append(sum(size[i] * x[i] for i in group) / sizes[-1])
    places.append(index[j])
  return np.array(rows), np.array(sizes), np.array(places)


@pytest.mark.parametrize("proportional", [True, False])
def test_merging_between_attention_and_mlp_equals_the_loop(proportional):
  model, images = tiny(), photos(3, batch=3)
  reduction = Reduction(merge_similar(2), layers=(0, 1, 2))
  got = jax.jit(
    lambda m, x: m.encode(x, reductions=(reduction,), proportional=proportional)
  )(model, images)
  assert got.tokens.shape == (3, 4, 12)
  for b, image in enumerate(np.asarray(images)):
    x = embed64(model, image)
    size, index = np.ones(len(x)), np.arange(len(x))
    for layer in range(3):
      block = block_of(model, layer)
      x, keys = attention64(block, x, size if proportional else None)
      x, size, index = merge64(x, keys, size, index, 2)
      x = mlp64(block, x)
    np.testing.assert_array_equal(got.size[b], size)
    np.testing.assert_array_equal(got.index[b], index)
    np.testing.assert_allclose(got.tokens[b], x, atol=3e-5)
  assert (got.size.sum(1) == 10).all()


@pytest.mark.parametrize("pool", vit_shapes.POOLS)
def test_merged_duplicates_weigh_what_they_did_apart(pool):
  """Equal patches without positions, fused before the first block."""
  model = tiny(pool=pool)
  model.positions[...] = jnp.zeros_like(model.positions[...])
  patches = vit.patchify(photos(4), 4)
  patches = patches.at[:, 3].set(patches[:, 1]).at[:, 7].set(patches[:, 1])
  slot = jnp.array([0, 1, 2, 3, 2, 4, 5, 6, 2, 7])
  weight = jnp.where(slot == 2, 1 / 3, 1.0)
  index = jnp.array([0, 1, 2, 3, 5, 6, 7, 9])

  def method(layer, x, keys, size, mask):
    plan = plans.Merge(jnp.tile(slot, (2, 1)), jnp.tile(weight, (2, 1)))
    return types.fused(x, plan, jnp.tile(index, (2, 1)), size=size)

  once = Reduction(method, (0,), "before")
  want = embed(model, patches)
  got = embed(model, patches, reductions=(once,))
  np.testing.assert_allclose(got, want, atol=1e-5)
  plain = embed(model, patches, reductions=(once,), proportional=False)
  assert np.abs(plain - want).max() > 1e-2


def test_many_to_many_after_a_block_and_back():
  """A dense transform by attention, as Token Transforming needs."""
  model, images = tiny(), photos(5)

  def method(layer, x, keys, size, mask, queries):
    logits = jnp.einsum("bhnd,bhmd->bhnm", queries, keys)
    received = jax.nn.softmax(logits / 2, axis=-1).mean((1, 2))
    received = received.at[:, 0].set(jnp.inf)
    anchors = jnp.sort(jax.lax.top_k(received, 4)[1], axis=1)
    feature = jnp.take_along_axis(x, anchors[..., None], 1)
    similar = jnp.exp(jnp.einsum("bkd,bnd->bkn", feature, x) / 50)
    share = similar / similar.sum(1, keepdims=True)
    weight = similar * size[:, None]
    weight = weight / weight.sum(2, keepdims=True)
    return types.fused(x, plans.Transform(weight, share), anchors, size=size)

  reduction = Reduction(method, (1,), "after", queries=True)
  got = encode(
    model, images, taps=Taps(hidden=(1,), reduced=(1,)), reductions=(reduction,)
  )
  assert got.tokens.shape == (2, 4, 12) and got.taps[1].hidden.shape[1] == 4
  np.testing.assert_allclose(got.size.sum(1), 10, rtol=1e-5)
  assert (got.index[:, 0] == 0).all()
  before = encode(model, images, taps=Taps(hidden=(1,))).taps[1].hidden
  reduced = got.taps[1].reduced
  np.testing.assert_allclose(
    got.taps[1].hidden, reduced.plan.weight @ before, atol=1e-4
  )
  block, size = block_of(model, 2), np.asarray(got.size)
  for b in range(2):
    x = np.asarray(got.taps[1].hidden[b], np.float64)
    want = mlp64(block, attention64(block, x, size[b])[0])
    np.testing.assert_allclose(got.tokens[b], want, atol=2e-5)
  assert reduced.restore(got.tokens, 10).shape == (2, 10, 12)


def test_frames_are_joined_before_a_block():
  """Two frames become one, their class tokens averaged, as CenterCLIP."""
  model, images = tiny(), photos(6, batch=6)
  picks = jnp.array([1, 4, 12, 17])  # rows 1 and 4 of frame 0, 2 and 7 of 1

  def method(layer, x, keys, size, mask):
    assert x.shape == (3, 20, 12) and mask.shape == (3, 20)
    slot = jnp.full(20, 5).at[jnp.array([0, 10])].set(0)
    slot = slot.at[picks].set(jnp.arange(1, 5))
    weight = jnp.where(slot == 0, 0.5, 1.0)
    plan = plans.Merge(jnp.tile(slot, (3, 1)), jnp.tile(weight, (3, 1)))
    index = jnp.concatenate([jnp.zeros(1, jnp.int32), picks])
    return types.fused(x, plan, jnp.tile(index, (3, 1)), size=size)

  reduction = Reduction(method, (2,), "before", frames=2)
  got = encode(model, images, reductions=(reduction,), proportional=False)
  assert got.tokens.shape == (3, 5, 12)
  np.testing.assert_array_equal(got.index[0], [0, 1, 4, 12, 17])
  np.testing.assert_array_equal(got.size[0], [2, 1, 1, 1, 1])
  lower = encode(model, images, taps=Taps(hidden=(1,))).taps[1].hidden
  lower = np.asarray(lower, np.float64).reshape(3, 20, 12)
  for b in range(3):
    first = (lower[b, 0] + lower[b, 10]) / 2
    x = np.concatenate([first[None], lower[b][np.asarray(picks)]])
    block = block_of(model, 2)
    want = mlp64(block, attention64(block, x)[0])
    np.testing.assert_allclose(got.tokens[b], want, atol=2e-5)
  assert model.embed(got).shape == (3, 5)


def test_fusing_has_no_masked_form():
  with pytest.raises(ValueError, match="got 'mask' at layer 1"):
    reduction = Reduction(merge_similar(1), (1,), form="mask")
    tiny()(photos(), reductions=(reduction,))


def test_gradient_flows_through_kept_rows_only():
  model, images = tiny(num_layers=1), photos(batch=1)

  def first_three(layer, x, keys, size, mask):
    return types.selected(x, jnp.array([[0, 1, 2]]))

  reduction = Reduction(first_three, (0,), "before")
  gradient = jax.jit(
    jax.grad(lambda x: jnp.sum(jnp.sin(model(x, reductions=(reduction,)))))
  )(vit.patchify(images, 4))
  assert (np.abs(gradient[0, :2]).max(1) > 0).all()
  assert (gradient[0, 2:] == 0).all()

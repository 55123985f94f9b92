"""VAT: points to tokens of several scales to occupancy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

from tests.compiled import run
from tokjax.data import solids
from tokjax.tokenizers import gaussian, vat
from tokjax.tokenizers.codebook import CodebookConfig
from tokjax.tokenizers.multi_scale_quantizer import MultiScaleConfig
from tokjax.tokenizers.transformer import TransformerConfig

WIDTH, POINTS, QUERIES, VOLUME = 16, 6, 9, 5


def config(learning="ema", **settings):
  stack = functools.partial(
    TransformerConfig, WIDTH, num_layers=1, num_heads=2, init_scale=0.2
  )
  quantizer = MultiScaleConfig(
    CodebookConfig(8, 4, learning=learning),
    (1, 2, 3),
    layout="row",
    num_convolutions=0,
    code_deviation=1.0,
  )
  tiny = vat.VATConfig(
    quantizer,
    encoder=stack(),
    decoder=stack(),
    planes=stack(context_dim=WIDTH),
    num_frequencies=3,
    plane_tokens=2,
    plane_shuffle=2,
    plane_dim=4,
    head_width=8,
    num_volume=VOLUME,
  )
  return dataclasses.replace(tiny, **settings)


@functools.cache
def made(tiny):
  @jax.jit
  def build():
    model = tiny.build(nnx.Rngs(0))
    return model, model.init_state(jax.random.key(1))

  return build()


def shapes(batch=2, seed=0):
  """Points with normals, queries, and whether these are inside."""
  random = np.random.default_rng(seed)
  points = random.uniform(-1, 1, (batch, POINTS, 6)).astype(np.float32)
  queries = random.uniform(-1, 1, (batch, QUERIES, 3)).astype(np.float32)
  return points, queries, np.linalg.norm(queries, axis=-1) < 0.9


@functools.partial(jax.jit, static_argnames="train")
def call(model, points, queries, occupancy, state, key=None, train=False,
         point_mask=None):  # fmt: skip
  return model(
    points, queries, occupancy, state, key=key, train=train,
    point_mask=point_mask,
  )  # fmt: skip


def test_order_of_points_does_not_matter():
  model, _ = made(config())
  points, _, _ = shapes()
  mixed = points[:, np.random.default_rng(1).permutation(POINTS)]
  one, two = (run(model.posterior, x) for x in (points, mixed))
  np.testing.assert_allclose(one.mean, two.mean, atol=1e-5)
  np.testing.assert_allclose(one.log_variance, two.log_variance, atol=1e-5)
  moved = run(model.posterior, points[::-1])
  assert not np.allclose(one.mean, moved.mean, atol=1e-2)


def test_masked_points_change_nothing():
  model, _ = made(config())
  points, _, _ = shapes()
  mask = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0]], bool)
  points[~mask] = np.nan
  got = run(model.posterior, points, mask)
  want = run(model.posterior, points[:, :4])
  np.testing.assert_allclose(got.mean, want.mean, atol=1e-5)


def test_losses_and_logits_of_evaluation():
  model, state = made(config())
  points, queries, occupancy = shapes()
  found, after = call(model, points, queries, occupancy, state)
  jax.tree.map(np.testing.assert_array_equal, after, state)
  # The pieces by themselves, means quantised.
  latent = run(model.posterior, points)
  tokens = run(model.encode, points, state)
  quantized, _ = run(model.quantizer, latent.mean, state)
  np.testing.assert_array_equal(tokens.indices, quantized.indices)
  planes = run(model.decode, tokens.indices, state)
  assert planes.shape == (2, 3, 4, 4, 4)
  logits = run(model.query, planes, queries)
  np.testing.assert_allclose(found.output, logits, atol=1e-5)
  blocks = run(model.query, planes, queries, block_size=2)
  np.testing.assert_allclose(blocks, logits, atol=1e-5)

  p = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
  error = -np.where(occupancy, np.log(p), np.log(1 - p))
  kl = run(gaussian.kl_divergence, latent)
  want = {
    "volume": error[:, :VOLUME].mean(),
    "near": 0.1 * error[:, VOLUME:].mean(),
    "kl": 1e-3 * float(kl),
    "commitment": float(quantized.losses["commitment"]),
  }
  assert found.losses.keys() == want.keys()
  for name, value in want.items():
    assert float(found.losses[name]) == pytest.approx(value, rel=1e-4), name
  sure, right = logits[:, :VOLUME] > 0, occupancy[:, :VOLUME]
  iou = (sure & right).sum() / max(1, (sure | right).sum())
  assert float(found.stats["iou"]) == pytest.approx(iou)


def test_fewer_scales_are_the_first_tokens():
  model, state = made(config())
  indices = run(model.encode, shapes()[0], state).indices
  assert indices.shape == (2, 6)
  coarse = run(model.decode, indices, state, num_scales=2)
  other = indices.at[:, 3:].set((indices[:, 3:] + 1) % 8)
  np.testing.assert_array_equal(
    coarse, run(model.decode, other, state, num_scales=2)
  )
  assert not np.allclose(coarse, run(model.decode, indices, state), atol=1e-3)


def test_training_quantises_samples_and_evaluation_means():
  noisy = dataclasses.replace(config(), first_deviation=1.0)
  model, state = made(noisy)
  inputs = shapes()
  one, two = (
    call(model, *inputs, state, jax.random.key(seed), train=True)
    for seed in (0, 1)
  )
  assert not np.allclose(one[0].output, two[0].output, atol=1e-3)
  assert not np.allclose(one[1].counts, state.counts)
  # With next to no variance a sample is the mean.
  sure, _ = made(noisy)
  bias = jnp.concatenate([jnp.zeros(4), jnp.full(4, -30.0)])
  sure = nnx.clone(sure)
  sure.to_gaussian.kernel = nnx.Param(
    sure.to_gaussian.kernel[...].at[:, 4:].set(0)
  )
  sure.to_gaussian.bias = nnx.Param(bias)
  drawn, _ = call(sure, *inputs, state, jax.random.key(0), train=True)
  plain, _ = call(sure, *inputs, state)
  np.testing.assert_allclose(drawn.output, plain.output, atol=1e-4)


@pytest.mark.parametrize("learning", ["gradient", "ema"])
def test_every_parameter_learns(learning):
  model, state = made(config(learning))
  inputs = shapes()

  @jax.jit
  def gradient(model):
    def loss(model):
      found, _ = model(*inputs, state, train=True, key=jax.random.key(0))
      return sum(found.losses.values())

    return jax.grad(loss)(model)

  for path, x in jax.tree_util.tree_leaves_with_path(gradient(model)):
    name = jax.tree_util.keystr(path)
    assert np.all(np.isfinite(x)) and np.any(x), name


def test_without_quantisation_latents_go_through():
  model, state = made(config(quantize=False))
  points, queries, occupancy = shapes()
  found, after = call(model, points, queries, occupancy, state)
  planes = run(model.to_planes, run(model.posterior, points).mean)
  np.testing.assert_allclose(
    found.output, run(model.query, planes, queries), atol=1e-5
  )
  assert found.losses.keys() == {"volume", "near", "kl"}
  # The same parameters: training goes on with quantisation.
  assert jax.tree.structure(nnx.state(model)) == jax.tree.structure(
    nnx.state(made(config())[0])
  )


def test_over_eight_devices_equals_one_but_for_the_noise():
  model, state = made(config("gradient"))
  inputs = shapes(8)
  want, _ = call(model, *inputs, state)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  spec = jax.P("data")

  def local(points, queries, occupancy):
    found, _ = model(points, queries, occupancy, state, axis_name="data")
    return found.output, (found.losses, found.stats)

  got = jax.jit(
    jax.shard_map(
      local, mesh=mesh, in_specs=(spec,) * 3, out_specs=(spec, jax.P())
    )
  )(*jax.device_put(inputs, jax.NamedSharding(mesh, spec)))
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  jax.tree.map(close, got, (want.output, (want.losses, want.stats)))


def test_learns_a_few_solids():
  random = np.random.default_rng(0)
  few = [solids.random_solid(random, num_parts=1) for _ in range(4)]
  tiny = config(plane_dim=8, head_width=16, num_volume=64, plane_tokens=4)
  model, state = made(tiny)
  points = np.stack(
    [np.concatenate(solids.sample_surface(x, 32, random), 1) for x in few]
  )
  queries = random.uniform(-1, 1, (4, 64, 3)).astype(np.float32)
  occupancy = np.stack(
    [
      solids.signed_distance(x, q) < 0.1
      for x, q in zip(few, queries, strict=True)
    ]
  )
  optimizer = optax.adam(1e-2)

  @jax.jit
  def trained(model, state):
    def loss(model, state, key):
      found, state = model(
        points, queries, occupancy, state, train=True, key=key
      )
      return sum(found.losses.values()), (found.losses["volume"], state)

    def step(carry, key):
      model, state, moments = carry
      gradient, (volume, state) = jax.grad(loss, has_aux=True)(
        model, state, key
      )
      updates, moments = optimizer.update(gradient, moments, model)
      return (optax.apply_updates(model, updates), state, moments), volume

    keys = jax.random.split(jax.random.key(0), 150)
    return jax.lax.scan(step, (model, state, optimizer.init(model)), keys)[1]

  volume = trained(model, state)
  share = occupancy.mean()
  guess = -share * np.log(share) - (1 - share) * np.log(1 - share)
  assert volume[-10:].mean() < 0.6 * guess


def test_bytes_and_published_rates():
  assert vat.bytes_per_shape(vat.CONFIGS["vat-512b"]) == 512
  assert vat.bytes_per_shape(vat.CONFIGS["vat-4kb"]) == 2047 * 2
  assert vat.bytes_per_shape(config(), num_scales=2) == 9 / 8
  shape = jax.eval_shape(
    lambda: vat.CONFIGS["vat-512b"].build(nnx.Rngs(0))
  ).places.shape
  assert shape == (128, 768)


@pytest.mark.unchecked
def test_errors():
  model, state = made(config())
  points, queries, occupancy = shapes()
  with pytest.raises(ValueError, match="key must be given to train"):
    model(points, queries, occupancy, state, train=True)
  with pytest.raises(ValueError, match="queries=9, occupancy=8"):
    model(points, queries, occupancy[:, :-1], state)
  with pytest.raises(ValueError, match="num_volume must lie in 1..4, got 5"):
    model(points, queries[:, :4], occupancy[:, :4], state)
  with pytest.raises(ValueError, match="width_of_points=3, xyz_and_normal=6"):
    model.posterior(points[..., :3])
  with pytest.raises(ValueError, match="layout_of_quantizer must be one of"):
    config(quantizer=MultiScaleConfig(CodebookConfig(8, 4))).build(nnx.Rngs(0))
  with pytest.raises(ValueError, match="planes_context_dim=0"):
    config(planes=config().encoder).build(nnx.Rngs(0))
  with pytest.raises(ValueError, match="normals must be one of"):
    config(normals="none").build(nnx.Rngs(0))

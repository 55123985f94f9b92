"""TokenFlow: its two branches, their losses, other resolutions, its sizes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.compiled import run
from tokjax.ops import resample
from tokjax.tokenizers import token_flow
from tokjax.tokenizers.codebook import CodebookConfig
from tokjax.tokenizers.conv import ConvConfig
from tokjax.tokenizers.dual_quantizer import DualConfig
from tokjax.tokenizers.token_flow import TokenFlowConfig
from tokjax.tokenizers.transformer import TransformerConfig

CONV = ConvConfig(
  width=4, multipliers=(1,), num_res_blocks=1, z_dim=3, groups=2,
  attention=False, flavour="maskgit",
)  # fmt: skip
BOOKS = (
  CodebookConfig(7, 4, metric="cosine"),
  CodebookConfig(7, 2, metric="cosine"),
)
# Images of 6 pixels a side, which the grid of 4 has resized and sized back.
TINY = TokenFlowConfig(
  image_size=6,
  features_dim=5,
  target_dim=3,
  quantizer=DualConfig(*BOOKS, sides=(1, 2, 4), scale_drop=0.0),
  encoder=CONV,
  decoder=CONV,
  semantic_decoder=TransformerConfig(8, 1, 2),
  pixel_weight=2.0,
  semantic_weight=3.0,
)


@functools.cache
def build(config=TINY):
  model = jax.jit(lambda: config.build(nnx.Rngs(0)))()
  return model, jax.jit(model.init_state)(jax.random.key(1))


def inputs(seed=0, batch=2):
  random = np.random.default_rng(seed)
  shapes = (batch, 6, 6, 3), (batch, 16, 5), (batch, 16, 3)
  return [random.normal(size=shape).astype(np.float32) for shape in shapes]


@jax.jit
def gradients(model, images, features, target):
  """Of each loss to the module, images, features and target."""
  state = build()[1]

  def value(name, *arrays):
    model, images, features, target = arrays
    found, _ = model(images, features, state, target=target, train=True)
    return found.losses[name], found

  return {
    name: jax.value_and_grad(
      functools.partial(value, name), (0, 1, 2, 3), has_aux=True
    )(model, images, features, target)
    for name in ("pixels", "semantic")
  }


def largest(tree):
  return max(float(np.abs(x).max()) for x in jax.tree.leaves(tree))


def test_losses_are_of_what_the_decoders_make_and_each_teaches_its_branch():
  (model, state), (images, features, target) = build(), inputs()
  got = gradients(model, images, features, target)
  found = run(model.encode, images, features, state)
  output, restored = run(model.decode, found.codes)
  for (loss, made), _ in got.values():
    np.testing.assert_allclose(made.output, output, atol=1e-5)
    assert made.losses.keys() == {
      "pixels", "semantic", "commitment", "codebook",
    }  # fmt: skip
    assert float(loss) > 0
  assert float(got["pixels"][0][0]) == pytest.approx(
    2 * ((images - np.float64(output)) ** 2).mean(), rel=1e-5
  )
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
  cosine = (unit(np.float64(restored)) * unit(target)).sum(-1).mean()
  assert float(got["semantic"][0][0]) == pytest.approx(
    3 * (1 - cosine), rel=1e-5
  )
  of_pixels, of_meaning = got["pixels"][1], got["semantic"][1]
  # Through the codes, each to the branch it restores, never to the other.
  assert largest(of_pixels[0].encoder) > 0 == largest(of_pixels[0].task_in)
  assert largest(of_meaning[0].task_in) > 0 == largest(of_meaning[0].encoder)
  assert largest(of_pixels[0].decoder) > 0 == largest(of_pixels[0].task_out)
  assert largest(of_pixels[1]) > 0 == largest(of_pixels[2])
  assert largest(of_meaning[2]) > 0 == largest(of_meaning[1])
  assert largest(of_pixels[3]) == largest(of_meaning[3]) == 0
  # Codebooks learn by their own loss alone.
  assert (
    largest(of_pixels[0].quantizer) == largest(of_meaning[0].quantizer) == 0
  )


def test_indices_are_all_a_decoder_needs_and_it_reads_its_own_part():
  (model, state), (images, features, _) = build(), inputs()
  found = run(model.encode, images, features, state)
  assert found.indices.shape == (2, 1 + 4 + 16)
  codes = run(model.lookup, found.indices, state)
  np.testing.assert_allclose(codes, found.codes, atol=1e-5)
  output, restored = run(model.decode, codes)
  assert output.shape == images.shape and restored.shape == (2, 16, 3)
  other = run(model.decode, codes.at[..., :4].set(1.0))
  np.testing.assert_array_equal(other[0], output)
  assert np.abs(other[1] - restored).max() > 1e-3
  other = run(model.decode, codes.at[..., 4:].set(1.0))
  np.testing.assert_array_equal(other[1], restored)
  assert np.abs(other[0] - output).max() > 1e-3


def test_images_of_another_size_are_resized_to_the_grid_and_back():
  (model, state), (images, features, _) = build(), inputs()
  small = dataclasses.replace(TINY, image_size=4)
  direct, _ = build(small)
  matrix = resample.cubic_matrix(6, 4)
  resized = np.einsum("ph,qw,bhwc->bpqc", matrix, matrix, images)
  one = run(model.branches, images, features)
  two = run(direct.branches, resized, features)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-5), one, two
  )
  codes = run(model.encode, images, features, state).codes
  matrix = resample.cubic_matrix(4, 6)
  want = np.einsum(
    "ph,qw,bhwc->bpqc", matrix, matrix, run(direct.decode, codes)[0]
  )
  np.testing.assert_allclose(run(model.decode, codes)[0], want, atol=1e-5)


def test_positions_of_another_grid_are_interpolated():
  config = dataclasses.replace(TINY, table_side=2)
  model, _ = build(config)
  assert model.positions.shape == (4, 8)
  matrix = np.float64(resample.cubic_matrix(2, 4))
  table = np.asarray(model.positions).reshape(2, 2, 8)
  want = np.einsum("ph,qw,hwc->pqc", matrix, matrix, table).reshape(16, 8)
  plain, _ = build()
  codes = np.random.default_rng(0).normal(size=(1, 4, 4, 6)).astype(np.float32)
  same = jax.tree.map(lambda x: x, plain)
  same.positions = nnx.Param(jnp.asarray(want, jnp.float32))
  np.testing.assert_allclose(
    run(model.decode, codes)[1], run(same.decode, codes)[1], atol=1e-5
  )


@pytest.mark.parametrize("name, tokens, features, target", [
  ("clip-base-224", 561, (196, 768), 512),
  ("clip-base-256", 817, (256, 768), 512),
  ("vitamin-xlarge-256", 817, (256, 1152), 1152),
  ("siglip-so400m-384", 2227, (729, 1152), 1152),
])  # fmt: skip
def test_published_sizes(name, tokens, features, target):
  config = token_flow.SIZES[name]
  assert config.quantizer.num_tokens == tokens
  assert (config.grid**2, config.features_dim) == features
  assert target == (config.target_dim or config.features_dim)


def test_the_largest_published_size_with_fewer_blocks():
  config, size = token_flow.SIZES["siglip-so400m-384"], 384
  conv = dataclasses.replace(config.encoder, num_res_blocks=1)
  config = dataclasses.replace(config, encoder=conv, decoder=conv)
  shapes = (
    jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32),
    jax.ShapeDtypeStruct((1, 729, 1152), jnp.float32),
  )

  def whole(images, features):
    model = config.build(nnx.Rngs(0))
    state = model.init_state(jax.random.key(0))
    found = model.encode(images, features, state)
    return found, model.decode(found.codes)

  found, (images, restored) = jax.eval_shape(whole, *shapes)
  assert found.indices.shape == (1, 2227)
  assert images.shape == (1, size, size, 3)
  assert restored.shape == (1, 729, 1152)


@pytest.mark.unchecked
def test_errors():
  (model, state), (images, features, _) = build(), inputs()
  with pytest.raises(ValueError, match=r"images must be \[B, 6, 6, C\]"):
    model.encode(images[:, :5], features, state)
  with pytest.raises(ValueError, match="tokens_of_features=9, grid=16"):
    model.encode(images, features[:, :9], state)
  with pytest.raises(ValueError, match="width_of_features=4, features_dim=5"):
    model.encode(images, features[..., :4], state)
  with pytest.raises(ValueError, match="width_of_target=5, target_dim=3"):
    model(images, features, state)
  with pytest.raises(ValueError, match="width_of_codes=5, both_dims=6"):
    model.decode(np.zeros((1, 4, 4, 5), np.float32))
  other = dataclasses.replace(CONV, multipliers=(1, 1))
  with pytest.raises(ValueError, match="encoder_factor=2, decoder_factor=1"):
    dataclasses.replace(TINY, encoder=other).build(nnx.Rngs(0))

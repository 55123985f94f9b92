import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from tests.compiled import compiled, run
from tokjax.ops import scalar_codes as plain

scalar_codes = compiled(plain)

LEVELS = (8, 5, 5, 5)
VARIANTS = ["shifted", "symmetric"]


def bounded(z, levels, variant):
  """In digits, before rounding; and the code of a digit, as (c - a) / a."""
  z, levels = np.asarray(z, np.float64), np.asarray(levels)
  if variant == "symmetric":
    return (levels - 1) * (np.tanh(z) + 1) / 2, (levels - 1) / 2
  height = (levels - 1) * 1.001 / 2
  offset = np.where(levels % 2 == 0, 0.5, 0)
  shifted = np.tanh(z + np.arctanh(offset / height)) * height - offset
  return shifted + levels // 2, levels // 2


def number(digits, levels):
  total = np.zeros(digits.shape[:-1], np.int64)
  for i in reversed(range(len(levels))):
    total = total * levels[i] + digits[..., i]
  return total


def features(levels, shape=(40, 8), seed=0):
  z = 1.5 * np.random.default_rng(seed).normal(size=(*shape, len(levels)))
  return z.astype(np.float32)


def slope(z, levels, variant):
  """Closed form of the gradient."""
  z, levels = np.asarray(z, np.float64), np.asarray(levels)
  if variant == "symmetric":
    return 1 - np.tanh(z) ** 2
  height = (levels - 1) * 1.001 / 2
  shift = np.arctanh(np.where(levels % 2 == 0, 0.5, 0) / height)
  return (1 - np.tanh(z + shift) ** 2) * height / (levels // 2)


def value_and_slope(function, z):
  def total(z):
    coded = function(z)
    return jnp.sum(coded.codes), coded

  gradient, coded = run(jax.grad(total, has_aux=True), z)
  return jax.device_get((coded, gradient))


def test_worked_example():
  z = np.array([0.3, -1.2, 2.0, 0.0], np.float32)
  coded = scalar_codes.fsq_quantize(z, LEVELS)
  np.testing.assert_array_equal(coded.codes, [0.25, -1, 1, 0])
  assert coded.index == 565 and coded.index.dtype == jnp.int32
  position, center = bounded(z, LEVELS, "shifted")
  want = [0.959918, -1.668977, 1.929983, 0]
  np.testing.assert_allclose(position - center, want, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("levels", [LEVELS, (3, 16, 1000)])
def test_equals_float64_and_the_closed_gradient(levels, variant):
  z = features(levels)
  coded, gradient = value_and_slope(
    lambda z: plain.fsq_quantize(z, levels, variant=variant), z
  )
  position, center = bounded(z, levels, variant)
  digits = np.clip(np.round(position), 0, np.asarray(levels) - 1)
  clear = np.abs(position % 1 - 0.5) > 1e-4 * np.asarray(levels)
  rows = clear.all(axis=-1)
  assert rows.mean() > 0.5
  codes = (digits - center) / center
  np.testing.assert_allclose(coded.codes[rows], codes[rows], atol=1e-6)
  want = number(digits.astype(int), levels)
  np.testing.assert_array_equal(coded.index[rows], want[rows])
  np.testing.assert_allclose(gradient, slope(z, levels, variant), atol=2e-6)
  back = scalar_codes.fsq_decode(coded.index, levels, variant=variant)
  np.testing.assert_array_equal(back, coded.codes)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("levels", [(8, 6, 5), (7, 5, 5, 5, 5)])
def test_every_code_is_its_own_code(levels, variant):
  index = np.arange(math.prod(levels), dtype=np.int32)
  codes = np.asarray(scalar_codes.fsq_decode(index, levels, variant=variant))
  assert len(np.unique(codes, axis=0)) == len(index)
  assert codes.min() == -1 and codes.max() <= 1
  # The features that are bounded to the codes; the outermost are far out.
  center = bounded(0, levels, variant)[1]
  if variant == "symmetric":
    z = np.arctanh(np.clip(codes, -1 + 1e-6, 1 - 1e-6))
  else:
    sizes = np.asarray(levels)
    height = (sizes - 1) * 1.001 / 2
    offset = np.where(sizes % 2 == 0, 0.5, 0)
    z = np.arctanh((codes * center + offset) / height)
    z = z - np.arctanh(offset / height)
  again = scalar_codes.fsq_quantize(
    z.astype(np.float32), levels, variant=variant
  )
  np.testing.assert_array_equal(again.index, index)
  np.testing.assert_array_equal(again.codes, codes)


@pytest.mark.parametrize("variant", VARIANTS)
def test_far_features_stay_in_range_with_large_levels(variant):
  levels = (46340, 46340)  # almost 2^31 codes
  far = [[-1e9] * 2, [1e9] * 2, [-np.inf] * 2, [np.inf] * 2]
  z = np.array(far, np.float32)
  coded = scalar_codes.fsq_quantize(z, levels, variant=variant)
  last = math.prod(levels) - 1
  np.testing.assert_array_equal(coded.index, [0, last, 0, last])
  back = scalar_codes.fsq_decode(coded.index, levels, variant=variant)
  np.testing.assert_allclose(back[0], [-1, -1], rtol=1e-6)
  top = 1 - (2 / 46340 if variant == "shifted" else 0)
  np.testing.assert_allclose(back[1], [top, top], rtol=1e-6)
  np.testing.assert_array_equal(coded.codes[:2], back[:2])


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_features_lose_no_code(variant):
  levels = (8, 8, 8, 6, 5)
  z = features(levels).astype(jnp.bfloat16)
  low = scalar_codes.fsq_quantize(z, levels, variant=variant)
  high = scalar_codes.fsq_quantize(
    z.astype(np.float32), levels, variant=variant
  )
  np.testing.assert_array_equal(low.index, high.index)
  assert low.codes.dtype == jnp.bfloat16 and low.index.dtype == jnp.int32
  back = scalar_codes.fsq_decode(low.index, levels, variant=variant)
  back = np.asarray(back).astype(jnp.bfloat16)
  np.testing.assert_array_equal(back, low.codes)


@pytest.mark.parametrize("variant", VARIANTS)
def test_noise_takes_the_place_of_rounding(variant):
  z = features(LEVELS, (40, 50))

  @jax.jit
  def quantize(z, rate):
    def total(z):
      coded = plain.fsq_quantize(
        z, LEVELS, variant=variant, noise_rate=rate, key=jax.random.key(0)
      )
      return jnp.sum(coded.codes), coded

    return jax.grad(total, has_aux=True)(z)

  def noisy(rate):
    gradient, coded = jax.device_get(quantize(z, rate))
    np.testing.assert_array_equal(coded.index, rounded.index)
    np.testing.assert_allclose(gradient, slope(z, LEVELS, variant), atol=2e-6)
    return coded.codes

  rounded = jax.device_get(
    scalar_codes.fsq_quantize(z, LEVELS, variant=variant)
  )
  np.testing.assert_array_equal(noisy(0.0), rounded.codes)
  position, center = bounded(z, LEVELS, variant)
  top = np.asarray(LEVELS) - 1
  inside = (position > 0.5) & (position < top - 0.5)  # never clipped
  share = np.mean((noisy(0.25) != rounded.codes)[inside])
  np.testing.assert_allclose(share, 0.25, atol=0.02)
  digits = noisy(1.0) * center + center
  assert np.all(digits >= -1e-5) and np.all(digits <= top + 1e-5)
  noise = (digits - position)[inside]
  np.testing.assert_allclose(np.mean(noise), 0, atol=0.02)
  np.testing.assert_allclose(np.std(noise), 1 / math.sqrt(12), atol=0.01)
  assert np.abs(noise).max() <= 0.5 + 1e-5


def test_noise_is_laid_out_as_the_features_are():
  z = features(LEVELS, (8, 3))

  @jax.jit
  def quantize(z):
    return plain.fsq_quantize(z, LEVELS, key=jax.random.key(0))

  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
  with jax.set_mesh(mesh):
    got = quantize(jax.device_put(z, jax.P("data")))
  assert got.codes.sharding.spec[0] == "data"
  np.testing.assert_allclose(got.codes, quantize(z).codes, atol=1e-6)


def test_padding_decodes_to_zeros():
  index = np.array([[3, -1], [-1, 0]], np.int32)
  codes = scalar_codes.fsq_decode(index, LEVELS)
  np.testing.assert_array_equal(np.any(codes, axis=-1), index >= 0)


RESIDUAL = (8, 5, 2)


def in_stages(x, levels, num_stages):
  sizes = np.asarray(levels, np.float64)
  bound = sizes / (sizes - 1)
  start = np.tanh(np.asarray(x, np.float64) / bound) * bound
  rest, stages, gaps = start, [], []
  for m in range(num_stages):
    scale = sizes**-m
    position = (np.clip(rest / scale, -1, 1) + 1) * (sizes - 1) / 2
    digits = np.floor(position + 0.5)
    gaps.append(np.abs(position % 1 - 0.5))
    rest = rest - (digits * 2 / (sizes - 1) - 1) * scale
    stages.append(number(digits.astype(int), levels))
  return start, start - rest, np.stack(stages, -1), np.min(gaps, axis=0)


@pytest.mark.parametrize("num_stages", [1, 4])
def test_residual_stages_equal_a_loop_and_shrink_the_error(num_stages):
  x = features(RESIDUAL)
  x[0, 0], x[0, 1] = 1e9, -1e9
  coded, gradient = value_and_slope(
    lambda x: plain.residual_fsq_quantize(x, RESIDUAL, num_stages=num_stages),
    x,
  )
  start, codes, index, gap = in_stages(x, RESIDUAL, num_stages)
  sizes = np.asarray(RESIDUAL, np.float64)
  most = sizes ** (1 - num_stages) / (sizes - 1)
  assert np.all(np.abs(coded.codes - start) <= most + 1e-6)
  rows = np.all(gap > 1e-5 * sizes**num_stages, axis=-1)
  assert rows.mean() > 0.3
  np.testing.assert_array_equal(coded.index[rows], index[rows])
  np.testing.assert_allclose(coded.codes[rows], codes[rows], atol=2e-6)
  want = 1 - np.tanh(x * (sizes - 1) / sizes) ** 2  # once, not per stage
  np.testing.assert_allclose(gradient, want, atol=1e-6)
  back = scalar_codes.residual_fsq_decode(coded.index, RESIDUAL)
  np.testing.assert_array_equal(back, coded.codes)


def test_residual_stages_may_be_fewer_per_vector():
  x = features(RESIDUAL, (4, 6))
  count = np.arange(24, dtype=np.int32).reshape(4, 6) % 4
  whole = scalar_codes.residual_fsq_quantize(x, RESIDUAL, num_stages=3)
  part = scalar_codes.residual_fsq_quantize(
    x, RESIDUAL, num_stages=3, num_active=count
  )
  active = np.arange(3) < count[..., None]
  want = np.where(active, whole.index, -1)
  np.testing.assert_array_equal(part.index, want)
  decode = scalar_codes.residual_fsq_decode
  np.testing.assert_array_equal(part.codes, decode(want, RESIDUAL))
  two = scalar_codes.residual_fsq_quantize(
    x, RESIDUAL, num_stages=3, num_active=np.int32(2)
  )
  prefix = decode(np.asarray(whole.index)[..., :2], RESIDUAL)
  np.testing.assert_array_equal(two.codes, prefix)


def test_residual_bfloat16_gives_the_same_indices():
  x = features(RESIDUAL).astype(jnp.bfloat16)
  low = scalar_codes.residual_fsq_quantize(x, RESIDUAL, num_stages=3)
  high = scalar_codes.residual_fsq_quantize(
    x.astype(np.float32), RESIDUAL, num_stages=3
  )
  np.testing.assert_array_equal(low.index, high.index)
  np.testing.assert_array_equal(low.codes, high.codes.astype(jnp.bfloat16))


@pytest.mark.unchecked
def test_errors_name_the_argument():
  z, index = jnp.zeros((2, 3)), jnp.zeros(2, jnp.int32)
  for levels in ((8, 5, 2), (8, 5, -1), ()):
    with pytest.raises(ValueError, match="levels must be at least 3 each for"):
      plain.fsq_quantize(z, levels)
  with pytest.raises(ValueError, match="levels must be at least 2 each for"):
    plain.residual_fsq_quantize(z, (8, 5, 1), num_stages=2)
  with pytest.raises(ValueError, match=r"levels must have a product below 2"):
    plain.fsq_decode(index, (2**11, 2**10, 2**10))
  with pytest.raises(ValueError, match="z_width=3, levels=4"):
    plain.fsq_quantize(z, LEVELS)
  with pytest.raises(ValueError, match="x_width=3, levels=2"):
    plain.residual_fsq_quantize(z, (3, 3), num_stages=2)
  with pytest.raises(ValueError, match="num_stages must lie in 1"):
    plain.residual_fsq_quantize(z, (3, 3, 3), num_stages=0)
  with pytest.raises(ValueError, match=r"num_stages must lie in 1\.\.9, got"):
    plain.residual_fsq_quantize(z, (8, 3, 3), num_stages=10)
  with pytest.raises(ValueError, match="variant must be one of 'shifted'"):
    plain.fsq_decode(index, LEVELS, variant="even")

"""Quantizers without tables: codes, losses, projections and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from tests.compiled import run
from tokjax.ops import binary_codes, scalar_codes
from tokjax.tokenizers.lookup_free import LookupFreeConfig

LEVELS = (8, 5, 5)
KINDS = {
  "fsq": {"levels": LEVELS},
  "lfq": {"num_bits": 3},
  "bsq": {"num_bits": 3},
}


def make(kind, **settings):
  config = LookupFreeConfig(kind, **(KINDS[kind] | settings))
  return config.build(nnx.Rngs(0))


def tokens(seed=0, shape=(8, 5, 3)):
  random = np.random.default_rng(seed)
  return random.normal(size=shape).astype(np.float32)


@functools.partial(jax.jit, static_argnames="train")
def call(quantizer, x, mask=None, key=None, train=False):
  return quantizer(x, (), mask, key=key, train=train)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_those_of_the_operations(kind):
  quantizer, x = make(kind, input_dim=6), tokens(shape=(8, 5, 6))
  mask = np.random.default_rng(2).random((8, 5)) < 0.7
  found = call(quantizer, x, mask)
  y = x @ quantizer.project_in[...]
  if kind == "fsq":
    inner = run(scalar_codes.fsq_quantize, y, LEVELS)
  else:
    inner = run(getattr(binary_codes, f"{kind}_quantize"), y)
  np.testing.assert_array_equal(found.indices, np.where(mask, inner.index, -1))
  want = np.where(mask[..., None], inner.codes @ quantizer.project_out[...], 0)
  np.testing.assert_allclose(found.codes, want, atol=1e-5)
  again = run(quantizer.lookup, found.indices)
  np.testing.assert_allclose(again, found.codes, atol=1e-5)
  used = np.bincount(inner.index[mask], minlength=quantizer.num_codes)
  assert float(found.stats["usage"]) == pytest.approx((used > 0).mean())
  assert quantizer.init_state(jax.random.key(0)) == ()


def test_losses_of_signs_are_those_of_all_codes_at_once():
  """Entropies by listing the eight codes; the commitment by hand."""
  x, mask = tokens(), np.random.default_rng(2).random((8, 5)) < 0.7
  bits = np.array(list(np.ndindex(2, 2, 2))) * 2.0 - 1
  for kind, temperature in (("lfq", 0.7), ("bsq", 0.2)):
    quantizer = make(
      kind, commitment_weight=0.5, entropy_weight=2.0, entropy_gamma=0.3,
      entropy_temperature=temperature,
    )  # fmt: skip
    found = call(quantizer, x, mask)
    y, codes = x.astype(np.float64), bits
    if kind == "bsq":
      y = y / np.linalg.norm(y, axis=-1, keepdims=True)
      codes = bits / np.sqrt(3)
    y = y[mask]
    logits = 2 * y @ codes.T / temperature
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    entropy = lambda p: -(p * np.log(p)).sum(-1)  # noqa: E731
    want = 2 * (entropy(p).mean() - 0.3 * entropy(p.mean(0)))
    assert float(found.losses["entropy"]) == pytest.approx(want, rel=1e-4)
    nearest = codes[np.argmax(logits, -1)]
    want = 0.5 * ((y - nearest) ** 2).mean()
    assert float(found.losses["commitment"]) == pytest.approx(want, rel=1e-5)
  assert call(make("fsq"), x, mask).losses == {}


def test_temperatures_that_nobody_set():
  x = tokens() / 100
  for kind, temperature in (("lfq", 0.01), ("bsq", 1.0)):
    default = call(make(kind), x).losses["entropy"]
    said = call(make(kind, entropy_temperature=temperature), x)
    assert float(default) == float(said.losses["entropy"])


def test_a_clamp_comes_before_signs_and_losses():
  x = 9 * tokens()
  plain = call(make("lfq", commitment_weight=1.0), x)
  clamped = call(make("lfq", commitment_weight=1.0, soft_clamp=1.0), x)
  np.testing.assert_array_equal(plain.codes, clamped.codes)
  y = np.tanh(x)
  want = ((y - np.sign(x)) ** 2).mean()
  assert float(clamped.losses["commitment"]) == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_come_in_training_only_and_never_from_padding(kind):
  quantizer, x = make(kind, input_dim=6), tokens(shape=(8, 5, 6))
  mask = np.random.default_rng(2).random((8, 5)) < 0.7
  x[~mask] = np.nan

  @functools.partial(jax.jit, static_argnames="train")
  def gradients(quantizer, x, train):
    def total(quantizer, x):
      found, _ = quantizer(x, (), mask, train=train)
      return jnp.sum(jnp.sin(found.codes))

    return jax.grad(total, argnums=(0, 1))(quantizer, x)

  of_quantizer, of_x = gradients(quantizer, x, train=True)
  assert np.all(np.isfinite(of_quantizer.project_in[...]))
  assert np.all(np.isfinite(of_x)) and not np.any(of_x[~mask])
  assert np.all(np.abs(of_x[mask]).sum(-1) > 0)
  still, of_x = gradients(quantizer, x, train=False)
  assert not np.any(still.project_in[...]) and not np.any(of_x)
  assert np.any(still.project_out[...])


def test_noise_is_for_training_with_a_key():
  quantizer, x = make("fsq", noise_rate=1.0), tokens()
  plain = call(quantizer, x)
  noisy = call(quantizer, x, key=jax.random.key(0), train=True)
  np.testing.assert_array_equal(plain.indices, noisy.indices)
  far = np.abs(plain.codes - noisy.codes)
  # One level is 1/4 or 1/2; the bounded value is within half of one, too.
  assert np.all(far <= np.array([0.25, 0.5, 0.5]) + 1e-6) and far.mean() > 0.05
  with pytest.raises(ValueError, match="key must be given"):
    quantizer(jnp.asarray(x), (), train=True)


def test_many_bits_are_not_counted():
  quantizer = make("bsq", num_bits=24)
  found = call(quantizer, tokens(shape=(2, 24)))
  assert found.stats == {} and quantizer.bits_per_vector == 24
  assert make("fsq").bits_per_vector == pytest.approx(np.log2(200))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_over_eight_devices_equals_one(kind):
  quantizer, x = make("bsq", commitment_weight=0.1), tokens()
  mask = np.random.default_rng(2).random((8, 5)) < 0.6
  want = call(quantizer, x, mask)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
  shards = jax.device_put((x, mask), jax.NamedSharding(mesh, jax.P("data")))

  def local(x, mask):
    found, _ = quantizer(x, (), mask, axis_name="data")
    return found[:3], found[3:]

  specs = jax.P("data"), jax.P("data")
  rows, whole = jax.jit(
    jax.shard_map(
      local, mesh=mesh, in_specs=specs, out_specs=(jax.P("data"), jax.P())
    )
  )(*shards)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
    (*rows, *whole),
    tuple(want),
  )


@pytest.mark.unchecked
@pytest.mark.parametrize("kind, settings, message", [
  ("fsq", {"num_bits": 3}, "takes levels and no num_bits"),
  ("fsq", {"levels": ()}, "takes levels and no num_bits"),
  ("fsq", {"noise_rate": 2.0}, "noise_rate must lie in 0..1"),
  ("lfq", {"num_bits": 40}, "num_bits must lie in 1..31"),
  ("lfq", {"levels": (3,)}, "of kind 'fsq'"),
  ("bsq", {"soft_clamp": 2.0}, "of kind 'lfq'"),
  ("bsq", {"entropy_temperature": 0.0}, "must be positive"),
])  # fmt: skip
def test_settings_that_cannot_be(kind, settings, message):
  with pytest.raises(ValueError, match=message):
    make(kind, **settings)


@pytest.mark.unchecked
def test_errors():
  with pytest.raises(ValueError, match="kind must be one of"):
    LookupFreeConfig("vq").build(nnx.Rngs(0))
  with pytest.raises(ValueError, match="x must have width 3, got shape"):
    make("fsq")(jnp.ones((2, 4)))

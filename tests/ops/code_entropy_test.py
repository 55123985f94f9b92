import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import compiled, run
from tokjax.ops import code_entropy as plain

code_entropy = compiled(plain)


def entropy(p, axis=-1):
  p = np.asarray(p, np.float64)
  return -np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0), axis)


def softmax(logits):
  logits = np.asarray(logits, np.float64)
  p = np.exp(logits - logits.max(axis=-1, keepdims=True))
  return p / p.sum(axis=-1, keepdims=True)


def every_code(bit_logits):
  """Logits of all 2^d codes, the first bit highest."""
  bits = np.array(list(itertools.product([0, 1], repeat=bit_logits.shape[-1])))
  return np.asarray(bit_logits, np.float64) @ bits.T


@pytest.mark.parametrize(
  "x, per_sample, codebook",
  [((1, -1), 0.09009, 0.69315), ((1, 1), 0.09009, 0.09009),
   ((0, 0), 0.69315, 0.69315)],
)  # fmt: skip
def test_worked_example_of_one_bit(x, per_sample, codebook):
  x = np.array(x, np.float32)[:, None]
  logits = -np.square(x - np.array([[1, -1]], np.float32))
  got = code_entropy.entropy_penalty(logits)
  want = per_sample, codebook, per_sample - codebook
  np.testing.assert_allclose(got, want, atol=2e-5)
  got = code_entropy.bit_entropy_penalty(4 * x)
  np.testing.assert_allclose(got, want, atol=2e-5)


def test_worked_example_of_the_sphere():
  x = np.array([[0.3, -0.8, 1.2]])
  u = x / np.linalg.norm(x)
  logits = (4 * u / np.sqrt(3)).astype(np.float32)
  got = code_entropy.bit_entropy_penalty(logits)
  np.testing.assert_allclose(got.per_sample, 1.586272, atol=2e-6)
  np.testing.assert_allclose(got.codebook, 1.586272, atol=2e-6)
  codes = np.array(list(itertools.product([-1, 1], repeat=3))) / np.sqrt(3)
  brute = entropy(softmax(2 * u @ codes.T))
  np.testing.assert_allclose(brute, [1.586272], atol=1e-6)


def logits_and_mask(seed, shape, scale=2.0):
  rng = np.random.default_rng(seed)
  logits = scale * rng.normal(size=shape)
  return logits.astype(np.float32), rng.random(shape[:-1]) < 0.6


def value_and_gradient(function, logits, mask, **settings):
  def penalty(logits, mask):
    terms = function(logits, mask, **settings)
    return terms.penalty, terms

  gradient, terms = run(jax.grad(penalty, has_aux=True), logits, mask)
  return terms, np.asarray(gradient)


@pytest.mark.parametrize("scale", [2.0, 300.0])
def test_equals_float64_with_mask_and_its_closed_gradient(scale):
  logits, mask = logits_and_mask(0, (4, 25, 7), scale)
  logits[0, 0, 2] = -np.inf  # a code that cannot be chosen
  mask[0, 0] = True
  poisoned = np.where(mask[..., None], logits, np.nan)
  terms, gradient = value_and_gradient(
    plain.entropy_penalty, poisoned, mask, gamma=0.5
  )
  p = softmax(logits[mask])
  mean = p.mean(axis=0)
  want = entropy(p).mean(), entropy(mean)
  np.testing.assert_allclose(terms[:2], want, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(terms.penalty, want[0] - 0.5 * want[1], atol=1e-5)
  log_p = np.log(np.where(p > 0, p, 1))
  log_mean = np.log(np.where(mean > 0, mean, 1))
  sure = -p * (log_p + entropy(p)[:, None])
  even = -p * (log_mean - np.sum(p * log_mean, axis=-1, keepdims=True))
  want = np.zeros(logits.shape)
  want[mask] = (sure - 0.5 * even) / mask.sum()
  np.testing.assert_allclose(gradient, want, atol=1e-6)


@pytest.mark.parametrize("num_bits, group_size", [(1, 1), (5, 9), (10, 10)])
def test_one_group_equals_brute_force(num_bits, group_size):
  logits, mask = logits_and_mask(1, (2, 30, num_bits))
  terms = code_entropy.bit_entropy_penalty(
    logits, mask, group_size=group_size, gamma=1.5
  )
  p = softmax(every_code(logits[mask]))
  sure, even = entropy(p).mean(), entropy(p.mean(axis=0))
  np.testing.assert_allclose(terms, (sure, even, sure - 1.5 * even), rtol=2e-5)


@pytest.mark.parametrize("group_size", [1, 3, 4])
def test_groups_sum_to_a_bound_from_above(group_size):
  logits, mask = logits_and_mask(2, (2, 30, 6))
  poisoned = np.where(mask[..., None], logits, np.nan)
  terms, gradient = value_and_gradient(
    plain.bit_entropy_penalty, poisoned, mask, group_size=group_size
  )
  bits = logits[mask]
  whole = softmax(every_code(bits))
  sure = entropy(whole).mean()
  even = sum(
    entropy(softmax(every_code(bits[:, i : i + group_size])).mean(axis=0))
    for i in range(0, 6, group_size)
  )
  np.testing.assert_allclose(terms, (sure, even, sure - even), atol=2e-5)
  assert even >= entropy(whole.mean(axis=0)) - 1e-9
  np.testing.assert_array_equal(gradient[~mask], 0)
  assert np.isfinite(gradient).all() and np.abs(gradient).max() > 1e-4


def test_gradient_of_bits_is_that_of_all_codes():
  logits, mask = logits_and_mask(3, (2, 30, 5))
  codes = np.array(list(itertools.product([0, 1], repeat=5)), np.float32)

  def brute(bit_logits, mask):
    all_logits = jnp.matmul(bit_logits, codes.T, precision="highest")
    return plain.entropy_penalty(all_logits, mask)

  want = value_and_gradient(brute, logits, mask)[1]
  got = value_and_gradient(plain.bit_entropy_penalty, logits, mask)[1]
  np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_penalty_is_bounded_and_certain_bits_cost_nothing(scale):
  logits, _ = logits_and_mask(4, (64, 6), scale)
  mask = np.ones(64, bool)
  terms, gradient = value_and_gradient(
    plain.bit_entropy_penalty, logits, mask, gamma=2.0, group_size=3
  )
  most = 6 * np.log(2)
  assert -2 * most - 1e-4 <= terms.penalty <= most + 1e-4
  assert np.isfinite(gradient).all()
  if scale == 1e4:
    np.testing.assert_allclose(terms.per_sample, 0, atol=1e-3)
  if scale == 0:
    np.testing.assert_allclose(terms[:2], (most, most), rtol=1e-6)


def test_nothing_valid_gives_zero():
  logits, _ = logits_and_mask(5, (3, 4))
  mask = np.zeros(3, bool)
  for function in (plain.entropy_penalty, plain.bit_entropy_penalty):
    terms, gradient = value_and_gradient(
      function, np.full_like(logits, np.nan), mask
    )
    np.testing.assert_array_equal(terms, np.zeros(3))
    np.testing.assert_array_equal(gradient, np.zeros_like(logits))


@pytest.mark.parametrize("masked", [False, True])
def test_axis_name_makes_the_mean_global(masked):
  logits, mask = logits_and_mask(6, (8, 5, 3))
  mask = mask if masked else None
  mesh = jax.make_mesh((8,), ("data",))
  rows = jax.P("data")

  def both(logits, mask, axis_name=None):
    over_codes = plain.entropy_penalty(logits, mask, axis_name=axis_name)
    over_bits = plain.bit_entropy_penalty(logits, mask, axis_name=axis_name)
    total = jax.tree.map(jnp.add, over_codes, over_bits)
    return plain.CodeEntropy(*total)

  def split(logits, mask):
    local = functools.partial(both, axis_name="data")
    return jax.shard_map(
      local, mesh=mesh, in_specs=(rows, rows), out_specs=jax.P()
    )(logits, mask)

  want, want_gradient = value_and_gradient(both, logits, mask)
  shards = jax.device_put((logits, mask), jax.NamedSharding(mesh, rows))
  got, gradient = value_and_gradient(split, *shards)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  np.testing.assert_allclose(gradient, want_gradient, atol=1e-6)


@pytest.mark.unchecked
def test_errors_name_the_argument():
  logits = jnp.zeros((2, 3, 4))
  with pytest.raises(ValueError, match="shape of logits without its last"):
    jax.eval_shape(plain.entropy_penalty, logits, jnp.ones((2, 1), bool))
  with pytest.raises(ValueError, match="shape of bit_logits without its last"):
    jax.eval_shape(plain.bit_entropy_penalty, logits, jnp.ones(2, bool))
  with pytest.raises(ValueError, match=r"group_size must lie in 1\.\.20"):
    plain.bit_entropy_penalty(logits, group_size=0)

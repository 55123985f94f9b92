"""CATS: thresholds against NumPy's percentile, outputs against a loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import compiled, run
from tokjax.sparse import cats as module
from tokjax.sparse.cats import CatsConfig

cats = compiled(module)
# Gates of pre-activations -3, -1, -.2, .1, .5, 2 by hand.
BEFORE = np.array([-3, -1, -0.2, 0.1, 0.5, 2], np.float32)
AFTER = [-0.142278, -0.268941, -0.090033, 0.052498, 0.311230, 1.761594]


def weights(seed, dim=8, num_units=16, tokens=(5,)):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(*tokens, dim)).astype(np.float32)
  w_gate = rng.normal(size=(dim, num_units)).astype(np.float32)
  w_up, w_down = rng.normal(size=(2, num_units, dim)).astype(np.float32)
  return x, w_gate, w_up, w_down


def scalar(value):
  """A threshold that is traced."""
  return jnp.asarray(value, jnp.float32)


def oracle(x, w_gate, w_up, w_down, tau):
  """Output and kept units of each token, in float64."""
  x, w_gate, w_up, w_down = (
    y.astype(np.float64) for y in (x, w_gate, w_up, w_down)
  )
  before = x @ w_gate
  gate = before / (1 + np.exp(-before))
  kept = np.abs(gate) > tau
  return (np.where(kept, gate, 0) * (x @ w_up.T)) @ w_down, kept


def two_passes(batches, config, masks=None):
  """Thresholds after one pass and after two."""
  masks = masks or [np.ones(batch.shape[:-1], bool) for batch in batches]
  first = module.start_histogram()
  for batch, mask in zip(batches, masks, strict=True):
    first = cats.observe(first, batch, mask)
  second = cats.refine(first, config)
  for batch, mask in zip(batches, masks, strict=True):
    second = cats.observe(second, batch, mask)
  return cats.find_threshold(first, config), cats.find_threshold(second, config)


def percentile(values, sparsity):
  return np.percentile(
    np.abs(np.asarray(values, np.float32)), 100 * sparsity,
    method="inverted_cdf",
  )  # fmt: skip


def cut(value):
  """Without the lower half of its bits."""
  return (np.float32(value).view(np.int32) >> 16 << 16).view(np.float32)


def test_the_worked_example():
  gate = cats.silu_gate(BEFORE[:, None], np.ones((1, 1), np.float32))[:, 0]
  np.testing.assert_allclose(gate, AFTER, atol=1e-6)
  _, tau = two_passes([gate[None]], CatsConfig(sparsity=0.5))
  kept = cats.sparse_gate(gate, tau) != 0
  # -1 stays and -3 goes: of the activation, not of what comes before it.
  np.testing.assert_array_equal(kept, BEFORE == [9, -1, 9, 9, 0.5, 2])


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7, 0.9, 0.9999, 1.0])
def test_threshold_is_the_percentile(sparsity):
  rng = np.random.default_rng(1)
  # Magnitudes from 1e-30 to 1e8, of both signs, with repeats and zeros.
  values = np.exp(rng.normal(size=(6, 40, 8)) * 8).astype(np.float32)
  values *= rng.choice([-1, 0, 1, 1, 1], values.shape).astype(np.float32)
  values[1] = values[0]
  want = percentile(values, sparsity)
  config = CatsConfig(sparsity=sparsity)
  one, two = two_passes(list(values), config)
  assert float(two) == want
  assert float(one) == cut(want)
  assert np.mean(np.abs(values) <= float(two)) >= sparsity
  assert np.mean(np.abs(values) < float(two)) < sparsity


def test_splitting_into_batches_makes_no_difference():
  values = np.random.default_rng(2).normal(size=(12, 7)).astype(np.float32)
  config = CatsConfig(sparsity=0.7)
  want = percentile(values, 0.7)
  for cuts in ([], [4, 8], [1, 5]):
    _, got = two_passes(np.split(values, cuts), config)
    assert float(got) == want


def test_bfloat16_is_exact_after_one_pass():
  values = np.random.default_rng(3).normal(size=(20, 8))
  values = jnp.asarray(values, jnp.bfloat16)
  one, two = two_passes([values], CatsConfig(sparsity=0.5))
  assert float(one) == float(two) == percentile(values, 0.5)


def test_tokens_that_do_not_count_are_not_counted():
  rng = np.random.default_rng(4)
  values = rng.normal(size=(2, 10, 8)).astype(np.float32)
  mask = rng.random((2, 10)) < 0.6
  values[~mask] = np.nan
  _, tau = two_passes(list(values), CatsConfig(sparsity=0.5), list(mask))
  assert float(tau) == percentile(values[mask], 0.5)


def test_thresholds_of_many_layers_at_once():
  values = np.random.default_rng(5).normal(size=(3, 10, 8)).astype(np.float32)
  config = CatsConfig(sparsity=0.7)

  @jax.jit
  def thresholds(values):
    start = jax.vmap(lambda _: module.start_histogram())(jnp.arange(3))
    first = jax.vmap(module.observe)(start, values)
    second = jax.vmap(lambda h: module.refine(h, config))(first)
    second = jax.vmap(module.observe)(second, values)
    return jax.vmap(lambda h: module.find_threshold(h, config))(second)

  want = [percentile(layer, 0.7) for layer in values]
  np.testing.assert_array_equal(thresholds(values), np.float32(want))


def test_devices_add_up():
  values = np.random.default_rng(6).normal(size=(8, 3, 8)).astype(np.float32)
  mask = np.random.default_rng(7).random((8, 3)) < 0.7
  mesh = jax.make_mesh(
    (4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  data = jax.P("data")
  count = jax.shard_map(
    functools.partial(module.observe, axis_name="data"),
    mesh=mesh,
    in_specs=(jax.P(), data, data),
    out_specs=jax.P(),
  )
  got = jax.jit(count)(module.start_histogram(), values, mask)
  want = cats.observe(module.start_histogram(), values, mask)
  for ours, theirs in zip(got, want, strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_totals_beyond_float32_are_exact():
  # 2**31 - 1 values: one of magnitude 1 below rank, all others at 2 or 4.
  counts = np.zeros(1 << 16, np.int32)
  upper = [int(np.float32(v).view(np.int32)) >> 16 for v in (1, 2, 4)]
  total = 2**31 - 1
  low = -(-total * 7 // 10)  # the rank of the percentile
  counts[upper[0]], counts[upper[1]] = low - 1, 1
  counts[upper[2]] = total - low
  zero = np.int32(0)
  full = module.GateHistogram(counts, zero - 1, zero, np.int32(total), zero)
  assert float(cats.find_threshold(full, CatsConfig(sparsity=0.7))) == 2
  assert float(cats.find_threshold(full, CatsConfig(sparsity=0.6999))) == 1
  assert float(cats.find_threshold(full, CatsConfig(sparsity=0.7001))) == 4
  # There is no room for another value, and that is said.
  after = cats.observe(full, np.ones((1, 1), np.float32))
  assert (int(after.refused), int(after.total)) == (1, total)
  np.testing.assert_array_equal(after.counts, counts)
  assert int(cats.refine(after, CatsConfig()).refused) == 1


def test_a_second_pass_over_other_values_is_not_believed():
  values = np.linspace(1, 2, 32, dtype=np.float32).reshape(4, 8)
  config = CatsConfig(sparsity=0.5)
  first = cats.observe(module.start_histogram(), values)
  for other in (values / 8, values * 8):
    second = cats.observe(cats.refine(first, config), other)
    assert np.isnan(cats.find_threshold(second, config))


def test_nothing_to_drop():
  gate = np.ones((2, 4), np.float32)
  histogram = cats.observe(module.start_histogram(), gate)
  assert float(cats.find_threshold(histogram, CatsConfig(sparsity=0.0))) == 0
  empty = module.start_histogram()
  assert float(cats.find_threshold(empty, CatsConfig())) == 0


@pytest.mark.parametrize("tokens", [(), (1,), (2, 6)], ids=str)
@pytest.mark.parametrize("tau", [0.0, 0.3])
def test_output_and_shares_equal_the_loop(tau, tokens):
  given = weights(8, tokens=tokens)
  want, kept = oracle(*given, tau)
  got = cats.gated_mlp(*given, scalar(tau))
  np.testing.assert_allclose(got.output, want, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(got.kept_share, kept.mean(axis=-1), rtol=1e-6)
  assert int(got.active_units) == kept.reshape(-1, 16).any(axis=0).sum()
  assert int(got.overflow) == 0


def test_threshold_zero_is_the_dense_mlp():
  x, w_gate, w_up, w_down = weights(9)

  @jax.jit
  def dense(x, w_gate, w_up, w_down):
    hidden = jax.nn.silu(jnp.matmul(x, w_gate)) * jnp.matmul(x, w_up.T)
    return jnp.matmul(hidden, w_down)

  got = cats.gated_mlp(x, w_gate, w_up, w_down, scalar(0))
  want = dense(x, w_gate, w_up, w_down)
  np.testing.assert_allclose(got.output, want, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(got.kept_share, np.ones(5))


def test_everything_dropped_gives_zeros():
  for tau in (np.inf, np.nan):
    got = cats.gated_mlp(*weights(10), scalar(tau))
    assert not any(np.any(leaf) for leaf in got)


def test_overflow_is_counted():
  given = weights(11, tokens=(1,))
  _, kept = oracle(*given, 0.1)
  active = kept.sum()
  gate = np.abs(cats.silu_gate(*given[:2]))[0]
  got = cats.gated_mlp(*given, scalar(0.1), capacity=4)
  assert (int(got.active_units), int(got.overflow)) == (active, active - 4)
  # As a threshold between the fourth and the fifth gate would have it.
  want, _ = oracle(*given, np.sort(gate)[-5])
  np.testing.assert_allclose(got.output, want, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(got.kept_share, [active / 16])


def test_padding_has_no_influence():
  x, w_gate, *rest = weights(12, tokens=(2, 3))
  mask = np.array([[True, True, False], [False, True, False]])
  x[~mask] = np.nan
  tau = scalar(0.3)
  got = cats.gated_mlp(x, w_gate, *rest, tau, mask)
  want, kept = oracle(x[mask], w_gate, *rest, 0.3)
  np.testing.assert_allclose(got.output[mask], want, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(got.kept_share[mask], kept.mean(axis=-1))
  assert not np.any(got.output[~mask]) and not np.any(got.kept_share[~mask])
  assert int(got.active_units) == kept.any(axis=0).sum()

  rest, mask = jax.tree.map(jnp.asarray, (rest, mask))

  def total(x, w_gate):
    found = module.gated_mlp(x, w_gate, *rest, tau, mask)
    return jnp.sum(found.output)

  gradients = jax.jit(jax.grad(total, (0, 1)))(x, w_gate)
  assert all(np.all(np.isfinite(gradient)) for gradient in gradients)
  assert not np.any(np.asarray(gradients[0])[~mask])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_gradients_pass_through_kept_gates_only(implementation):
  given = weights(13)
  tau = scalar(0.4)
  _, kept = oracle(*given, 0.4)

  def total(*given):
    found = module.gated_mlp(*given, implementation=implementation)
    return jnp.sum(jnp.sin(found.output))

  def straight(x, w_gate, w_up, w_down, tau):
    gate = kept * jax.nn.silu(jnp.matmul(x, w_gate))
    return jnp.sum(jnp.sin(jnp.matmul(gate * jnp.matmul(x, w_up.T), w_down)))

  got = jax.jit(jax.grad(total, range(5)))(*given, tau)
  want = jax.jit(jax.grad(straight, range(5)))(*given, tau)
  for ours, theirs in zip(got, want, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
  idle = ~kept.any(axis=0)
  assert idle.any() and float(got[4]) == 0
  assert not np.any(got[1][:, idle]) and not np.any(got[2][idle])


def test_fine_tuning_wins_back_what_thresholds_cost():
  x, *given = weights(14, tokens=(32,))
  tau = scalar(1.5)
  want, _ = oracle(x, *given, 0)
  x = jnp.asarray(x)

  def loss(given):
    output = module.gated_mlp(x, *given, tau).output
    return jnp.mean(jnp.square(output - want.astype(np.float32)))

  @jax.jit
  def train(given):
    def step(given, _):
      value, gradient = jax.value_and_grad(loss)(given)
      move = jax.tree.map(lambda w, g: w - 1e-3 * g, given, gradient)
      return move, value

    return jax.lax.scan(step, given, length=40)[1]

  losses = train(tuple(given))
  assert losses[-1] < 0.7 * losses[0]


def test_bfloat16_looks_at_the_rounded_gate():
  low = [jnp.asarray(y, jnp.bfloat16) for y in weights(15)]
  gate = cats.silu_gate(*low[:2])
  tau = np.sort(np.abs(np.asarray(gate, np.float32)).ravel())[40]
  got = cats.gated_mlp(*low, scalar(tau))
  assert gate.dtype == got.output.dtype == jnp.bfloat16
  kept = np.abs(np.asarray(gate, np.float32)) > tau  # a tie with it goes
  np.testing.assert_allclose(got.kept_share, kept.mean(axis=-1))
  x, _, w_up, w_down = (np.asarray(y, np.float64) for y in low)
  gate = np.where(kept, np.asarray(gate, np.float64), 0)
  want = (gate * (x @ w_up.T)) @ w_down
  np.testing.assert_allclose(
    got.output.astype(np.float32), want, atol=0.02 * np.abs(want).max()
  )


def test_capacity_of_a_config():
  config = CatsConfig(sparsity=0.9, slack=0.1)
  assert module.unit_capacity(14_336, config) == 1664  # 1,576.96 rounded up
  assert module.unit_capacity(16, config) == 16
  small = CatsConfig(sparsity=0.5, slack=0.0, multiple=1)
  assert module.unit_capacity(16, small) == 8
  assert module.unit_capacity(16, CatsConfig(sparsity=1.0, multiple=1)) == 1


@pytest.mark.unchecked
def test_errors_name_the_argument():
  x, *rest = weights(16)
  empty = module.start_histogram()
  with pytest.raises(ValueError, match="sparsity must lie in 0..1, got 1.5"):
    module.find_threshold(empty, CatsConfig(sparsity=1.5))
  with pytest.raises(ValueError, match="slack must lie in 0..inf, got -1.0"):
    module.unit_capacity(16, CatsConfig(slack=-1.0))
  with pytest.raises(ValueError, match=r"of the tokens \(5,\), got \(4,\)"):
    run(module.gated_mlp, x, *rest, 0.1, np.ones(4, bool))
  with pytest.raises(ValueError, match=r"of the tokens \(5,\), got \(4,\)"):
    run(module.observe, empty, x, np.ones(4, bool))
  with pytest.raises(ValueError, match="x_dim=7, w_gate_dim=8"):
    run(module.gated_mlp, x[:, :7], *rest, 0.1)
  huge = jax.ShapeDtypeStruct((2**20, 2**12), jnp.bfloat16)
  with pytest.raises(ValueError, match="values_of_a_batch must lie in"):
    jax.eval_shape(module.observe, empty, huge)

import fractions
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.ops import budgets

QWEN2_7B = dict(width=3584, ffn_width=18944, key_value_width=512)
VICUNA_7B = dict(width=4096, ffn_width=11008)


def test_keep_count_rounds_by_name():
  def counts(ratio, num_tokens):
    return [
      budgets.keep_count(ratio, num_tokens, rounding=rule)
      for rule in ("half_even", "floor", "ceil", "half_up")
    ]

  assert counts(0.25, 10) == [2, 2, 3, 3]
  assert counts(0.25, 14) == [4, 3, 4, 4]
  assert counts(0.29, 100)[1] == 28  # as the doubles of the published codes
  assert counts(0.0, 100) == [1, 1, 1, 1]
  assert counts(1.0, 7) == [7, 7, 7, 7]
  assert budgets.keep_count(0.0, 9, rounding="floor", at_least=0) == 0
  assert budgets.keep_count(0.098, 576, rounding="half_even") == 56


def oracle_allocate(weights, total, caps):
  """Exact shares of an allocation in proportion, each up to its cap."""
  total = min(total, sum(caps))
  weights = [
    fractions.Fraction(w) if c else fractions.Fraction(0)
    for w, c in zip(weights, caps, strict=True)
  ]
  full = [c == 0 for c in caps]
  while True:
    open_ = [i for i, f in enumerate(full) if not f]
    rest = total - sum(c for c, f in zip(caps, full, strict=True) if f)
    weigh = {i: weights[i] for i in open_}
    if not sum(weigh.values()):
      weigh = {i: fractions.Fraction(1) for i in open_}
    share = [fractions.Fraction(c) for c in caps]
    for i in open_:
      share[i] = rest * weigh[i] / sum(weigh.values())
    over = [i for i in open_ if share[i] >= caps[i]]
    if not over:
      return share, total
    for i in over:
      full[i] = True


def test_allocate_equals_exact_arithmetic():
  random = np.random.default_rng(0)
  weights = random.integers(0, 8, (1000, 5))
  weights[random.random(1000) < 0.1] = 0
  caps = random.integers(0, 12, (1000, 5))
  total = random.integers(0, 45, 1000)
  got = np.asarray(
    jax.jit(budgets.allocate)(
      jnp.asarray(weights, jnp.float32),
      jnp.asarray(total, jnp.int32),
      jnp.asarray(caps, jnp.int32),
    )
  )
  distinct = 0
  for i in range(1000):
    share, given = oracle_allocate(
      *(x[i].tolist() for x in (weights, total, caps))
    )
    assert got[i].sum() == given
    assert (got[i] >= 0).all() and (got[i] <= caps[i]).all()
    for count, exact in zip(got[i].tolist(), share, strict=True):
      assert abs(count - exact) < 1
    # The largest fractions get what is left over; equal ones are left open.
    left = given - sum(math.floor(s) for s in share)
    order = sorted(range(5), key=lambda j: -(share[j] % 1))
    fraction = [share[j] % 1 for j in order]
    if left and left < 5 and fraction[left - 1] == fraction[left]:
      continue
    distinct += 1
    want = [math.floor(s) for s in share]
    for j in order[:left]:
      want[j] += 1
    assert got[i].tolist() == want
  assert distinct > 600


def test_allocate_examples():
  weights = jnp.array([6.0, 3.0, 1.0])
  assert budgets.allocate(weights, 10, 10).tolist() == [6, 3, 1]
  assert budgets.allocate(weights, 10, 5).tolist() == [5, 4, 1]
  assert budgets.allocate(weights, 99, 5).tolist() == [5, 5, 5]
  assert budgets.allocate(jnp.zeros(3), 7, 5).tolist() == [3, 2, 2]
  assert budgets.allocate(weights, 0, 5).tolist() == [0, 0, 0]
  caps = jnp.array([0, 9, 9])
  assert budgets.allocate(weights, 8, caps).tolist() == [0, 6, 2]
  scaled = budgets.allocate(weights * 1e-20, 10, 5)
  assert scaled.tolist() == [5, 4, 1]
  gradient = jax.grad(
    lambda w: jnp.sum(budgets.allocate(w, 10, 5).astype(w.dtype))
  )(weights)
  assert not np.any(gradient)


def test_layer_tokens_and_their_mean():
  plan = ((0, 48), (8, 35), (16, 26), (24, 19))
  assert (
    budgets.layer_tokens(plan, 32)
    == (48,) * 8 + (35,) * 8 + (26,) * 8 + (19,) * 8
  )
  assert budgets.average_tokens(plan, 32) == 32
  # SparseVLM states an average of about 191 for its budgets of 192.
  sparsevlm = ((0, 576), (3, 300), (7, 200), (16, 110))
  assert budgets.average_tokens(sparsevlm, 32) == pytest.approx(202.75)


def test_visiondrop_plan_gives_the_published_counts():
  assert budgets.visiondrop_plan(32) == (
    (0, 42, 6),
    (8, 30, 5),
    (16, 22, 4),
    (24, 16, 3),
  )
  published = {
    64: (96, 71, 52, 38),
    128: (192, 141, 104, 76),
    192: (288, 212, 156, 114),
  }
  for target, counts in published.items():
    plan = budgets.visiondrop_plan(target)
    assert tuple(a + b for _, a, b in plan) == counts
    stages = [(start, a + b) for start, a, b in plan]
    mean = budgets.average_tokens(stages, 32)
    assert mean == pytest.approx(target, rel=0.005)
  assert [s for s, *_ in budgets.visiondrop_plan(9, 28)] == [0, 7, 14, 21]


def test_aim_plan_gives_the_published_counts():
  plan = budgets.linear_decay_plan(1568, 100, start=14, stop=22)
  counts = [1668] * 15 + [1472, 1276, 1080, 884, 688, 492, 296] + [100] * 6
  assert list(budgets.layer_tokens(plan, 28)) == counts
  early = budgets.linear_decay_plan(1568, 100, start=14, stop=22, delayed=False)
  assert list(budgets.layer_tokens(early, 28)) == counts[1:] + [100]
  from_zero = budgets.linear_decay_plan(8, 1, start=0, stop=2, delayed=False)
  assert from_zero == ((0, 5), (1, 1))


def test_prefill_flops_against_published_numbers():
  def tera(plan):
    return budgets.prefill_flops(plan, 28, **QWEN2_7B) / 1e12

  full = tera(((0, 32 * 196 + 100),))
  assert full == pytest.approx(99.46, abs=0.005)
  assert full == pytest.approx(99.63, rel=0.003)  # stated by AIM
  early = budgets.linear_decay_plan(
    32 * 49, 100, start=14, stop=22, delayed=False
  )
  assert tera(early) == pytest.approx(14.75, abs=0.005)
  assert tera(early) == pytest.approx(14.76, rel=0.003)  # stated by AIM
  late = budgets.linear_decay_plan(32 * 49, 100, start=14, stop=22)
  assert tera(late) == pytest.approx(15.52, abs=0.005)


@pytest.mark.parametrize(
  "num_text, saved", [(40, 0.689), (64, 0.664), (100, 0.629)]
)
def test_prefill_flops_is_the_baseline_of_saisa(num_text, saved):
  # Visual tokens are keys and values only, made in each layer from 1024 wide
  # features; the paper states 66 %.
  d, m, visual = 4096, 11008, 576
  total = visual + num_text
  saisa = 2 * num_text * (4 * d * d + 3 * d * m)
  saisa += 2 * visual * 2 * d * d + 2 * visual * (1024 * d + d * d)
  saisa += 4 * num_text * total * d
  full = budgets.prefill_flops(((0, total),), 32, **VICUNA_7B)
  assert 1 - 32 * saisa / full == pytest.approx(saved, abs=0.0005)


def test_prefill_flops_conventions():
  def flops(**settings):
    return budgets.prefill_flops(((0, 10), (1, 3)), 3, **sizes, **settings)

  sizes = dict(width=4, ffn_width=5)

  def layer(n, matrices):
    return 4 * n * 16 + 2 * n * n * 4 + matrices * n * 4 * 5

  fastv = layer(10, 3) + 2 * layer(3, 3)
  assert flops(convention="fastv") == fastv
  assert flops() == 2 * fastv  # multiplications and additions apart
  divprune = layer(10, 2) + 2 * layer(3, 2)
  assert flops(convention="divprune") == divprune
  # One token sees one pair either way; ten see 55 instead of 100.
  causal = flops() - 4 * 4 * ((100 - 55) + 2 * (9 - 6))
  assert flops(attention="causal") == causal
  grouped = budgets.prefill_flops(((0, 10),), 1, key_value_width=1, **sizes)
  full = budgets.prefill_flops(((0, 10),), 1, **sizes)
  assert full - grouped == 2 * 10 * 2 * 4 * 3


@pytest.mark.unchecked
def test_errors():
  with pytest.raises(ValueError, match="ratio must lie in 0..1, got 2.0"):
    budgets.keep_count(2.0, 10, rounding="floor")
  with pytest.raises(ValueError, match="rounding must be one of 'half_even'"):
    budgets.keep_count(0.5, 10, rounding="nearest")
  with pytest.raises(ValueError, match=r"plan must start at layer 0.*\[1\]"):
    budgets.average_tokens(((1, 5),), 4)
  with pytest.raises(ValueError, match=r"ascend, got \[0, 2, 2\]"):
    budgets.layer_tokens(((0, 5), (2, 4), (2, 3)), 4)
  with pytest.raises(ValueError, match="num_layers must lie in 3.*, got 2"):
    budgets.layer_tokens(((0, 5), (2, 4)), 2)
  with pytest.raises(ValueError, match="stop must lie in 5.*, got 4"):
    budgets.linear_decay_plan(8, 1, start=4, stop=4)
  with pytest.raises(ValueError, match="convention must be one of 'full'"):
    budgets.prefill_flops(((0, 1),), 1, width=1, ffn_width=1, convention="mac")
  with pytest.raises(ValueError, match="key_value_width must be None for"):
    budgets.prefill_flops(((0, 1),), 1, convention="fastv", **QWEN2_7B)
  with pytest.raises(ValueError, match="num_layers must be a multiple of 4"):
    budgets.visiondrop_plan(32, 30)

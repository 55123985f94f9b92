import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import compiled
from tokjax.ops import merging, plans

merging = compiled(merging)
plans = compiled(plans)

N = 9


def cases(seed, count=400, n=N, dim=4):
  """Half of the metrics have exact ties: axes of either sign."""
  random = np.random.default_rng(seed)
  metric = random.normal(size=(count, n, dim)).astype(np.float32)
  axes = np.eye(dim, dtype=np.float32)[random.integers(0, dim, (count, n))]
  axes *= random.choice([-1.0, 1.0], (count, n, 1)).astype(np.float32)
  tied = np.arange(count) % 2 == 0
  metric[tied] = axes[tied]
  mask = random.random((count, n)) < random.random((count, 1)) + 0.3
  mask[:4] = True
  mask[4:5] = False
  size = random.integers(1, 5, (count, n)).astype(np.float32)
  score = random.integers(0, 5, (count, n)).astype(np.float32)
  x = random.normal(size=(count, n, 3)).astype(np.float32)
  return metric, mask, size, score, x


def unit(rows):
  rows = np.asarray(rows, np.float64)
  length = np.linalg.norm(rows, axis=-1, keepdims=True)
  return rows / np.where(length > 0, length, 1)


class NearTie(Exception):
  """The choice hangs on less than float32 can tell."""


def argmax(values):
  """Index of the first largest; exact ties are fine, near ones are not."""
  best = max(values)
  if any(0 < best - v < 1e-5 for v in values):
    raise NearTie
  return values.index(best)


def oracle_match(
  metric, mask, num_merged, class_token, distill_token, every, order
):
  """Groups of each output, and what stands for it; one example."""
  valid = [n for n in range(len(mask)) if mask[n]]
  limit = max(len(valid) - (len(mask) - num_merged), 0)
  receives = valid[every - 1 :: every]
  if len(valid) < every:
    receives = valid[-1:]
  sources = [n for n in valid if n not in receives]
  first = valid[0] if class_token and valid else None
  at = int(class_token)
  second = valid[at] if distill_token and len(valid) > at else None
  u = unit(metric)
  best, partner = {}, {}
  for a in sources:
    open_ = [b for b in receives if b != second]
    if a in (first, second) or not open_:
      best[a] = -np.inf
      continue
    cosine = [float(u[a] @ u[b]) for b in open_]
    partner[a] = open_[argmax(cosine)]
    best[a] = max(cosine)
  ranked = sorted(sources, key=lambda a: (-best[a], a))
  for a, b in zip(ranked, ranked[1:], strict=False):
    if 0 < best[a] - best[b] < 1e-5:
      raise NearTie
  merged = ranked[:limit]
  stay = ranked[limit:] if order == "similarity" else sorted(ranked[limit:])
  outputs = stay + receives
  if order == "raster" or limit == 0:
    outputs = sorted(outputs)
  groups = [[o] + [a for a in merged if partner[a] == o] for o in outputs]
  return outputs, groups


SETTINGS = {
  "plain": dict(num_merged=3),
  "half": dict(num_merged=4),
  "none": dict(num_merged=0),
  "class": dict(num_merged=4, class_token=True, order="ascending"),
  "distill": dict(
    num_merged=3, class_token=True, distill_token=True, order="ascending"
  ),
  "third": dict(num_merged=6, every=3, order="raster"),
  "fourth": dict(num_merged=5, every=4),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_bipartite_match_equals_a_loop(name):
  settings = SETTINGS[name]
  metric, mask, size, _, x = cases(0)
  num_outputs = N - settings["num_merged"]

  @jax.jit
  def run(metric, mask, size, x):
    match = merging.bipartite_match(
      metric, settings["num_merged"], mask, size, **options
    )
    return match, plans.apply_plan(match.plan, x, num_outputs)

  options = {k: v for k, v in settings.items() if k != "num_merged"}
  poisoned = np.where(mask[..., None], metric, np.nan)
  match, tokens = jax.device_get(run(poisoned, mask, size, x))
  full = dict(
    class_token=False, distill_token=False, every=2, order="similarity"
  )
  checked = 0
  for i in range(len(metric)):
    try:
      outputs, groups = oracle_match(
        metric[i], mask[i], settings["num_merged"], **(full | options)
      )
    except NearTie:
      continue
    checked += 1
    assert match.index[i, : len(outputs)].tolist() == outputs
    assert match.mask[i].tolist() == [
      k < len(outputs) for k in range(num_outputs)
    ]
    want_slot = [num_outputs] * N
    for k, group in enumerate(groups):
      weights = size[i, group] / size[i, group].sum()
      want = (weights[:, None] * x[i, group]).sum(axis=0)
      np.testing.assert_allclose(tokens[i, k], want, atol=1e-5)
      for member in group:
        want_slot[member] = k
    assert match.plan.slot[i].tolist() == want_slot
  assert checked > 0.95 * len(metric)


def test_tome_worked_example():
  x = jnp.array(
    [[1, 0], [1, 0.1], [0, 1], [0.1, 1], [-1, 0], [0, -1]], jnp.float32
  )
  match = merging.bipartite_match(x, 1)
  assert match.plan.slot.tolist() == [2, 2, 0, 3, 1, 4]  # 0 into 1
  assert match.index.tolist() == [2, 4, 1, 3, 5]
  match = merging.bipartite_match(x, 3)  # the last one, of cosine 0, into 5
  assert match.plan.slot.tolist() == [0, 0, 1, 1, 2, 2]


def test_nothing_merged_is_the_identity():
  metric = jnp.asarray(cases(0, count=2)[0])
  for match in (
    merging.bipartite_match(metric, 0),
    merging.random_match(jax.random.key(0), metric, 0),
  ):
    assert (match.index == jnp.arange(N)[None]).all() and match.mask.all()
    np.testing.assert_array_equal(match.plan.slot, match.index)
    np.testing.assert_array_equal(match.plan.weight, np.ones((2, N)))


def test_padding_anywhere_equals_the_example_alone():
  metric, mask, size, _, _ = cases(3, count=40)
  keep = mask.sum(axis=1) == 7
  assert keep.sum() > 2
  match = jax.jit(merging.bipartite_match, static_argnums=1)
  padded = jax.device_get(match(metric, 4, mask, size))  # to 5 outputs
  for i in np.flatnonzero(keep):
    valid = np.flatnonzero(mask[i])
    alone = match(metric[i, valid], 2, None, size[i, valid])
    np.testing.assert_array_equal(padded.index[i], valid[alone.index])
    np.testing.assert_array_equal(padded.plan.slot[i, valid], alone.plan.slot)
    np.testing.assert_allclose(
      padded.plan.weight[i, valid], alone.plan.weight, atol=1e-6
    )


def test_length_of_the_metric_does_not_matter():
  metric, mask, size, _, _ = cases(4, count=20)
  scale = np.random.default_rng(0).uniform(0.1, 9, metric.shape[:2])
  scale = scale[..., None].astype(np.float32)
  match = jax.jit(merging.bipartite_match, static_argnums=1)
  want = match(metric, 4, mask, size).plan.slot
  got = match(metric * scale, 4, mask, size).plan.slot
  untied = np.arange(20) % 2 == 1
  np.testing.assert_array_equal(got[untied], want[untied])


def test_random_match_properties():
  metric, mask, size, _, _ = cases(5, count=300)
  key = jax.random.key(0)
  match = jax.jit(merging.random_match, static_argnums=2)(
    key, metric, 5, mask, size
  )
  match = jax.device_get(match)
  unit_metric = unit(np.where(mask[..., None], metric, 0))
  for i in range(len(metric)):
    u = unit_metric[i]
    count = min(int(mask[i].sum()), N - 5)
    outputs = match.index[i, :count].tolist()
    assert outputs == sorted(set(outputs)) and mask[i, outputs].all()
    assert match.mask[i].tolist() == [k < count for k in range(N - 5)]
    for n in range(N):
      slot = int(match.plan.slot[i, n])
      if not mask[i, n]:
        assert slot == N - 5
      elif n in outputs:
        assert slot == outputs.index(n)
      else:  # merged into the nearest of those that stayed
        cosine = u[outputs] @ u[n]
        assert cosine[slot] > cosine.max() - 1e-5
  other = jax.jit(merging.random_match, static_argnums=2)(
    jax.random.key(1), metric, 5, mask, size
  )
  assert np.any(np.asarray(other.index) != np.asarray(match.index))


def test_random_match_draws_every_token_as_often():
  metric = jnp.ones((4000, 6, 2))
  match = merging.random_match(jax.random.key(0), metric, 3)
  stays = np.zeros(6)
  np.add.at(stays, np.asarray(match.index).ravel(), 1)
  np.testing.assert_allclose(stays / 4000, 0.5, atol=0.04)


def test_mean_plan_weights():
  slot = jnp.array([[0, 0, 2, 3, 1], [3, 3, 3, 3, 3]])
  size = jnp.array([[1.0, 3, 2, jnp.nan, 5], [1, 1, 1, 1, 1]])
  plan = merging.mean_plan(slot, 3, size)
  want = [[0.25, 0.75, 1, 0, 1], [0, 0, 0, 0, 0]]
  np.testing.assert_array_equal(plan.weight, want)
  plain = merging.mean_plan(slot, 3)
  np.testing.assert_array_equal(plain.weight[0], [0.5, 0.5, 1, 0, 1])


def oracle_dominant(metric, mask, score, num_dominant, num_contextual):
  """Outputs as (position, {member: weight}), one example."""
  valid = [n for n in range(len(mask)) if mask[n]]
  if len(valid) <= num_dominant + num_contextual:
    return [(n, {n: 1.0}) for n in valid]
  best = sorted(valid, key=lambda n: (-score[n], n))[:num_dominant]
  outputs = [(n, {n: 1.0}) for n in sorted(best)]
  if not num_contextual:
    return outputs
  rest = [n for n in valid if n not in best]
  step = max(1, len(rest) // num_contextual)
  targets = rest[::step][:num_contextual]
  u = unit(metric)
  nearest = {
    n: argmax([float(u[n] @ u[t]) for t in targets])
    for n in rest
    if n not in targets
  }
  for c, target in enumerate(targets):
    members = [n for n in nearest if nearest[n] == c]
    outputs.append(
      (target, {target: 1.0} | {n: 1 / len(members) for n in members})
    )
  return outputs


@pytest.mark.parametrize(
  "num_dominant, num_contextual", [(3, 2), (1, 4), (4, 0), (1, 8), (9, 0)]
)
def test_dominant_contextual_equals_a_loop(num_dominant, num_contextual):
  metric, mask, _, score, _ = cases(6)
  poisoned = np.where(mask[..., None], metric, np.nan)
  poisoned_score = np.where(mask, score, np.nan)
  fusion = jax.jit(merging.dominant_contextual, static_argnums=(2, 3))(
    poisoned, poisoned_score, num_dominant, num_contextual, mask
  )
  fusion = jax.device_get(fusion)
  num_outputs = num_dominant + num_contextual
  checked = 0
  for i in range(len(metric)):
    try:
      outputs = oracle_dominant(
        metric[i], mask[i], score[i], num_dominant, num_contextual
      )
    except NearTie:
      continue
    checked += 1
    weight = np.zeros((num_outputs, N))
    for k, (_, members) in enumerate(outputs):
      for n, w in members.items():
        weight[k, n] = w
    index = [n for n, _ in outputs]
    index += [N - 1] * (num_outputs - len(outputs))
    assert fusion.index[i].tolist() == index
    assert fusion.mask[i].sum() == len(outputs)
    slot, got = np.asarray(fusion.plan.slot[i]), fusion.plan.weight[i]
    for n in range(N):
      column = weight[:, n]
      if column.any():
        assert slot[n] == np.argmax(column)
        np.testing.assert_allclose(got[n], column.max(), atol=1e-6)
      else:
        assert slot[n] == num_outputs
  assert checked > 0.95 * len(metric)


def test_visiondrop_worked_example():
  angle = np.deg2rad([0, 5, 40, 45, 90, 95, 130, 135])
  metric = jnp.asarray(
    np.stack([np.cos(angle), np.sin(angle)], axis=1), jnp.float32
  )
  score = jnp.array([0, 1, 0, 0, 0, 1.0, 0, 0])
  fusion = merging.dominant_contextual(metric, score, 2, 2)
  x = jnp.arange(8.0)[:, None]
  tokens = plans.apply_plan(fusion.plan, x, 4)[:, 0]
  np.testing.assert_allclose(tokens, [1, 5, 2.5, 10.5], atol=1e-6)
  assert fusion.index.tolist() == [1, 5, 0, 4]


def test_nothing_but_the_metric_decides_and_it_gets_no_gradient():
  metric, mask, size, score, x = map(jnp.asarray, cases(7, count=4))

  def total(metric, score, x):
    match = merging.bipartite_match(metric, 4, mask, size)
    fusion = merging.dominant_contextual(metric, score, 2, 2, mask)
    return jnp.sum(jnp.sin(plans.apply_plan(match.plan, x, 5))) + jnp.sum(
      jnp.sin(plans.apply_plan(fusion.plan, x, 4))
    )

  to_metric, to_score, to_x = jax.grad(total, (0, 1, 2))(metric, score, x)
  assert not np.any(to_metric) and not np.any(to_score)
  assert not np.any(np.asarray(to_x)[~np.asarray(mask)])
  assert np.any(to_x)


def test_leading_axes_are_mapped():
  metric, mask, size, score, _ = cases(8, count=6)
  fold = functools.partial(
    jax.tree.map, lambda x: jnp.reshape(x, (2, 3, *x.shape[1:]))
  )
  match = jax.jit(merging.bipartite_match, static_argnums=1)
  few = jax.jit(merging.dominant_contextual, static_argnums=(2, 3))
  for got, want in (
    (
      match(fold(metric), 4, fold(mask), fold(size)),
      match(metric, 4, mask, size),
    ),
    (
      few(fold(metric), fold(score), 2, 3, fold(mask)),
      few(metric, score, 2, 3, mask),
    ),
  ):
    jax.tree.map(np.testing.assert_array_equal, got, fold(want))
    assert isinstance(got, merging.Fusion)


@pytest.mark.unchecked
def test_errors():
  metric = jnp.ones((2, 9, 4))
  match = merging.bipartite_match
  with pytest.raises(ValueError, match="num_merged must lie in 0..4, got 5"):
    match(metric, 5)
  with pytest.raises(ValueError, match="num_merged must lie in 0..3, got 4"):
    match(metric, 4, class_token=True, distill_token=True)
  with pytest.raises(ValueError, match="every must lie in 2..9, got 1"):
    match(metric, 1, every=1)
  with pytest.raises(ValueError, match="order must be one of 'similarity'"):
    match(metric, 1, order="best")
  with pytest.raises(ValueError, match="metric_tokens=9, mask=8, size=9"):
    match(metric, 1, jnp.ones((2, 8), bool))
  with pytest.raises(ValueError, match="num_merged must lie in 0..8, got 9"):
    merging.random_match(jax.random.key(0), metric, 9)
  with pytest.raises(ValueError, match="num_contextual must lie in 0..6"):
    merging.dominant_contextual(metric, metric[..., 0], 3, 7)
  with pytest.raises(ValueError, match="metric_tokens=9, score=8, mask=8"):
    merging.dominant_contextual(metric, metric[:, :8, 0], 3, 2)
  with pytest.raises(ValueError, match="slot=3, size=2"):
    merging.mean_plan(jnp.zeros(3, int), 1, jnp.ones(2))
